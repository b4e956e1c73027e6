from __future__ import annotations

from dataclasses import replace

import pytest
import rank_functions as on_rank
from builders import ping_pong, sequential, tiny_model
from test_plan_io import HARDWARE, ILLEGAL, make_plan

from nanoflow_tune.runtime.launch import RankContext, RankGroup
from nanoflow_tune.runtime.op_graph import Dependency, OpGraph
from nanoflow_tune.runtime.schedule import IllegalScheduleError
from nanoflow_tune.runtime.verify import (
    VerificationError,
    cpu_case,
    scaled_down,
    verify_plan,
    verify_schedule,
)

MODEL = tiny_model(num_attention_heads=16, num_key_value_heads=8)
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


def test_a_ping_pong_schedule_passes_in_plan_order_and_three_random_orders(here):
    result = verify_schedule(here, cpu_case(MODEL, SPLIT))
    assert result.passed
    assert result.num_layers == 3
    assert result.orders_checked == 4
    assert result.max_relative_error <= 1e-5


def test_the_sequential_schedule_passes(here):
    assert verify_schedule(here, cpu_case(MODEL, sequential(GRAPH, 256, 100))).passed


@pytest.mark.parametrize(("tp_degree", "rows"), [(2, 2048), (4, 256)])
def test_every_rank_of_a_tensor_parallel_plan_is_verified(tp_degree, rows):
    graph = OpGraph.build(MODEL, tp_degree)
    schedule = ping_pong(graph, rows // 2, rows, (rows // 4, rows // 8))
    with RankGroup(tp_degree) as ranks:
        results = ranks.call(verify_schedule, cpu_case(MODEL, schedule, tp_degree))
    assert [result.num_ranks for result in results] == [tp_degree] * tp_degree
    assert all(result.passed for result in results)


def test_a_kernel_that_writes_a_row_outside_its_range_is_caught(here):
    with pytest.raises(
        VerificationError, match=r"kqv.0 in layer 0 on rank 0 wrote row 128 of qkv_TC, outside"
    ):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), "gemm", "extra_row", 200)


def test_a_kernel_that_writes_behind_the_batch_is_caught_by_the_guard_rows(here):
    with pytest.raises(VerificationError, match=r"wrote the guard rows of qkv_TC, o_TD"):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), "gemm", "extra_row", 10_000)


def test_a_kernel_that_skips_a_row_is_caught(here):
    with pytest.raises(
        VerificationError, match=r"kqv.0 in layer 0 on rank 0 left NaN in row 127 of qkv_TC"
    ):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), "gemm", "skip_row", 200)


def test_a_kernel_that_computes_something_else_is_caught_by_the_numbers(here):
    with pytest.raises(
        VerificationError,
        match=r"schedule 'overlapped' against the sequential run: the output of layer 0 on rank 0 "
        r"differs by a relative error of .* \(tolerance 1e-05\), most in logical row",
    ):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), "gemm", "double_last_row", 200)


def test_a_wrong_sequential_run_is_caught_by_the_plain_reference(here):
    with pytest.raises(VerificationError, match="the sequential run against the plain reference"):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), "gemm", "double_last_row", 10_000)


def test_a_fused_kernel_passes_without_touching_the_scratch_buffer(here):
    from nanoflow_tune.runtime.kernels import registry, torch_ops

    @registry.register("gemm_silu", "torch", "cpu")
    def fused(x_TK, weight_2FK, scratch_T2F, out_TF, num_sms):
        torch_ops.gemm_silu(x_TK, weight_2FK, scratch_T2F.clone(), out_TF, num_sms)

    assert verify_schedule(here, cpu_case(MODEL, SPLIT)).passed


@pytest.mark.parametrize("fault", ["extra_row", "skip_row", "extra_scratch_row", "stale_scratch"])
def test_faults_of_the_up_gate_kernel_are_caught_in_its_outputs_and_its_scratch(here, fault):
    message = {
        "extra_row": r"up_gate.0 in layer 0 on rank 0 wrote row 128 of act_TF, outside",
        "skip_row": r"up_gate.0 in layer 0 on rank 0 left NaN in row 127 of act_TF",
        "extra_scratch_row": r"up_gate.0 in layer 0 .* wrote row 128 of up_gate_T2F, outside",
        "stale_scratch": r"up_gate.0 in layer 0 .* left NaN in row 127 of act_TF",
    }[fault]
    with pytest.raises(VerificationError, match=message):
        on_rank.verify_with_fault(here, cpu_case(MODEL, SPLIT), "gemm_silu", fault, 200)


def test_a_collective_that_gets_one_row_wrong_is_caught_on_the_ranks():
    graph = OpGraph.build(MODEL, 2)
    case = cpu_case(MODEL, ping_pong(graph, 128, 256, (80, 20)), 2)
    with RankGroup(2) as ranks, pytest.raises(VerificationError, match="differs by a relative"):
        ranks.call(on_rank.verify_with_fault, case, "all_reduce", "double_last_row", 200)


@pytest.mark.parametrize("name", ILLEGAL)
def test_verify_plan_refuses_what_must_not_run(name):
    schedule, message = ILLEGAL[name]
    with pytest.raises(IllegalScheduleError, match=message):
        verify_plan(make_plan(schedule), tiny_model(), HARDWARE, RankGroup(1))


def test_verify_plan_records_winner_and_best_overlapped():
    plan = make_plan()
    bucket = replace(plan.buckets[0], winner=plan.buckets[0].sequential)
    plan = replace(plan, buckets=(bucket,))
    with RankGroup(1) as ranks:
        verified = verify_plan(plan, tiny_model(), HARDWARE, ranks)
    records = verified.buckets[0].verification
    assert len(records) == 2
    assert all(record.passed and record.model.endswith("(scaled down)") for record in records)


def test_a_plan_for_another_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="for 1 GPUs, but 2 ranks run"):
        verify_plan(make_plan(), tiny_model(), HARDWARE, RankGroup(2))


@pytest.mark.parametrize("tp_degree", [1, 2, 8])
def test_a_scaled_down_model_keeps_the_head_ratio_and_divides(tp_degree):
    big = tiny_model(num_attention_heads=64, num_key_value_heads=8)
    small = scaled_down(big, tp_degree, 3)
    assert small.num_attention_heads // small.num_key_value_heads == 8
    assert OpGraph.build(small, tp_degree).op_names == OpGraph.build(big, tp_degree).op_names


@pytest.mark.parametrize("op", ["attn_norm", "prefill_attention", "o_proj"])
def test_a_forgotten_dependency_is_caught_by_random_orders(here, monkeypatch, op):
    build = OpGraph.build.__func__

    def forgetful(cls, model, tp_degree=1):
        graph = build(cls, model, tp_degree)
        # Prefill attention keeps its own rows but forgets the prefix; the others forget one op.
        kept = {o.name: o.dependencies[1:] for o in graph.layer}
        kept["prefill_attention"] = (Dependency("rope_append"),)
        return replace(
            graph,
            layer=tuple(
                replace(o, dependencies=kept[o.name]) if o.name == op else o for o in graph.layer
            ),
        )

    monkeypatch.setattr(OpGraph, "build", classmethod(forgetful))
    # A lane for every op: lane order must not hide what is missing.
    nano_ops = tuple(replace(o, lane=f"{o.op}{o.tokens}") for o in SPLIT.nano_ops)
    case = cpu_case(MODEL, replace(SPLIT, nano_ops=nano_ops))
    with pytest.raises(VerificationError, match=r"in random legal order . gives other bits"):
        verify_schedule(here, replace(case, num_random_orders=6))
