"""Tiles of the Hopper GEMM, and which of them fills a share of the SMs best. No torch, no GPU.

A persistent kernel loses what its last wave leaves idle: 256 tiles on 132 SMs are two full waves,
on 124 three. wgmma takes any width that is a multiple of 8, so the width of the tile is fitted to
(rows, columns, SMs) until the last wave is nearly full. That keeps all CTAs at the same place along
K, so that they share what they load through L2; dividing K (stream-K) does not, and pays only where
there are fewer tiles than SMs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

BLOCK_K = 64
STORE_COLUMNS = 64
STORE_ROWS = 64
CONSUMERS = 2
_WIDTHS = range(32, 257, 8)
_MAX_ACCUMULATORS = 176
"""fp32 sums a thread can hold beside everything else."""
_MAX_SHARED_BYTES = 227 << 10
_MAX_STAGES = 8
_STORE_BYTES = CONSUMERS * 2 * STORE_ROWS * STORE_COLUMNS * 2
_BARRIER_BYTES = 1024 + 256
"""Alignment of the ring, barriers."""
_MIN_SPLIT_STEPS = 8
"""A cluster that takes part in a split gets at least this many k-steps."""

# Clocks, for comparing tiles of one call with each other: tensor cores do 2048 bf16 multiply-adds a
# clock and SM, the L2 port gives 64 bytes (datasheet); the rest is fitted to sweeps of the width
# (results/LOG.md).
_MULTIPLY_ADDS_PER_CLOCK = 2048
_PORT_BYTES_PER_CLOCK = 64
_STEP_CLOCKS = 150
"""What a k-step costs beside its multiplications: narrow tiles pay it more often."""
_TILE_CLOCKS = 1500
_PARTIAL_BYTES_PER_CLOCK = 24
"""Writing a partial sum and reading it back, all SMs at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTile:
    """Output tile of a CTA and how CTAs share work."""

    rows: int
    columns: int
    cluster: int = 1
    """CTAs along the rows that share their loads of weights."""
    is_split: bool = False
    """Divide the last waves along K."""
    is_pingpong: bool = False
    """The consumers take whole tiles in turn: one multiplies while the other stores."""

    @property
    def num_stages(self) -> int:
        """Stages of the ring: as many as shared memory holds beside the output."""
        room = _MAX_SHARED_BYTES - _STORE_BYTES - _BARRIER_BYTES
        return min(_MAX_STAGES, room // self._stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.num_stages * self._stage_bytes + _STORE_BYTES + _BARRIER_BYTES

    @property
    def _stage_bytes(self) -> int:
        return (self.rows + self.columns) * BLOCK_K * 2

    @property
    def accumulators(self) -> int:
        """fp32 sums of one thread."""
        return self.rows * self.columns // (128 if self.is_pingpong else CONSUMERS * 128)

    @property
    def store_clocks(self) -> float:
        """What a tile costs beside its k-steps."""
        return 0.0 if self.is_pingpong else _TILE_CLOCKS

    @property
    def step_clocks(self) -> float:
        """Clocks of one k-step, to compare with those of other tiles."""
        multiplied = self.rows * self.columns * BLOCK_K / _MULTIPLY_ADDS_PER_CLOCK
        loaded = (self.rows + self.columns / self.cluster) * BLOCK_K * 2 / _PORT_BYTES_PER_CLOCK
        return max(multiplied, loaded) + _STEP_CLOCKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the tiles of one GEMM are dealt out over a share; a cluster's tile is `cluster` tiles."""

    clusters: int
    tiles_m: int
    tiles: int
    steps: int
    """k-steps of a tile."""
    whole_tiles: int
    """Dealt out one by one, in whole waves when the rest is split."""

    @classmethod
    def of(cls, tile: GemmTile, rows: int, columns: int, depth: int, num_sms: int) -> Division:
        """Divide an output of `rows` x `columns` (for SiLU: up and gate counted together)."""
        tiles_m = -(-rows // (tile.rows * tile.cluster))
        tiles = tiles_m * -(-columns // tile.columns)
        steps = -(-depth // BLOCK_K)
        clusters = max(1, num_sms // tile.cluster)
        if not tile.is_split or tiles % clusters == 0:
            clusters, whole = min(clusters, tiles), tiles
        else:
            whole = max(0, tiles // clusters - 1) * clusters
            if whole == 0:
                clusters = max(1, min(clusters, tiles * steps // _MIN_SPLIT_STEPS))
        return cls(clusters=clusters, tiles_m=tiles_m, tiles=tiles, steps=steps, whole_tiles=whole)

    @property
    def split_units(self) -> int:
        """k-steps that are divided evenly over the clusters."""
        return (self.tiles - self.whole_tiles) * self.steps

    def clocks(self, tile: GemmTile) -> float:
        """Clocks of the busiest cluster, by the constants above."""
        waves = -(-self.whole_tiles // self.clusters)
        clocks = waves * (self.steps * tile.step_clocks + tile.store_clocks)
        if self.split_units:
            steps = -(-self.split_units // self.clusters)
            partial_bytes = tile.rows * tile.columns * 4
            clocks += steps * tile.step_clocks + 2 * _TILE_CLOCKS
            clocks += partial_bytes / _PARTIAL_BYTES_PER_CLOCK
        return clocks


@functools.lru_cache(maxsize=4096)
def fitted_tile(
    rows: int,
    columns: int,
    depth: int,
    num_sms: int,
    *,
    tile_rows: int = 128,
    cluster: int = 1,
    is_split: bool = False,
    is_pingpong: bool = False,
    has_silu: bool = False,
) -> GemmTile:
    """The tile of this height whose width takes the fewest clocks; of equal ones the widest.

    Weights that come in two loads (up and gate, or one for each CTA of a pair) need halves of whole
    blocks of eight rows.
    """
    step = 16 if has_silu or cluster > 1 else 8
    tiles = (
        GemmTile(
            rows=tile_rows,
            columns=width,
            cluster=cluster,
            is_split=is_split,
            is_pingpong=is_pingpong,
        )
        for width in reversed(_WIDTHS)
        if width % step == 0
    )
    return min(
        (tile for tile in tiles if tile.accumulators <= _MAX_ACCUMULATORS),
        key=lambda tile: Division.of(tile, rows, columns, depth, num_sms).clocks(tile),
    )
