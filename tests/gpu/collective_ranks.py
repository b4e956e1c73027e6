"""What test_collectives.py runs on its ranks; spawned processes import it by name."""

from __future__ import annotations

from dataclasses import replace

import torch

from nanoflow_tune.runtime.device import device_resources, lane_groups
from nanoflow_tune.runtime.kernels import load, registry
from nanoflow_tune.runtime.launch import RankContext
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.runtime.verify import device_case, verify_schedule
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

SMS = 132
WIDTH = 256


def partials(ctx: RankContext, rows: int, seed: int, width: int = WIDTH) -> list[torch.Tensor]:
    """Every rank's rows; all ranks can make all of them."""
    made = []
    for rank in range(ctx.world_size):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        made.append(torch.randn(rows, width, generator=generator).bfloat16().to(ctx.device))
    return made


def sum_in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.bfloat16()


def group_of(ctx: RankContext, variant: str):
    """The variant's name and the group of the network lane; `+copies` signals by copies."""
    load("cuda")
    groups = dict(lane_groups(ctx, ())["network"])
    name, _, signals = variant.partition("+")
    if signals:
        from nanoflow_tune.runtime.kernels.copy_engine import CopyEngine

        groups["copy_engine"] = ctx.state.setdefault("engine_copies", CopyEngine("copy"))
    return name, groups


def reduce_rows(variant: str, x: torch.Tensor, group, first_row: int = 0) -> torch.Tensor:
    """The sum over ranks of x by a variant, by the norm where the variant leaves it to that."""
    kernel = registry.kernel("all_reduce", variant, "cuda")
    kernel(x, group, SMS, first_row)
    if variant not in registry.LEAVES_SUM:
        return x
    from nanoflow_tune.runtime.kernels.copy_engine import inbox_of

    end = first_row + x.shape[0]
    received = inbox_of(group, end, x.shape[1], x.dtype).received(first_row, end)
    residual, out = torch.zeros_like(x), torch.empty_like(x)
    weight = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
    registry.kernel("norm", "triton", "cuda")(residual, x, weight, out, 1e-5, SMS, received)
    return residual


def check(variant: str, result: torch.Tensor, parts: list[torch.Tensor]) -> None:
    reference = torch.stack([part.double() for part in parts]).sum(0)
    error = (result.double() - reference).norm() / reference.norm()
    assert error < 4e-3, f"{variant}: relative error {float(error)} on {tuple(result.shape)}"
    if not variant.startswith("nccl"):
        assert torch.equal(result, sum_in_order(parts)), f"{variant}: not the sum in rank order"


def odd_sizes_in_a_row(ctx: RankContext, variant: str) -> list[bytes]:
    """Calls of many sizes without waiting between them; bits of all results."""
    name, group = group_of(ctx, variant)
    sizes = [(rows, turn) for turn in range(6) for rows in (1, 7, 129, 1024)]
    inputs = [partials(ctx, rows, 10 * turn + rows % 10) for rows, turn in sizes]
    mine = [parts[ctx.rank].clone() for parts in inputs]
    torch.cuda.synchronize()
    results = [reduce_rows(name, x, group).clone() for x in mine]
    torch.cuda.synchronize()
    for result, parts in zip(results, inputs, strict=True):
        check(name, result, parts)
    return [result.cpu().view(torch.int16).numpy().tobytes() for result in results]


def sharded_norms(ctx: RankContext, rows: int) -> None:
    """Scatter, norm of this rank's rows, gather: the bits of a norm of all rows, in a graph too."""
    from nanoflow_tune.runtime.kernels.row_signals import shard_of

    _, group = group_of(ctx, "copy_engine")
    norm = registry.kernel("norm", "triton", "cuda")
    width, first_row = 1024, 3
    inbox = group["copy_engine"].inbox(first_row + rows, width, torch.bfloat16)
    gathered = group["gathered"].buffer(first_row + rows, width, torch.bfloat16, "sharded")
    weight = torch.ones(width, device=ctx.device, dtype=torch.bfloat16)
    start, end = shard_of(rows, ctx.rank, ctx.world_size)
    source = torch.zeros(rows, width, device=ctx.device, dtype=torch.bfloat16)
    residual = torch.zeros_like(source)
    place = slice(first_row + start, first_row + end)

    def run() -> None:
        residual.zero_()
        inbox.scatter(source, first_row)
        if end > start:
            received = inbox.received(first_row + start, first_row + end)
            own = residual[start:end], source[start:end]
            norm(*own, weight, gathered.rows_TD[place], 1e-5, SMS, received)
        gathered.exchange_rows(first_row, rows)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    for turn in range(20):
        parts = partials(ctx, rows, turn, width)
        source.copy_(parts[ctx.rank])
        total, expected = sum_in_order(parts), torch.empty_like(source)
        whole = torch.zeros_like(source)
        norm(whole, total, weight, expected, 1e-5, SMS)
        if turn % 2:
            run()
        else:
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(gathered.rows_TD[first_row : first_row + rows], expected), turn
        assert torch.equal(residual[start:end], whole[start:end]), turn
        torch.distributed.barrier()


def large_rows(ctx: RankContext, variant: str) -> None:
    """16 MiB, then more rows than the first inbox and buffer hold."""
    name, group = group_of(ctx, variant)
    for rows in (1024, 5000):
        parts = partials(ctx, rows, rows, 8192)
        result = reduce_rows(name, parts[ctx.rank].clone(), group)
        check(name, result, parts)


