"""Layers with experts in the executor: verified like dense ones, and what is caught in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rank_functions as on_rank
import torch
from builders import NUM_SMS, ping_pong, tiny_model

from nanoflow_tune.runtime.launch import RankContext, RankGroup
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.model import ReferenceOutput
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.schedule import IllegalScheduleError
from nanoflow_tune.runtime.verify import VerificationError, cpu_case, verify_schedule
from nanoflow_tune.runtime.verify_rank import _clear_rows

MODEL = tiny_model("mixtral", num_attention_heads=16, num_key_value_heads=8)
GRAPH = OpGraph.build(MODEL)
SPLIT = ping_pong(GRAPH, 128, 256, (80, 20))


@pytest.fixture
def here(monkeypatch):
    """This process as the only rank; planted kernels are taken back."""
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry

    kernels.load("cpu")
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))
    return RankContext(0, 1, "cpu")


def test_a_ping_pong_schedule_passes(here):
    result = verify_schedule(here, cpu_case(MODEL, SPLIT))
    assert result.passed
    assert result.orders_checked == 4
    assert result.max_relative_error <= 1e-5


def test_every_rank_holds_a_slice_of_every_expert():
    schedule = ping_pong(OpGraph.build(MODEL, 2), 96, 256, (50, 20))
    with RankGroup(2) as ranks:
        results = ranks.call(verify_schedule, cpu_case(MODEL, schedule, 2))
    assert [result.passed for result in results] == [True, True]


FAULTS = [
    ("moe_combine", "extra_row", r"combine.0 in layer 0 on rank 0 wrote row 128 of ffn_TD"),
    ("moe_combine", "skip_row", r"combine.0 in layer 0 on rank 0 left NaN in row 127 of ffn_TD"),
    ("moe_combine", "double_last_row", r"against the sequential run: the output of layer 0"),
    ("grouped_gemm", "skip_row", r"down.0 in layer 0 .* left NaN in row 127 of expert_out_TD"),
]


@pytest.mark.parametrize(("kind", "fault", "message"), FAULTS)
def test_faults_of_the_kernels_of_experts_are_caught(here, kind, fault, message):
    # Calls of one nano-batch have 128 rows, or 256 routed ones; unsplit ones have twice as many.
    max_rows = 300 if kind == "grouped_gemm" else 200
    with pytest.raises(VerificationError, match=message):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), kind, fault, max_rows)


def test_a_router_that_leaves_a_place_out_is_caught(here):
    from nanoflow_tune.runtime.kernels import experts, registry

    @registry.register("moe_router", "torch", "cpu")
    def router(x_TD, weight_ED, routed_RD, offsets_E, places_TJ, weights_TJ, num_sms):
        experts.moe_router(x_TD, weight_ED, routed_RD, offsets_E, places_TJ, weights_TJ, num_sms)
        if x_TD.shape[0] == 128:
            places_TJ[5, 1] = -1

    with pytest.raises(VerificationError, match=r"router.0 .* left -1 in row 5 of places"):
        verify_schedule(here, cpu_case(MODEL, SPLIT))


def test_experts_must_be_cut_like_their_router():
    check(SPLIT, GRAPH, NUM_SMS, 4)
    down = next(n for n in SPLIT.nano_ops if n.op == "down" and n.tokens == (0, 128))
    other = next(n for n in SPLIT.nano_ops if n.op == "down" and n.tokens != (0, 128))
    moved = {down: replace(down, tokens=(0, 64)), other: replace(other, tokens=(64, 256))}
    schedule = replace(SPLIT, nano_ops=tuple(moved.get(n, n) for n in SPLIT.nano_ops))
    with pytest.raises(IllegalScheduleError, match=r"down must be cut at the same rows as router"):
        check(schedule, GRAPH, NUM_SMS, 4)


def test_rows_that_nearly_went_elsewhere_are_not_compared():
    class Setting:
        requests = (_request(2, True), _request(1, False), _request(1, True))
        case = cpu_case(MODEL, SPLIT)

    margins = (torch.tensor([0.5, 0.03, 0.9, 0.5]), torch.tensor([0.5, 0.03, 0.9, 0.1]))
    reference = ReferenceOutput(layer_outputs_TD=(), logits_RV=torch.empty(2, 1), margins_T=margins)
    *layers, logits = _clear_rows(Setting, reference, 0.02)
    assert [clear.tolist() for clear in layers] == [[True, False, True, True]] * 2
    assert logits.tolist() == [False, True]
    with pytest.raises(VerificationError, match=r"only 0% of the rows of tiny-mixtral"):
        _clear_rows(Setting, reference, 0.5)


def _request(rows, is_complete):
    from nanoflow_tune.runtime.batching import Request

    return Request(
        token_ids=(1,) * rows,
        first_position=0,
        pages=(1,),
        is_decode=False,
        is_complete=is_complete,
    )
