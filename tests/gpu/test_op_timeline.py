"""Events around nano-ops on a real GPU: lanes run side by side, nano-ops of a lane do not."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def test_nano_ops_of_a_lane_follow_each_other_and_lanes_run_at_once():
    from nanoflow_tune.profiler.op_timeline import measure_timelines
    from nanoflow_tune.profiler.rank_jobs import IterationCase
    from nanoflow_tune.runtime.launch import RankContext
    from nanoflow_tune.runtime.op_graph import OpGraph, RowMix
    from nanoflow_tune.search_spaces.loader import load_hardware

    from .test_verify_on_device import overlapped, small_model

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    model = replace(small_model(), num_hidden_layers=6)
    schedule = overlapped(OpGraph.build(model), sms)
    mix = RowMix(
        decode_tokens=256,
        prefill_tokens=256,
        decode_context_tokens=2000.0,
        prefill_context_tokens=100.5,
    )
    case = IterationCase(model=model, hardware=load_hardware("h200"), tp_degree=1, mix=mix)
    (played,) = measure_timelines(RankContext(0, 1, "cuda:0"), case, [schedule], 5)

    assert len(played) == len(schedule.nano_ops) * model.num_hidden_layers
    assert min(op.start_us for op in played) == 0.0
    lanes = {lane: [] for lane in schedule.lanes}
    for op in played:
        lanes[schedule.nano_ops[op.index].lane].append(op)
    slack_us = 20.0  # medians of starts and of lengths need not add up
    for ops in lanes.values():
        for before, after in pairwise(ops):
            assert after.start_us >= before.end_us - slack_us
    at_once = sum(
        max(0.0, min(a.end_us, b.end_us) - max(a.start_us, b.start_us))
        for a in lanes["memory"]
        for b in lanes["compute"]
    )
    assert at_once > 0.2 * sum(op.end_us - op.start_us for op in lanes["memory"])