def graph_replays(ctx: RankContext, variant: str, count: int = 50) -> None:
    """Two all-reduces of one graph, replayed on input that changes, both nano-batches' rows."""
    name, group = group_of(ctx, variant)
    source = torch.empty(129, WIDTH, device=ctx.device, dtype=torch.bfloat16)
    for part in (source[:100], source[100:]):
        reduce_rows(name, part.zero_().clone(), group, 100 if part.shape[0] == 29 else 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        first = reduce_rows(name, source[:100].clone(), group, 0)
        second = reduce_rows(name, source[100:].clone(), group, 100)
        result = torch.cat([first, second])
    for seed in range(count):
        parts = partials(ctx, 129, seed)
        source.copy_(parts[ctx.rank])
        graph.replay()
        torch.cuda.synchronize()
        check(name, result, parts)
    inputs = [partials(ctx, 129, 100 + seed) for seed in range(count)]
    kept = [torch.empty_like(result) for _ in inputs]
    for parts, keep in zip(inputs, kept, strict=True):  # no waiting between replays
        source.copy_(parts[ctx.rank])
        graph.replay()
        keep.copy_(result)
    torch.cuda.synchronize()
    for parts, keep in zip(inputs, kept, strict=True):
        check(name, keep, parts)


def beside_a_gemm(ctx: RankContext, variant: str) -> None:
    """All-reduces on one stream while GEMMs fill the GPU on another."""
    name, group = group_of(ctx, variant)
    a = torch.randn(4096, 4096, device=ctx.device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    inputs = [partials(ctx, 512, seed) for seed in range(20)]
    mine = [parts[ctx.rank].clone() for parts in inputs]
    reduce_rows(name, mine[0].clone(), group)
    torch.cuda.synchronize()
    compute, network = torch.cuda.Stream(), torch.cuda.Stream()
    results = []
    for x in mine:
        with torch.cuda.stream(compute):
            torch.mm(a, a, out=out)
        with torch.cuda.stream(network):
            results.append(reduce_rows(name, x, group))
    torch.cuda.synchronize()
    for result, parts in zip(results, inputs, strict=True):
        check(name, result, parts)


def small_model():
    return replace(
        load_model("llama3-8b"), hidden_size=1024, intermediate_size=2048, vocab_size=4096,
        num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2,
    )  # fmt: skip


def overlapped(
    variant: str, share: int, second: str = "", gather: str = "", gathers: tuple[int, ...] = ()
) -> Schedule:
    """Two nano-batches: collectives of one on a lane of their own beside the GEMMs of the other.

    The nano-batches in `gathers` join the attention's output by all-gathers of that variant.
    """
    graph = OpGraph.build(small_model(), 2)
    (chain,) = graph.alternatives
    first = graph.op_names.index("o_proj")
    nano_ops = []
    for op in (*graph.layer[:first], *chain.ops, *graph.layer[first:]):
        for index, tokens in enumerate(((0, 256), (256, 512))):
            if op.name in chain.replaces and index in gathers:
                continue
            if op in chain.ops and index not in gathers:
                continue
            is_network = op.resource == "network"
            kernel = "triton"
            if op.kind in ("gemm", "gemm_silu"):
                kernel = "triton_128x128"
            if op.kind == "all_reduce":
                kernel = second if second and index == 1 else variant
            if op.kind == "all_gather":
                kernel = gather
            nano_ops.append(
                NanoOp(
                    op=op.name,
                    tokens=tokens,
                    lane="network" if is_network else "compute",
                    num_sms=share if is_network else SMS - share,
                    variant=kernel,
                )
            )
    batches = tuple(NanoBatch(tokens=t, decode_tokens=128) for t in ((0, 256), (256, 512)))
    return Schedule(name="overlapped", nano_batches=batches, nano_ops=tuple(nano_ops))


def resources(ctx: RankContext, schedules):
    graph = OpGraph.build(small_model(), 2)
    return device_resources(ctx, graph, load_hardware("h200"), schedules)


def verify_plan_with(ctx: RankContext, variant: str, share: int) -> float:
    """Audit, random legal orders and a CUDA graph against the sequential run with NCCL."""
    case = device_case(small_model(), overlapped(variant, share), 2, SMS, 300.0, 100.5)
    record = verify_schedule(ctx, case, resources)
    assert record.passed
    return record.max_relative_error


def verify_gathers_with(
    ctx: RankContext, gather: str, reduce: str, share: int, gathers: tuple[int, ...]
) -> float:
    """The same of plans in which some nano-batches gather."""
    schedule = overlapped(reduce, share, gather=gather, gathers=gathers)
    case = device_case(small_model(), schedule, 2, SMS, 300.0, 100.5)
    record = verify_schedule(ctx, case, resources)
    assert record.passed
    return record.max_relative_error


def norm_over_mixed_variants(ctx: RankContext) -> None:
    """One norm over rows of which half were summed."""
    schedule = overlapped("copy_engine", 16, second="nccl")
    whole = [replace(op, tokens=(0, 512)) for op in schedule.nano_ops if op.op == "ffn_norm"][:1]
    others = [op for op in schedule.nano_ops if op.op != "ffn_norm"]
    place = max(i for i, op in enumerate(others) if op.op == "attn_all_reduce") + 1
    mixed = replace(schedule, nano_ops=(*others[:place], *whole, *others[place:]))
    case = device_case(small_model(), mixed, 2, SMS, 300.0, 100.5)
    verify_schedule(ctx, case, resources)
