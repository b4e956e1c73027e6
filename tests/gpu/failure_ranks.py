"""What the tests of failures run on ranks; spawned processes import it by name."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from nanoflow_tune.runtime.launch import RankContext


def process_id(ctx: RankContext) -> int:
    return os.getpid()


def sum_up(ctx: RankContext, turns: int) -> float:
    """All-reduces of 64 MiB, back to back."""
    x = torch.ones(32 << 20, dtype=torch.bfloat16, device=ctx.device)
    for _ in range(turns):
        dist.all_reduce(x)
        x.mul_(1.0 / ctx.world_size)
    torch.cuda.synchronize()
    return float(x[0])


def kill_inside_all_reduces(ctx: RankContext, rank: int) -> None:
    """One rank is killed while its queue, and that of the other one, is full of all-reduces."""
    sum_up(ctx, 3)
    x = torch.ones(32 << 20, dtype=torch.bfloat16, device=ctx.device)
    for turn in range(4000):
        dist.all_reduce(x)
        if ctx.rank == rank and turn == 200:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.cuda.synchronize()


def stay_away(ctx: RankContext, rank: int) -> None:
    """One rank never comes to the all-reduce that the other one waits for."""
    if ctx.rank == rank:
        time.sleep(600)
    sum_up(ctx, 1)


def run_out(ctx: RankContext, rank: int) -> None:
    """One rank really asks for more than there is, the other one waits in an all-reduce."""
    if ctx.rank == rank:
        torch.empty(1 << 40, dtype=torch.uint8, device=ctx.device)
    sum_up(ctx, 1)
