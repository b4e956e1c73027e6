"""Decode attention for Hopper without a GPU: it compiles, divides its work right, and is right.

The kernel's own source runs on the CPU, with the instructions of `cuda_on_cpu/` in place of those
of the device; on a device it runs in tests/gpu/test_sm90_attention.py.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise, product
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from nanoflow_tune.runtime.kernels.cubin import KernelError  # noqa: E402
from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape  # noqa: E402
from nanoflow_tune.runtime.kernels.sm90_attention import (  # noqa: E402
    DECODE_TILE,
    decode_attention,
    decode_kernel,
    launch_decode,
)

CUDA_ON_CPU = Path(__file__).parent / "cuda_on_cpu"
CUDA_SOURCES = Path(__file__).parents[2] / "runtime" / "kernels" / "cuda"
REGISTERS_OF_AN_SM = 65536
SHARED_BYTES_OF_A_BLOCK = 227 << 10


@pytest.mark.parametrize("group", [1, 2, 4, 8, 9, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("change", [{}, {"is_evict_first": False}])
def test_every_variant_compiles_without_spills_and_fits_an_sm(head_dim, group, change):
    pytest.importorskip("cuda.bindings.nvrtc")
    tile = replace(DECODE_TILE, **change).fitted(head_dim, group)
    try:
        log = decode_kernel(tile, head_dim, group).compile().log
    except RuntimeError as err:
        if isinstance(err, KernelError):
            raise
        pytest.skip(f"no NVRTC library: {err}")
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    assert registers * 32 * tile.num_warps <= REGISTERS_OF_AN_SM
    assert tile.shared_bytes(head_dim) <= SHARED_BYTES_OF_A_BLOCK


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("head_dim", "group", "num_warps", "stages", "min_pages", "min_fragment"),
    [
        (128, 8, 2, 2, 2, 1),
        (128, 4, 12, 2, 8, 4),
        (64, 1, 3, 3, 1, 1),
        (64, 11, 2, 6, 4, 4),
    ],
)
def test_the_source_run_on_a_cpu_matches_float64_in_any_order_of_blocks(
    tmp_path, head_dim, group, num_warps, stages, min_pages, min_fragment
):
    macros = {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "WARPS": num_warps,
        "STAGES": stages,
        "MIN_PAGES": min_pages,
        "MIN_FRAGMENT": min_fragment,
        "EVICT_FIRST": 1,
    }
    sources = (CUDA_SOURCES / "decode_attention.cu", CUDA_ON_CPU / "decode_attention.cpp")
    program = tmp_path / "decode_attention"
    # From standard input, so that `#include` finds the stand-ins of `cuda_on_cpu` first.
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-w", f"-I{CUDA_SOURCES}", "-x", "c++", "-", "-o", program]
        + [f"-D{name}={value}" for name, value in macros.items()],
        input="".join(source.read_text() for source in sources),
        text=True,
        cwd=CUDA_ON_CPU,
        check=True,
    )
    done = subprocess.run([program, "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert float(done.stdout) < 1e-2


# ---- division of the work: the kernel's formulas against what they are to achieve ----------------


class Division:
    """The lists of pages, each of some kv heads of all requests, cut as the kernel cuts them."""

    def __init__(self, page_counts, num_kv_heads, max_workers, min_pages, min_fragment):
        self.num_kv_heads, self.max_workers = num_kv_heads, max_workers
        self.abreast = max(
            heads
            for heads in range(1, min(num_kv_heads, max_workers) + 1)
            if not num_kv_heads % heads
        )
        self.list_heads = num_kv_heads // self.abreast
        self.items = [pages for pages in page_counts for _ in range(self.list_heads)]
        self.item_starts = [0, *accumulate(self.items)]
        self.total = self.item_starts[-1]
        self.num_ranges = min(max_workers // self.abreast, max(1, self.total // min_pages))
        self.min_fragment = min_fragment
        self.starts = [self.range_start(index) for index in range(self.num_ranges + 1)]

    def range_start(self, index):
        flat = self.total * index // self.num_ranges
        if flat >= self.total:
            return self.total
        item = bisect_right(self.item_starts, flat) - 1
        before, after = flat - self.item_starts[item], self.item_starts[item + 1] - flat
        if before < self.min_fragment:
            return flat - before
        return flat + after if after < self.min_fragment else flat

    def cuts_below(self, flat):
        return (flat * self.num_ranges + self.total - 1) // self.total

    def parts(self, index):
        """(item, first page, end page) in pages of the list, of the range's parts."""
        begin, end = self.starts[index], self.starts[index + 1]
        while begin < end:
            item = bisect_right(self.item_starts, begin) - 1
            stop = min(end, self.item_starts[item + 1])
            yield item, begin, stop
            begin = stop

    def merged_by(self, index, item):
        """First and last range of an item, as a worker that holds a part of it computes them."""
        begin, end = self.item_starts[item : item + 2]
        first = last = index
        if begin < self.starts[index]:
            first = self.cuts_below(begin + self.min_fragment) - 1
        if end > self.starts[index + 1]:
            last = self.cuts_below(end - self.min_fragment + 1) - 1
        return first, last


