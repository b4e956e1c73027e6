"""Plans on a real GPU: real kernels in partitions against the unsplit run; faults are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


def small_model(name="llama3-8b"):
    from nanoflow_tune.search_spaces.loader import load_model

    return replace(
        load_model(name), hidden_size=1024, intermediate_size=2048, vocab_size=4096,
        num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=4,
    )  # fmt: skip


def overlapped(graph, num_sms, gemm="triton_128x256"):
    """Two nano-batches half a period apart: attention of one beside the GEMMs of the other."""
    from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule

    halves = ((0, 256), (256, 512))
    head = ("attn_norm", "kqv", "rope_append", "prefill_attention", "decode_attention")
    tail = [op.name for op in graph.layer if op.name not in head]
    variants = {"gemm": gemm, "gemm_silu": gemm}
    variants |= dict.fromkeys(("grouped_gemm", "grouped_gemm_silu"), "triton_grouped_128x128")
    nano_ops = []
    for tokens in halves:
        for op in (*tail, *head):
            kind = graph.op(op).kind
            is_memory = op == "decode_attention"
            nano_ops.append(
                NanoOp(
                    op=op,
                    tokens=tokens,
                    lane="memory" if is_memory else "compute",
                    num_sms=32 if is_memory else num_sms - 32,
                    variant=variants.get(kind, "triton"),
                    stage=0 if op in head else 1,
                )
            )
    return Schedule(
        name="overlapped",
        nano_batches=tuple(NanoBatch(tokens=t, decode_tokens=128) for t in halves),
        nano_ops=tuple(nano_ops),
    )


def case_of(schedule, model):
    from nanoflow_tune.runtime.verify import device_case

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return device_case(model, schedule, 1, sms, 300.0, 100.5)


def resources_of(model):
    """What `verify_schedule` makes its resources with."""
    from nanoflow_tune.runtime.device import device_resources
    from nanoflow_tune.runtime.op_graph import OpGraph
    from nanoflow_tune.search_spaces.loader import load_hardware

    graph, hardware = OpGraph.build(model), load_hardware("h200")
    return lambda ctx, schedules: device_resources(ctx, graph, hardware, schedules)


@pytest.fixture
def context():
    from nanoflow_tune.runtime.launch import RankContext

    return RankContext(0, 1, "cuda:0")


@pytest.mark.parametrize("gemm", ["cublas", "triton_128x256", "triton_128x128", "triton_64x256"])
def test_an_overlapped_plan_equals_the_unsplit_run(context, gemm):
    from nanoflow_tune.runtime.op_graph import OpGraph
    from nanoflow_tune.runtime.verify import verify_schedule

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    model = small_model()
    schedule = overlapped(OpGraph.build(model), sms, gemm)
    record = verify_schedule(context, case_of(schedule, model), resources_of(model))
    assert record.passed
    assert record.max_relative_error <= record.tolerance
    assert 0 < record.max_reference_error <= record.tolerance


def test_an_overlapped_plan_with_experts_equals_the_unsplit_run(context):
    """Rows that are nearly routed elsewhere are left out; replays may route differently."""
    from nanoflow_tune.runtime.op_graph import OpGraph
    from nanoflow_tune.runtime.verify import verify_schedule

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    model = small_model("mixtral-8x7b")
    schedule = overlapped(OpGraph.build(model), sms)
    record = verify_schedule(context, case_of(schedule, model), resources_of(model))
    assert record.passed
    assert record.max_relative_error <= record.tolerance


def test_a_kernel_that_writes_outside_its_rows_is_caught(context):
    from nanoflow_tune.runtime.kernels import registry
    from nanoflow_tune.runtime.op_graph import OpGraph
    from nanoflow_tune.runtime.verify import VerificationError, verify_schedule

    @registry.register("gemm_silu", "one_row_too_many", "cuda")
    def broken(x_TK, weight_2FK, scratch_T2F, out_TF, num_sms):
        good = registry.kernel("gemm_silu", "triton_128x256", "cuda")
        good(x_TK, weight_2FK, scratch_T2F, out_TF, num_sms)
        torch.as_strided(out_TF, (out_TF.shape[0] + 1, out_TF.shape[1]), out_TF.stride())[-1] = 0

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    model = small_model()
    schedule = overlapped(OpGraph.build(model), sms)
    schedule = replace(
        schedule,
        nano_ops=tuple(
            replace(op, variant="one_row_too_many") if op.op == "up_gate" else op
            for op in schedule.nano_ops
        ),
    )
    with pytest.raises(VerificationError, match="up_gate"):
        verify_schedule(context, case_of(schedule, model), resources_of(model))
