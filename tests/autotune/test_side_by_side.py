"""Both attentions of one batch at once: a hand-worked period, legality, when there is nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.baselines import nano_only, sequential
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.side_by_side import attention_side_by_side
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.runtime.legality import check

from .fakes import MIX, graph_of, h200, linear_profile

GRAPHS = {1: graph_of("llama3-8b"), 2: graph_of("llama2-70b", 2)}
COSTS = CostModel(linear_profile(*GRAPHS.values()), h200())


@pytest.mark.parametrize("tp_degree", [1, 2])
def test_only_attention_leaves_the_sequential_schedule_and_nothing_is_split(tp_degree: int):
    graph = GRAPHS[tp_degree]
    base = sequential(graph, COSTS, MIX)
    beside = attention_side_by_side(base, graph, COSTS, MIX)
    assert beside is not None
    check(beside, graph, 132, 8)
    assert beside.nano_batches == base.nano_batches
    assert beside.is_overlapped
    by_name = {nano_op.op: nano_op for nano_op in beside.nano_ops}
    decode, prefill = by_name["decode_attention"], by_name["prefill_attention"]
    assert (decode.lane, prefill.lane) == ("memory", "compute")
    assert 0 < decode.num_sms < decode.num_sms + prefill.num_sms <= 132
    for before, after in zip(base.nano_ops, beside.nano_ops, strict=True):
        assert before == after or after.op in ("decode_attention", "prefill_attention")


def test_no_other_division_of_the_sms_is_faster():
    graph = GRAPHS[1]
    beside = attention_side_by_side(sequential(graph, COSTS, MIX), graph, COSTS, MIX)
    assert beside is not None
    best_us = predict(beside, graph, COSTS, MIX).period_us
    for memory_sms in range(8, 132, 8):
        shares = {"decode_attention": memory_sms, "prefill_attention": 132 - memory_sms}
        other = replace(
            beside,
            nano_ops=tuple(
                replace(nano_op, num_sms=shares.get(nano_op.op, nano_op.num_sms))
                for nano_op in beside.nano_ops
            ),
        )
        assert best_us <= predict(other, graph, COSTS, MIX).period_us + 1e-6


def test_there_is_nothing_to_overlap_in_a_batch_of_one_kind_or_in_a_split_one():
    graph = GRAPHS[1]
    base = sequential(graph, COSTS, MIX)
    decodes = replace(MIX, decode_tokens=MIX.tokens, prefill_tokens=0.0)
    assert attention_side_by_side(base, graph, COSTS, decodes) is None
    assert attention_side_by_side(nano_only(graph, COSTS, MIX), graph, COSTS, MIX) is None
