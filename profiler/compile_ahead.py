"""Compiles the fitted GEMMs of schedules or points at once, before a GPU waits for each of them.

Each share and number of rows has its own tile, so twenty schedules need a hundred kernels of a
third of a second each. The compiler lets go of Python's lock, so that threads share the cores.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..runtime.op_graph import DENSE_GEMM_KINDS, OpGraph
from ..runtime.op_shapes import shape_numbers
from ..runtime.plan import Schedule
from .profile import Point

if TYPE_CHECKING:
    from ..runtime.kernels.gemm_tiles import GemmTile


def fitted_tiles(schedules: Iterable[Schedule], graph: OpGraph) -> set[tuple[GemmTile, bool]]:
    """Tiles of all own GEMMs of some schedules, each with whether it has SiLU in its epilogue."""
    return point_tiles(
        Point(
            kind=graph.op(nano_op.op).kind,
            shape=graph.op(nano_op.op).shape,
            variant=nano_op.variant,
            tokens=nano_op.num_tokens,
            kv_len=0,
            num_sms=nano_op.num_sms,
        )
        for schedule in schedules
        for nano_op in schedule.nano_ops
    )


def point_tiles(points: Iterable[Point]) -> set[tuple[GemmTile, bool]]:
    """Tiles of the own GEMMs among some points, each with whether it has SiLU in its epilogue."""
    from ..runtime.kernels.gemm_tiles import fitted_tile
    from ..runtime.kernels.sm90_gemm import FAMILIES

    families = {family.name: family for family in FAMILIES}
    found: set[tuple[GemmTile, bool]] = set()
    for point in points:
        family = families.get(point.variant)
        if family is None or point.kind not in DENSE_GEMM_KINDS or not point.tokens:
            continue
        columns, depth = shape_numbers(point.shape)
        has_silu = point.kind == "gemm_silu"
        tile = fitted_tile(
            point.tokens,
            columns,
            depth,
            point.num_sms,
            tile_rows=family.rows,
            cluster=family.cluster,
            is_split=family.is_split,
            is_pingpong=family.is_pingpong,
            has_silu=has_silu,
        )
        found.add((tile, has_silu))
    return found


def compile_ahead(schedules: Iterable[Schedule], graph: OpGraph) -> int:
    """Compile the own GEMMs of some schedules; see `compile_tiles`."""
    return compile_tiles(fitted_tiles(schedules, graph))


def compile_tiles(tiles: Collection[tuple[GemmTile, bool]]) -> int:
    """Compile kernels side by side; they stay in this process and in the cache folder.

    Returns:
        How many there are.

    Raises:
        KernelError: one does not compile.
    """
    from ..runtime.kernels.sm90_gemm import compiled

    def compile_one(item: tuple[GemmTile, bool]) -> None:
        compiled(item[0], has_silu=item[1]).compile()

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, tiles))
    return len(tiles)
