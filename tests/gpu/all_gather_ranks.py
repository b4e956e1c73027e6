"""What the all-gather tests of test_collectives.py run on their ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from collective_ranks import SMS, group_of, partials

from nanoflow_tune.runtime.kernels import registry
from nanoflow_tune.runtime.kernels.gather_buffer import output_rows
from nanoflow_tune.runtime.launch import RankContext

WIDTH = 256
"""Columns of one rank."""
ROWS = 1024


def output(ctx: RankContext, group, width: int = WIDTH, rows: int = ROWS) -> torch.Tensor:
    """Rows of the gather buffer, poisoned on all ranks before any may write."""
    device = torch.device(ctx.device)
    out = output_rows(group, rows, ctx.world_size * width, torch.bfloat16, device)
    out.fill_(float("nan"))
    torch.cuda.synchronize()
    dist.barrier()
    return out


def gathered_group(ctx: RankContext, variant: str):
    """The variant's name and the lane's groups; `+copies` signals by copies."""
    name, group = group_of(ctx, variant)
    if "+" in variant:
        from nanoflow_tune.runtime.kernels.gather_buffer import GatherBuffers

        group["gathered"] = ctx.state.setdefault("gathered_copies", GatherBuffers("copy"))
    return name, group


def odd_rows_in_a_row(ctx: RankContext, variant: str) -> None:
    """Many sizes and places without waiting between them; rows around stay as they were."""
    name, group = gathered_group(ctx, variant)
    kernel = registry.kernel("all_gather", name, "cuda")
    calls = [(0, 1), (3, 7), (0, 129), (0, 1024), (895, 129), (1023, 1)] * 4
    inputs = [partials(ctx, rows, turn, WIDTH) for turn, (_, rows) in enumerate(calls)]
    out = output(ctx, group)
    kept = []
    for (first_row, rows), parts in zip(calls, inputs, strict=True):
        kernel(parts[ctx.rank], out[first_row : first_row + rows], group, SMS, first_row)
        kept.append(out[first_row : first_row + rows].clone())
    torch.cuda.synchronize()
    for result, parts in zip(kept, inputs, strict=True):
        assert torch.equal(result, torch.cat(parts, dim=1)), f"{variant}: {len(result)} rows"
    out = output(ctx, group)
    kernel(inputs[1][ctx.rank], out[3:10], group, SMS, 3)
    torch.cuda.synchronize()
    assert bool(out[:3].isnan().all() and out[10:].isnan().all()), f"{variant}: other rows written"


def columns_in_place(ctx: RankContext, variant: str) -> None:
    """x is this rank's own columns of the output, or rows apart from each other elsewhere."""
    name, group = gathered_group(ctx, variant)
    kernel = registry.kernel("all_gather", name, "cuda")
    parts = partials(ctx, 129, 5, 4096)
    out = output(ctx, group, 4096, 129)
    own = out[:, ctx.rank * 4096 : (ctx.rank + 1) * 4096]
    own.copy_(parts[ctx.rank])
    kernel(own, out, group, 8)
    torch.cuda.synchronize()
    assert torch.equal(out, torch.cat(parts, dim=1)), variant
    apart = torch.empty(129, 3 * 4096, device=ctx.device, dtype=torch.bfloat16)[:, 4096:8192]
    apart.copy_(parts[ctx.rank])
    out = output(ctx, group, 4096, 129)
    kernel(apart, out, group, 8)
    torch.cuda.synchronize()
    assert torch.equal(out, torch.cat(parts, dim=1)), variant


def gather_replays(ctx: RankContext, variant: str, count: int = 50) -> None:
    """Two nano-batches in one graph, replayed on input that changes; the result is read at once."""
    name, group = gathered_group(ctx, variant)
    kernel = registry.kernel("all_gather", name, "cuda")
    source = torch.zeros(129, WIDTH, device=ctx.device, dtype=torch.bfloat16)
    out = output(ctx, group)[:129]

    def run():
        kernel(source[:100], out[:100], group, 16, 0)
        kernel(source[100:], out[100:], group, 16, 100)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    inputs = [partials(ctx, 129, seed, WIDTH) for seed in range(count)]
    kept = []
    for parts in inputs:  # no waiting between replays
        source.copy_(parts[ctx.rank])
        graph.replay()
        kept.append(out.clone())
    torch.cuda.synchronize()
    for result, parts in zip(kept, inputs, strict=True):
        assert torch.equal(result, torch.cat(parts, dim=1)), variant


def gather_beside_a_gemm(ctx: RankContext, variant: str) -> None:
    """All-gathers on one stream while GEMMs fill the GPU on another."""
    name, group = gathered_group(ctx, variant)
    kernel = registry.kernel("all_gather", name, "cuda")
    a = torch.randn(4096, 4096, device=ctx.device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    inputs = [partials(ctx, 512, seed, WIDTH) for seed in range(20)]
    out = output(ctx, group)[:512]
    kernel(inputs[0][ctx.rank], out, group, 16)
    torch.cuda.synchronize()
    compute, network = torch.cuda.Stream(), torch.cuda.Stream()
    kept = []
    for parts in inputs:
        with torch.cuda.stream(compute):
            torch.mm(a, a, out=product)
        with torch.cuda.stream(network):
            kernel(parts[ctx.rank], out, group, 16)
            kept.append(out.clone())
    torch.cuda.synchronize()
    for result, parts in zip(kept, inputs, strict=True):
        assert torch.equal(result, torch.cat(parts, dim=1)), variant


def gather_into_ordinary_memory(ctx: RankContext, variant: str) -> None:
    name, group = gathered_group(ctx, variant)
    x = torch.zeros(4, WIDTH, device=ctx.device, dtype=torch.bfloat16)
    out = torch.empty(4, WIDTH * ctx.world_size, device=ctx.device, dtype=torch.bfloat16)
    registry.kernel("all_gather", name, "cuda")(x, out, group, 16)
    torch.cuda.synchronize()
