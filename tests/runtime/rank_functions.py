"""What the tests run on ranks; spawned processes import it by name."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from nanoflow_tune.runtime.kernels import registry, torch_ops
from nanoflow_tune.runtime.launch import RankContext
from nanoflow_tune.runtime.plan import Verification
from nanoflow_tune.runtime.verify import Case, VerificationError, verify_schedule


def count_calls(ctx: RankContext, add: int) -> tuple[int, int]:
    ctx.state["calls"] = ctx.state.get("calls", 0) + add
    return ctx.rank, ctx.state["calls"]


def sum_of_ranks(ctx: RankContext) -> float:
    x = torch.tensor([float(ctx.rank + 1)])
    dist.all_reduce(x)
    return float(x)


def rank_order_sum(ctx: RankContext, num_rows: int) -> list[bytes]:
    """Bits of an all-reduce done whole, and done in two parts."""
    x = torch.randn(num_rows, 7, generator=torch.Generator().manual_seed(ctx.rank))
    whole, parts = x.clone(), x.clone()
    group = dist.group.WORLD
    torch_ops.all_reduce_in_rank_order(whole, group, 0)
    torch_ops.all_reduce_in_rank_order(parts[:3], group, 0)
    torch_ops.all_reduce_in_rank_order(parts[3:], group, 0)
    return [whole.numpy().tobytes(), parts.numpy().tobytes()]


def gathered_columns(ctx: RankContext, num_rows: int, width: int) -> list[torch.Tensor]:
    """An all-gather done whole, done in two parts, and of a strided view; rows around it poisoned.

    Values tell rank, row and column.
    """
    rows_T1 = torch.arange(num_rows)[:, None] * 100.0
    columns_TW = ctx.rank * 10_000.0 + rows_T1 + torch.arange(width)
    group = dist.group.WORLD
    gather = registry.kernel("all_gather", "torch", "cpu")
    whole, parts, strided = (
        torch.full((num_rows + 2, width * ctx.world_size), float("nan")) for _ in range(3)
    )
    gather(columns_TW, whole[1:-1], group, 8)
    half = num_rows // 2
    gather(columns_TW[:half], parts[1 : 1 + half], group, 8)
    gather(columns_TW[half:], parts[1 + half : -1], group, 8, half)
    own = strided[1:-1, ctx.rank * width : (ctx.rank + 1) * width]
    own.copy_(columns_TW)
    gather(own, strided[1:-1], group, 8)
    return [whole, parts, strided]


def fail_on(ctx: RankContext, rank: int, kind: str) -> int:
    if ctx.rank == rank:
        errors = {"value": ValueError, "verification": VerificationError, "other": KeyError}
        raise errors[kind](f"planted on rank {ctx.rank}")
    return ctx.rank


def die_on(ctx: RankContext, rank: int) -> None:
    if ctx.rank == rank:
        os._exit(7)
    sum_of_ranks(ctx)


def kill_on(ctx: RankContext, rank: int) -> None:
    """SIGKILL in the middle of a run of collectives: the others are inside one."""
    for turn in range(1000):
        if ctx.rank == rank and turn == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        sum_of_ranks(ctx)


def run_out_on(ctx: RankContext, rank: int) -> None:
    """One rank finds no memory; the others wait for it in a collective."""
    if ctx.rank == rank:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    sum_of_ranks(ctx)


def stay_away_on(ctx: RankContext, rank: int) -> None:
    """One rank never comes to the collective; SIGTERM does not end it."""
    if ctx.rank == rank:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    sum_of_ranks(ctx)


def process_id(ctx: RankContext) -> int:
    return os.getpid()


def hang_on(ctx: RankContext, rank: int) -> None:
    if ctx.rank == rank:
        time.sleep(600)


def plant_fault(kind: str, fault: str, max_rows: int) -> None:
    """Replace a CPU kernel by one that misbehaves on calls of fewer than `max_rows` rows."""
    good = registry.kernel(kind, "torch", "cpu")

    def broken(*args: object) -> None:
        stale = args[2][-1].clone() if fault == "stale_scratch" else None
        good(*args)
        out = args[0] if kind == "all_reduce" else args[3]
        if out.shape[0] >= max_rows:
            return
        if fault == "extra_row":
            end = out.storage_offset() // out.stride(0) + out.shape[0]
            out._base[end] = 1.0
        elif fault == "double_last_row":
            out[-1] *= 2.0
        elif fault == "extra_scratch_row":
            end = args[2].storage_offset() // args[2].stride(0) + args[2].shape[0]
            args[2]._base[end] = 1.0
        elif fault == "stale_scratch":  # reads the scratch buffer before it writes it
            out[-1] = stale[: out.shape[1]]
        elif fault == "skip_row":
            out[-1] = float("nan")  # what a row that is never written still holds

    registry.register(kind, "torch", "cpu")(broken)


def verify_with_fault(
    ctx: RankContext, case: Case, kind: str, fault: str, max_rows: int
) -> Verification:
    plant_fault(kind, fault, max_rows)
    return verify_schedule(ctx, case)
