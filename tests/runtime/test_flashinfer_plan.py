"""Row metadata and work lists of the FlashInfer variants; none of it needs the library."""

from __future__ import annotations

import heapq
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from nanoflow_tune.runtime.kernels.flashinfer_plan import (
    deal_to_share,
    decode_batch,
    fa3_tile_rows,
    prefill_batch,
)
from nanoflow_tune.runtime.kernels.registry import DecodeRows, PrefillRows


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def decode_rows(row_ids, kv_lens, table):
    return DecodeRows(
        row_ids_R=ints(row_ids),
        kv_lens_R=ints(kv_lens),
        page_table_RP=ints(table),
        max_kv_len=max(kv_lens),
    )


def prefill_rows(starts, counts, positions, table):
    return PrefillRows(
        row_starts_S=ints(starts),
        num_rows_S=ints(counts),
        position_starts_S=ints(positions),
        page_table_SP=ints(table),
        segment_rows=tuple(counts),
        max_kv_len=max(a + n for a, n in zip(positions, counts, strict=True)),
    )


def test_decode_pages_are_listed_without_their_padding():
    batch = decode_batch(
        decode_rows([4, 5, 6], [1, 16, 17], [[9, 0], [7, 0], [3, 8]]), page_size=16
    )
    assert batch.row_slice == slice(4, 7)
    assert batch.row_ends_S1.tolist() == [0, 1, 2, 3]
    assert batch.page_ends_S1.tolist() == [0, 1, 2, 4]
    assert batch.page_ids_P.tolist() == [9, 7, 3, 8]
    assert batch.last_page_lens_S.tolist() == [1, 16, 1]
    assert batch.kv_lens_S.tolist() == [1, 16, 17]


def test_scattered_decode_rows_have_no_slice():
    rows = decode_rows([1, 3], [2, 2], [[0], [1]])
    assert decode_batch(rows, page_size=16).row_slice is None


def test_a_prefill_segment_attends_up_to_its_own_last_row():
    # The second segment is a chunk: rows 40 to 59 of its request.
    batch = prefill_batch(
        prefill_rows([2, 10], [8, 20], [0, 40], [[5, 0, 0, 0], [1, 2, 3, 4]]), page_size=16
    )
    assert batch.row_slice == slice(2, 30)
    assert batch.row_ends_S1.tolist() == [0, 8, 28]
    assert batch.kv_lens_S.tolist() == [8, 60]
    assert batch.page_ids_P.tolist() == [5, 1, 2, 3, 4]
    assert batch.last_page_lens_S.tolist() == [8, 12]


def test_prefill_segments_with_rows_between_them_have_no_slice():
    batch = prefill_batch(prefill_rows([0, 9], [8, 4], [0, 0], [[5], [6]]), page_size=16)
    assert batch.row_slice is None
    assert batch.row_ids == (*range(8), *range(9, 13))


NUM_CTAS = 132
COLUMNS = ("qo_tile", "qo_start", "kv_start", "qo_len", "kv_len", "head", "request")


def fa3_plan(segments, num_heads, tile_rows):
    """A buffer as FlashInfer's planner lays it out for all CTAs, and its offsets."""
    items, loads = [[] for _ in range(NUM_CTAS)], [(0, cta) for cta in range(NUM_CTAS)]
    for head in range(num_heads):
        for request, (start, qo_len, kv_len) in enumerate(segments):
            for tile in reversed(range(-(-qo_len // tile_rows))):
                load, cta = heapq.heappop(loads)
                heapq.heappush(loads, (load + kv_len, cta))
                items[cta].append((tile, start, 10 * request, qo_len, kv_len, head, request))
    flat = [item for mine in items for item in mine]
    arrays = [ints([item[column] for item in flat]) for column in range(7)]
    ends = ints([sum(len(mine) for mine in items[:cta]) for cta in range(NUM_CTAS + 1)])
    arrays.insert(6, ends)  # between heads and requests
    buffer, offsets, place = torch.zeros(1 << 16, dtype=torch.uint8), [], 0
    for array in arrays:
        offsets.append(place)
        buffer[place : place + 4 * len(array)].view(torch.int32).copy_(array)
        place += -(-4 * len(array) // 16) * 16
    return buffer, [*offsets, 0], flat


def read_items(buffer, plan_info, count):
    places = [*plan_info[:6], plan_info[7]]
    columns = [buffer[a : a + 4 * count].view(torch.int32).tolist() for a in places]
    return list(zip(*columns, strict=True))


SEGMENTS = [(0, 512, 512), (512, 300, 300), (812, 1, 4000), (813, 200, 900)]


@pytest.mark.parametrize("num_sms", [1, 8, 32, 124])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_dealing_keeps_every_item_and_uses_only_the_share(num_sms, head_dim):
    tile_rows = fa3_tile_rows(head_dim)
    buffer, plan_info, items = fa3_plan(SEGMENTS, 8, tile_rows)
    used = deal_to_share(buffer, plan_info, NUM_CTAS, num_sms, tile_rows)
    assert sorted(read_items(buffer, plan_info, len(items))) == sorted(items)
    ends = buffer[plan_info[6] :][: 4 * (NUM_CTAS + 1)].view(torch.int32).tolist()
    assert ends[0] == 0
    assert ends == sorted(ends)
    assert set(ends[num_sms:]) == {len(items)}
    assert used == plan_info[7] + 4 * len(items)


@pytest.mark.parametrize("num_sms", [8, 32])
def test_dealt_work_is_level(num_sms):
    buffer, plan_info, items = fa3_plan(SEGMENTS, 32, 128)
    deal_to_share(buffer, plan_info, NUM_CTAS, num_sms, 128)
    dealt = read_items(buffer, plan_info, len(items))
    ends = buffer[plan_info[6] :][: 4 * (NUM_CTAS + 1)].view(torch.int32).tolist()

    def work(item):
        tile, _, _, qo_len, kv_len, _, _ = item
        return kv_len - qo_len + min(qo_len, 128 * (tile + 1)) + 256

    loads = [sum(map(work, dealt[a:b])) for a, b in pairwise(ends[: num_sms + 1])]
    # The greedy rule leaves no CTA more than one item above the mean.
    assert max(loads) <= sum(loads) / num_sms + max(map(work, dealt))


def test_a_plan_of_another_layout_is_refused():
    buffer, plan_info, _ = fa3_plan(SEGMENTS, 2, 128)
    with pytest.raises(ValueError, match="flashinfer-python=="):
        deal_to_share(buffer, plan_info[:-1], NUM_CTAS, 8, 128)
    with pytest.raises(ValueError, match="fewer rows"):
        deal_to_share(buffer, [*plan_info[:-1], 1], NUM_CTAS, 8, 128)


WITHOUT_LIBRARY = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "flashinfer" else real(name, *rest)
from nanoflow_tune.runtime.kernels import flashinfer_attention, registry
assert "flashinfer" not in registry.variants("decode_attention", "cuda")
assert not registry.variants("prefill_attention", "cuda")
print(flashinfer_attention.why_missing())
"""


def test_without_the_library_nothing_is_registered_and_the_reason_names_the_remedy():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=True
    )
    assert "pip install 'nanoflow-tune[flashinfer]'" in done.stdout
    assert "flashinfer" in done.stdout