def divisions(count=300):
    draw = random.Random(0)
    for _ in range(count):
        longest = draw.choice([1, 3, 9, 40, 600])
        page_counts = [draw.randint(0, longest) for _ in range(draw.choice([1, 2, 17, 90]))]
        min_fragment = draw.randint(1, 4)
        if sum(page_counts):
            yield Division(
                page_counts,
                num_kv_heads=draw.choice([1, 2, 3, 4, 8, 10]),
                max_workers=draw.choice([1, 2, 6, 24, 64, 96, 384, 1584]),
                min_pages=draw.randint(min_fragment, 8),
                min_fragment=min_fragment,
            )


def test_ranges_cover_every_page_once_and_are_even():
    for division in divisions():
        assert division.starts[0] == 0
        assert division.starts[-1] == division.total
        share = division.total / division.num_ranges
        for begin, end in pairwise(division.starts):
            assert 0 <= end - begin <= share + 1 + 2 * (division.min_fragment - 1)


def test_lists_cover_every_head_once():
    for division in divisions():
        heads = [
            head * division.abreast + index
            for index in range(division.abreast)
            for head in range(division.list_heads)
        ]
        assert sorted(heads) == list(range(division.num_kv_heads))


def test_many_pages_leave_fewer_workers_idle_than_there_are_heads():
    for num_kv_heads in (1, 2, 3, 4, 5, 8, 10):
        for max_workers in (12, 96, 192, 384, 1584):
            division = Division([40000], num_kv_heads, max_workers, 8, 4)
            assert division.list_heads == 1
            assert 0 <= max_workers - division.num_ranges * num_kv_heads < num_kv_heads


def test_no_part_of_a_cut_item_is_shorter_than_a_fragment():
    for division in divisions():
        for index in range(division.num_ranges):
            for item, begin, end in division.parts(index):
                assert end - begin == division.items[item] or end - begin >= division.min_fragment


def test_all_workers_of_a_cut_item_agree_on_who_they_are():
    for division in divisions():
        holders = {}
        for index in range(division.num_ranges):
            for item, _, _ in division.parts(index):
                holders.setdefault(item, []).append(index)
        for item, ranges in holders.items():
            assert ranges == list(range(ranges[0], ranges[-1] + 1))
            for index in ranges:
                assert division.merged_by(index, item) == (ranges[0], ranges[-1])


