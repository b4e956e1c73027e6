"""What the collectives of a lane need, and all-reduce by NCCL: free or held to a number of CTAs.

The CTA limit is a property of the communicator, so each lane has one group per limit;
`make_groups` creates them. Called with `async_op=False` on the current stream, NCCL's kernel runs
on that stream's SM partition and is captured into CUDA graphs. Symmetric memory is allocated by the
first call that needs it, on all ranks at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .copy_engine import VARIANT as COPY_ENGINE
from .copy_engine import CopyEngine
from .gather_buffer import KEY as GATHERED
from .gather_buffer import GatherBuffers
from .registry import register
from .symmetric_all_reduce import SymmetricLane

CTA_LIMITS: dict[str, int | None] = {"nccl": None, "nccl_8": 8, "nccl_16": 16}
"""Variant name -> NCCL max_ctas; None leaves it to NCCL."""

Groups = Mapping[str, Any]
"""By variant the NCCL communicators; `symmetric` a lane's buffer, `copy_engine` the inboxes,
`gathered` the outputs of all-gathers."""


def make_groups(
    world_size: int, engine: CopyEngine | None = None, gathered: GatherBuffers | None = None
) -> dict[str, Any]:
    """What a lane's variants take as `group`; its NCCL communicators are warmed up.

    Create them before SM partitions.

    Args:
        world_size: ranks.
        engine: the inboxes, which all lanes of a rank share; by default new ones.
        gathered: the outputs of all-gathers, likewise.
    """
    groups: dict[str, Any] = {
        "symmetric": SymmetricLane(),
        COPY_ENGINE: engine or CopyEngine(),
        GATHERED: gathered or GatherBuffers(),
    }
    for name, limit in CTA_LIMITS.items():
        options = dist.ProcessGroupNCCL.Options()
        if limit is not None:
            options.config.max_ctas = limit
        groups[name] = dist.new_group(list(range(world_size)), backend="nccl", pg_options=options)
        dist.all_reduce(torch.ones(1, device="cuda"), group=groups[name])
    torch.cuda.synchronize()
    return groups


def _all_reduce(variant: str) -> None:
    @register("all_reduce", variant, "cuda")
    def kernel(x_TD: Tensor, group: Groups | None, num_sms: int, first_row: int = 0) -> None:
        if group is not None:
            dist.all_reduce(x_TD, group=group[variant])


for _variant in CTA_LIMITS:
    _all_reduce(_variant)
