"""Persistent bf16 GEMM that splits its last wave along K, so that no share ends on idle SMs.

Whole waves of output tiles run as in `triton_gemm.py`. The tiles left over, fewer than the share
has SMs, are flattened into k-steps and dealt out in equal contiguous ranges, one a program
(stream-K over the last wave). A program stores a tile that it owns whole; of others it writes its
partial sum in fp32 to a workspace, and a second kernel adds the few partials of each such tile in
a fixed order: the same bits in every run. They differ from the bits of another share, since the
cuts move with it.

A range is never longer than a tile, so a program has at most two partials: slot 2p for the first,
2p + 1 for one that begins the next tile. The workspace is allocated per call, as in
`triton_decode_split.py` and for its reasons: the allocator keeps it to the stream, and a CUDA graph
to the graph's pool. A depth that is no multiple of the tile's is filled with zeros by TMA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .registry import register
from .triton_gemm import Tile

TILES = (Tile(128, 256, 64, 3, 8), Tile(128, 128, 64, 4, 4))
_GROUP_M = 8
_MIN_STEPS = 4
"""A program that takes part in the split gets at least this many k-steps."""
_FIXUP_ROWS = 4
"""Rows of a tile that one program of the fix-up adds."""
_ADDED_AT_ONCE = 4
"""Partials whose loads are in flight together in the fix-up."""
_TMA_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the tiles of one GEMM are dealt out to the programs of a share."""

    programs: int
    """Grid: the share, or less when there is less work."""
    whole_tiles: int
    """The first tiles, in whole waves."""
    split_tiles: int
    """The last tiles, divided along K."""
    split_programs: int
    """Programs that divide them."""

    @classmethod
    def of(cls, tiles: int, steps: int, num_sms: int) -> Division:
        """Divide `tiles` of `steps` k-steps each over `num_sms` programs."""
        split_tiles = tiles % num_sms
        split_programs = max(split_tiles, min(num_sms, split_tiles * steps // _MIN_STEPS))
        whole_tiles = tiles - split_tiles
        return cls(
            programs=num_sms if whole_tiles else split_programs,
            whole_tiles=whole_tiles,
            split_tiles=split_tiles,
            split_programs=split_programs,
        )

    @property
    def is_split(self) -> bool:
        """Whether any tile has more than one program."""
        return self.split_programs > self.split_tiles


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):  # noqa: ANN001, ANN202
    """Row and column of a tile: rows of a group first, so that they share weights in L2."""
    group_size = GROUP_M * tiles_n
    first_m = (tile // group_size) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    return first_m + (tile % group_size) % rows, (tile % group_size) // rows


@triton.jit(do_not_specialize=["whole_tiles", "split_units", "split_programs"])
def _stream_k_gemm(  # noqa: ANN202
    x_desc,  # noqa: ANN001
    weight_desc,  # noqa: ANN001
    out_desc,  # noqa: ANN001
    bias_ptr,  # noqa: ANN001
    partials_ptr,  # noqa: ANN001
    M,  # noqa: ANN001
    N,  # noqa: ANN001
    K,  # noqa: ANN001
    whole_tiles,  # noqa: ANN001
    split_units,  # noqa: ANN001
    split_programs,  # noqa: ANN001
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Whole tiles p, p + P, ...; then program p's range of the split tiles' k-steps."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(program, whole_tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps_k):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            weight = weight_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
            accumulator = tl.dot(x, weight.T, accumulator)
        if HAS_BIAS:
            columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
            accumulator += bias[None, :].to(tl.float32)
        out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], accumulator.to(out_desc.dtype))

    # Programs beyond split_programs get an empty range: both ends clamp to split_units.
    first_unit = min(program, split_programs) * split_units // split_programs
    end_unit = min(program + 1, split_programs) * split_units // split_programs
    first_tile = first_unit // steps_k
    for piece in range(tl.cdiv(end_unit, steps_k) - first_tile):
        tile = first_tile + piece
        first_step = max(first_unit - tile * steps_k, 0)
        end_step = min(end_unit - tile * steps_k, steps_k)
        tile_m, tile_n = _place(whole_tiles + tile, tiles_m, tiles_n, GROUP_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(first_step, end_step):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            weight = weight_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
            accumulator = tl.dot(x, weight.T, accumulator)
        if end_step - first_step == steps_k:
            if HAS_BIAS:
                columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
                bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
                accumulator += bias[None, :].to(tl.float32)
            out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], accumulator.to(out_desc.dtype))
        else:
            slot = partials_ptr + (2 * program + piece).to(tl.int64) * (BLOCK_M * BLOCK_N)
            rows = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N
            tl.store(slot + rows + tl.arange(0, BLOCK_N)[None, :], accumulator)


