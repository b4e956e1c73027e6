"""What would lift the limit: against predictions of the changed inputs themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.baselines import sequential
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.autotune.what_if import FEWER_FLOPS, MORE_WATTS, what_ifs
from nanoflow_tune.runtime.op_graph import GEMM_KINDS

from .fakes import MIX, graph_of, h200, linear_profile

GRAPH = graph_of("llama3-8b")
PROFILE = linear_profile(GRAPH)
COSTS = CostModel(PROFILE, h200())
SCHEDULE = sequential(GRAPH, COSTS, MIX)
BEFORE_US = predict(SCHEDULE, GRAPH, COSTS, MIX).period_us


def test_every_change_helps_where_power_binds():
    changes = what_ifs(SCHEDULE, GRAPH, COSTS, MIX)
    assert len(changes) == 3
    for change in changes:
        assert change.period_us < BEFORE_US
        assert change.gain == pytest.approx(BEFORE_US / change.period_us - 1, rel=1e-6)


def test_a_higher_cap_is_the_prediction_for_a_card_with_it():
    *_, cap = what_ifs(SCHEDULE, GRAPH, COSTS, MIX)
    raised = CostModel(PROFILE, replace(h200(), power_cap_w=700 + MORE_WATTS))
    expected_us = predict(SCHEDULE, GRAPH, raised, MIX).period_us
    assert cap.period_us == pytest.approx(expected_us, rel=0.01)  # bursts are judged by the old cap
    assert cap.sm_clock_mhz > predict(SCHEDULE, GRAPH, COSTS, MIX).sm_clock_mhz


def test_fewer_flops_are_worth_at_most_the_time_of_the_gemms():
    _, flops, _ = what_ifs(SCHEDULE, GRAPH, COSTS, MIX)
    gemm_us = sum(
        COSTS.estimate(GRAPH.op(n.op), MIX, n.num_sms, n.variant).us
        for n in SCHEDULE.nano_ops
        if GRAPH.op(n.op).kind in GEMM_KINDS
    )
    saved_us = BEFORE_US - flops.period_us
    assert saved_us > (1 - FEWER_FLOPS) * gemm_us * GRAPH.num_layers


def test_nothing_is_asked_of_a_datasheet():
    roofline = CostModel(None, h200())
    assert what_ifs(sequential(GRAPH, roofline, MIX), GRAPH, roofline, MIX) == ()
