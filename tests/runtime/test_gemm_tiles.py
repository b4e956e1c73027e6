"""The fitted tile fills the share, and the division covers every k-step of every tile once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.runtime.kernels.gemm_tiles import BLOCK_K, Division, GemmTile, fitted_tile

FORMS = (
    {"tile_rows": 128},
    {"tile_rows": 256},
    {"tile_rows": 128, "is_split": True},
    {"tile_rows": 128, "is_pingpong": True},
)
SHARES = (8, 16, 64, 68, 84, 100, 108, 116, 124, 132)


@given(
    rows=st.integers(1, 4096),
    columns=st.integers(8, 30000),
    depth=st.integers(1, 15000),
    num_sms=st.sampled_from(SHARES),
    form=st.sampled_from(FORMS),
    cluster=st.sampled_from((1, 2)),
    has_silu=st.booleans(),
)
def test_a_fitted_tile_can_be_compiled_and_covers_the_output(
    rows, columns, depth, num_sms, form, cluster, has_silu
):
    tile = fitted_tile(
        rows,
        columns,
        depth,
        num_sms,
        cluster=cluster,
        has_silu=has_silu,
        **form,
    )
    assert tile.columns % (16 if has_silu or cluster == 2 else 8) == 0
    assert tile.columns <= 256
    assert tile.num_stages >= 3
    assert tile.shared_bytes <= 232448
    division = Division.of(tile, rows, columns, depth, num_sms)
    tiles_n = division.tiles // division.tiles_m
    assert division.tiles == division.tiles_m * tiles_n
    assert division.tiles_m * tile.rows * cluster >= rows
    assert tiles_n * tile.columns >= columns
    assert division.steps * BLOCK_K >= depth
    assert 1 <= division.clusters * cluster <= max(num_sms, cluster)


@given(
    rows=st.integers(1, 2048),
    columns=st.integers(8, 8192),
    depth=st.integers(64, 8192),
    num_sms=st.sampled_from(SHARES),
)
def test_no_other_width_is_faster_by_the_same_clocks(rows, columns, depth, num_sms):
    chosen = fitted_tile(rows, columns, depth, num_sms)

    def clocks(tile):
        return Division.of(tile, rows, columns, depth, num_sms).clocks(tile)

    others = [GemmTile(rows=128, columns=width) for width in range(32, 257, 8)]
    assert clocks(chosen) == min(map(clocks, others))


@pytest.mark.parametrize("num_sms", SHARES)
@pytest.mark.parametrize("columns", [4096, 5120, 6144, 8192, 28672])
@pytest.mark.parametrize("rows", [512, 1024, 2048])
def test_waves_are_nearly_full_on_every_share_of_llama_shapes(rows, columns, num_sms):
    tile = fitted_tile(rows, columns, 4096, num_sms)
    division = Division.of(tile, rows, columns, 4096, num_sms)
    waves = -(-division.tiles // division.clusters)
    useful = rows * columns
    assert useful / (waves * num_sms * tile.rows * tile.columns) > 0.87


@given(
    tiles=st.integers(1, 300),
    depth=st.integers(1024, 15000),
    num_sms=st.sampled_from(SHARES),
)
def test_a_split_leaves_whole_waves_and_at_most_two_waves_to_divide(tiles, depth, num_sms):
    tile = GemmTile(rows=128, columns=256, is_split=True)
    division = Division.of(tile, 128, 256 * tiles, depth, num_sms)
    assert division.whole_tiles % division.clusters == 0 or division.split_units == 0
    assert division.whole_tiles + division.split_units // division.steps == tiles
    assert division.split_units < 2 * division.clusters * division.steps or tiles <= num_sms