def test_no_two_parts_share_a_place_in_the_workspace_or_a_counter():
    for division in divisions():
        places, counters = set(), {}
        for index, each in product(range(division.num_ranges), range(division.abreast)):
            for item, begin, end in division.parts(index):
                if end - begin == division.items[item]:
                    continue
                first, _ = division.merged_by(index, item)
                place = 2 * (index * division.abreast + each) + (index == first)
                assert place < 2 * division.max_workers
                assert place not in places
                places.add(place)
                counter = first * division.abreast + each
                assert counters.setdefault(counter, (item, each)) == (item, each)


def warps_of_workers(num_workers, num_blocks, num_warps):
    """(block, warp) of every worker, as `worker_of` places them."""
    places = {}
    for block, warp in product(range(num_blocks), range(num_warps)):
        first, end = (number * num_workers // num_blocks for number in (block, block + 1))
        if first + warp < end:
            assert first + warp not in places
            places[first + warp] = (block, warp)
    assert sorted(places) == list(range(num_workers))
    return places


@pytest.mark.parametrize("abreast", [1, 4, 8])
@pytest.mark.parametrize("num_blocks", [8, 16, 132])
def test_workers_spread_evenly_and_those_of_a_range_are_neighbours(num_blocks, abreast):
    num_warps = DECODE_TILE.num_warps
    most = num_blocks * num_warps // abreast
    for num_ranges in {1, 2, most // 3, most - 1, most}:
        places = warps_of_workers(num_ranges * abreast, num_blocks, num_warps)
        loads = Counter(block for block, _ in places.values())
        share = num_ranges * abreast / num_blocks
        assert max(loads.values()) <= share + 1
        for first in range(0, num_ranges * abreast, abreast):
            blocks = [places[worker][0] for worker in range(first, first + abreast)]
            if share >= abreast:
                assert blocks[-1] - blocks[0] <= 1


# ---- what is refused ----------------------------------------------------------------------------


def operands(heads, page_size=16, dtype=torch.bfloat16, num_rows=1):
    pages = torch.zeros(2, heads.num_kv_heads, page_size, heads.head_dim, dtype=dtype)
    rows = DecodeRows(
        row_ids_R=torch.zeros(num_rows, dtype=torch.int32),
        kv_lens_R=torch.ones(num_rows, dtype=torch.int32),
        page_table_RP=torch.zeros(num_rows, 1, dtype=torch.int32),
        max_kv_len=1,
    )
    qkv = torch.zeros(1, heads.qo_size + 2 * heads.kv_size, dtype=dtype)
    out = torch.zeros(1, heads.qo_size, dtype=dtype)
    return [qkv, pages, pages.clone(), rows, out, heads]


HEADS = HeadShape(num_qo_heads=8, num_kv_heads=2, head_dim=128)


def test_pages_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"pages of 16 tokens, got 32: make the cache with"):
        decode_attention(*operands(HEADS, page_size=32), 8)


@pytest.mark.parametrize(
    "heads",
    [
        HeadShape(num_qo_heads=8, num_kv_heads=2, head_dim=96),
        HeadShape(num_qo_heads=34, num_kv_heads=2, head_dim=128),
        HeadShape(num_qo_heads=3, num_kv_heads=2, head_dim=128),
    ],
    ids=str,
)
def test_heads_that_do_not_fit_are_refused(heads):
    with pytest.raises(ValueError, match="use the variant `triton`"):
        decode_attention(*operands(heads), 8)


def test_other_types_and_layouts_are_refused():
    with pytest.raises(ValueError, match="`qkv` must be bfloat16"):
        decode_attention(*operands(HEADS, dtype=torch.float16), 8)
    given = operands(HEADS)
    given[1] = given[1].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="`k_pages` must be contiguous"):
        decode_attention(*given, 8)


def test_a_tile_that_does_not_fit_an_sm_is_refused():
    with pytest.raises(ValueError, match="bytes of shared memory at head dimension 128"):
        launch_decode(replace(DECODE_TILE, num_warps=16), *operands(HEADS), 8)


def test_no_rows_are_no_work():
    given = operands(HEADS, num_rows=0)
    decode_attention(*given, 8)
    assert not given[4].any()