@triton.jit(do_not_specialize=["whole_tiles", "split_units", "split_programs"])
def _add_partials(  # noqa: ANN202
    partials_ptr,  # noqa: ANN001
    bias_ptr,  # noqa: ANN001
    out_ptr,  # noqa: ANN001
    stride_out,  # noqa: ANN001
    M,  # noqa: ANN001
    N,  # noqa: ANN001
    steps_k,  # noqa: ANN001
    whole_tiles,  # noqa: ANN001
    split_units,  # noqa: ANN001
    split_programs,  # noqa: ANN001
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program a (split tile, block of its rows); a few partials at once, in a fixed order."""
    tile = tl.program_id(0)
    # The program of unit u is the last p with p * split_units // split_programs <= u.
    first = ((tile * steps_k + 1) * split_programs - 1) // split_units
    last = ((tile + 1) * steps_k * split_programs - 1) // split_units
    if first < last:
        tile_m, tile_n = _place(
            whole_tiles + tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M
        )
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_N)
        cells = rows[:, None] * BLOCK_N + columns[None, :]
        accumulator = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
        for start in range(first, last + 1, AT_ONCE):
            program = start + tl.arange(0, AT_ONCE)
            first_tile = (program * split_units // split_programs) // steps_k
            slots = (2 * program + tile - first_tile).to(tl.int64) * (BLOCK_M * BLOCK_N)
            parts = tl.load(
                partials_ptr + slots[:, None, None] + cells[None, :, :],
                mask=(program <= last)[:, None, None],
                other=0.0,
            )
            accumulator += tl.sum(parts, axis=0)
        out_rows = (tile_m * BLOCK_M + rows).to(tl.int64)
        out_columns = tile_n * BLOCK_N + columns
        if HAS_BIAS:
            bias = tl.load(bias_ptr + out_columns, mask=out_columns < N, other=0.0)
            accumulator += bias[None, :].to(tl.float32)
        tl.store(
            out_ptr + out_rows[:, None] * stride_out + out_columns[None, :],
            accumulator.to(out_ptr.dtype.element_ty),
            mask=(out_rows < M)[:, None] & (out_columns < N)[None, :],
        )


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    if tensor.stride(0) * tensor.element_size() % _TMA_BYTES:
        raise ValueError(
            f"TMA needs rows that start at multiples of {_TMA_BYTES} bytes, got a row stride of "
            f"{tensor.stride(0)} elements of {tensor.element_size()} bytes"
        )
    return TensorDescriptor.from_tensor(tensor, [block_rows, block_columns])


def _variant(tile: Tile) -> Callable[..., None]:
    def gemm(
        x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, num_sms: int
    ) -> None:
        rows, depth = x_TK.shape
        width = weight_NK.shape[0]
        tiles = triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n)
        if tiles == 0:
            return
        steps = triton.cdiv(depth, tile.k)
        division = Division.of(tiles, steps, num_sms)
        bias = x_TK if bias_N is None else bias_N
        partials = out_TN
        if division.is_split:
            slots = 2 * division.split_programs
            partials = out_TN.new_empty(slots, tile.m, tile.n, dtype=torch.float32)
        _stream_k_gemm[(division.programs,)](
            _descriptor(x_TK, tile.m, tile.k),
            _descriptor(weight_NK, tile.n, tile.k),
            _descriptor(out_TN, tile.m, tile.n),
            bias,
            partials,
            rows,
            width,
            depth,
            division.whole_tiles,
            division.split_tiles * steps,
            max(1, division.split_programs),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            GROUP_M=_GROUP_M,
            HAS_BIAS=bias_N is not None,
            num_stages=tile.num_stages,
            num_warps=tile.num_warps,
        )
        if division.is_split:
            _add_partials[(division.split_tiles, tile.m // _FIXUP_ROWS)](
                partials,
                bias,
                out_TN,
                out_TN.stride(0),
                rows,
                width,
                steps,
                division.whole_tiles,
                division.split_tiles * steps,
                division.split_programs,
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                GROUP_M=_GROUP_M,
                ROWS=_FIXUP_ROWS,
                AT_ONCE=_ADDED_AT_ONCE,
                HAS_BIAS=bias_N is not None,
                num_warps=4,
            )

    return gemm


VARIANTS = {f"triton_splitk_{tile.m}x{tile.n}": tile for tile in TILES}
for _name, _tile in VARIANTS.items():
    register("gemm", _name, "cuda")(_variant(_tile))
