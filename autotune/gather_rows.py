"""`all_gather` rows for profiles that were measured before plans had any.

An all-gather sends each row once, a ring's all-reduce twice, to the same peers over the same links;
copy engines send whole rows for an all-reduce and 1 / N of each for an all-gather. So a measured
all-reduce of t rows stands for an all-gather of so many rows that as many bytes are sent: 2 t of
NCCL, N t of copy engines. NCCL gathers by rank, and what lays the columns out is a second pass over
the result; its time on the share is added from the datasheet. All such rows are tagged
`interpolated`, and are without joules: nobody timed an all-gather.
"""

from __future__ import annotations

from dataclasses import replace

from ..profiler.profile import Profile, Row
from ..runtime.op_shapes import shape_numbers
from ..runtime.plan import SM_FREE_VARIANTS
from ..search_spaces.schema import DTYPE_BYTES, Dtype, HardwareSpec
from .roofline import memory_share

_STANDING = ("nccl", "nccl_8", "nccl_16", *SM_FREE_VARIANTS)
"""Variants that both collectives have under one name and do in one way."""


def with_gather_rows(profile: Profile, hardware: HardwareSpec, dtype: Dtype) -> Profile:
    """The profile with all-gathers made from its all-reduces, where it has measured none."""
    rows = profile.usable_rows
    if any(row.point.kind == "all_gather" for row in rows):
        return profile
    made = [
        _gather(row, hardware, DTYPE_BYTES[dtype])
        for row in rows
        if row.point.kind == "all_reduce" and row.point.variant in _STANDING
    ]
    return replace(profile, rows=(*profile.rows, *made))


def _gather(row: Row, hardware: HardwareSpec, element_bytes: int) -> Row:
    """The all-gather that sends as many bytes as a measured all-reduce."""
    point = row.point
    width, ranks = shape_numbers(point.shape)
    is_copied = point.variant in SM_FREE_VARIANTS
    tokens = point.tokens * (ranks if is_copied else 2)
    layout_us = 0.0
    if not is_copied:
        bandwidth = hardware.memory_bytes_per_s * memory_share(point.num_sms, hardware)
        layout_us = 1e6 * 2 * tokens * width * element_bytes / bandwidth
    return replace(
        row,
        point=replace(point, kind="all_gather", tokens=tokens),
        median_us=row.median_us + layout_us,
        p10_us=row.p10_us + layout_us,
        p90_us=row.p90_us + layout_us,
        joules=0.0,
        joules_source="missing",
        source="interpolated",
    )
