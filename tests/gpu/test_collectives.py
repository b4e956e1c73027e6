"""Collectives on two GPUs: against references, odd sizes, CUDA graphs, beside GEMMs, in plans.

python -m pytest tests/gpu/test_collectives.py -q
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

sys.path.insert(0, str(Path(__file__).parent))  # spawned ranks import the same module

NCCL = ("nccl", "nccl_8")
SYMMETRIC = tuple(f"symm_{name}_{n}" for name in ("one_shot", "two_shot") for n in (8, 16, 32))
COPIES = ("copy_engine", "copy_engine_add", "copy_engine+copies")
VARIANTS = (*NCCL, *SYMMETRIC, *COPIES)
PUSHING = ("symm_8", "symm_16", "symm_32", "copy_engine", "copy_engine+copies")
GATHERS = ("nccl", "nccl_8", "nccl_16", *PUSHING)


class Ranks:
    """Two ranks that are started anew after a failure: a hang or a CUDA error spoils them."""

    def __init__(self):
        self.group = None

    def call(self, function, *arguments):
        from nanoflow_tune.runtime.launch import RankGroup

        if self.group is None:
            self.group = RankGroup(2, device="cuda", timeout_s=180.0).__enter__()
        try:
            return self.group.call(function, *arguments)
        except BaseException:
            self.close()
            raise

    def close(self):
        if self.group is not None:
            self.group.close()
        self.group = None


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def on_rank():
    import collective_ranks

    return collective_ranks


@pytest.fixture(scope="module")
def gather_on_rank():
    import all_gather_ranks

    return all_gather_ranks


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_odd_sizes_in_a_row_are_right_and_equal_on_all_ranks(ranks, on_rank, variant):
    first, second = ranks.call(on_rank.odd_sizes_in_a_row, variant)
    assert first == second


@pytest.mark.parametrize("rows", [1, 2, 129, 1024])
def test_norms_of_shards_give_the_bits_of_a_norm_of_all_rows(ranks, on_rank, rows):
    ranks.call(on_rank.sharded_norms, rows)


@pytest.mark.parametrize("variant", ["symm_one_shot_16", "symm_two_shot_16", "copy_engine_add"])
def test_buffers_grow_with_the_rows(ranks, on_rank, variant):
    ranks.call(on_rank.large_rows, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_replays_on_input_that_changes(ranks, on_rank, variant):
    ranks.call(on_rank.graph_replays, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_all_reduce_runs_beside_gemms(ranks, on_rank, variant):
    ranks.call(on_rank.beside_a_gemm, variant)


@pytest.mark.parametrize(
    ("variant", "share"),
    [
        ("nccl_8", 16),
        ("symm_one_shot_8", 16),
        ("symm_two_shot_16", 16),
        ("copy_engine_add", 16),
        ("copy_engine", 16),
        ("copy_engine", 0),
    ],
)
def test_a_plan_equals_the_sequential_run_and_writes_its_rows_only(ranks, on_rank, variant, share):
    ranks.call(on_rank.verify_plan_with, variant, share)


@pytest.mark.parametrize(
    ("gather", "reduce", "share", "gathers"),
    [
        ("nccl_8", "nccl_8", 16, (0, 1)),
        ("symm_8", "symm_one_shot_8", 16, (0, 1)),
        ("symm_8", "copy_engine", 16, (1,)),
        ("copy_engine", "copy_engine", 0, (0, 1)),
        ("copy_engine", "copy_engine", 0, (0,)),
    ],
)
def test_plans_that_gather_equal_the_sequential_run_and_write_their_rows_only(
    ranks, on_rank, gather, reduce, share, gathers
):
    ranks.call(on_rank.verify_gathers_with, gather, reduce, share, gathers)


def test_a_norm_over_summed_and_unsummed_rows_is_refused(ranks, on_rank):
    with pytest.raises(ValueError, match="must come from attn_all_reduce by one of"):
        ranks.call(on_rank.norm_over_mixed_variants)


@pytest.mark.parametrize("variant", GATHERS)
def test_gathers_of_odd_sizes_in_a_row_give_all_columns(ranks, gather_on_rank, variant):
    ranks.call(gather_on_rank.odd_rows_in_a_row, variant)


@pytest.mark.parametrize("variant", GATHERS)
def test_columns_may_be_in_place_or_apart(ranks, gather_on_rank, variant):
    ranks.call(gather_on_rank.columns_in_place, variant)


@pytest.mark.parametrize("variant", GATHERS)
def test_a_graph_of_gathers_replays_on_input_that_changes(ranks, gather_on_rank, variant):
    ranks.call(gather_on_rank.gather_replays, variant)


@pytest.mark.parametrize("variant", GATHERS)
def test_an_all_gather_runs_beside_gemms(ranks, gather_on_rank, variant):
    ranks.call(gather_on_rank.gather_beside_a_gemm, variant)


@pytest.mark.parametrize("variant", PUSHING)
def test_an_output_that_peers_cannot_write_is_refused(ranks, gather_on_rank, variant):
    with pytest.raises(ValueError, match="output_rows"):
        ranks.call(gather_on_rank.gather_into_ordinary_memory, variant)
