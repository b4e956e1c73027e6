"""Host side of the FlashInfer variants: row metadata as its planners take it, FA3 work per share.

FlashInfer's FA3 planner deals its work items to one CTA per SM of the whole device, also inside a
partition, where those CTAs then run in several waves. `deal_to_share` deals the same items again,
to as many CTAs as the share has SMs; the others find no work and leave at once.

Shape legend: S requests (decode rows or prefill segments), R rows, P pages.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from .registry import DecodeRows, PrefillRows


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Requests of one call; all tensors int32 on the host."""

    row_ids: tuple[int, ...]
    """Rows of the dense batch, in the order of the requests."""
    row_ends_S1: Tensor
    """0, then the number of rows up to each request's end."""
    page_ends_S1: Tensor
    """0, then the number of pages up to each request's end."""
    page_ids_P: Tensor
    last_page_lens_S: Tensor
    """Keys in each request's last page, 1 to the page size."""
    kv_lens_S: Tensor

    @property
    def num_requests(self) -> int:
        """S."""
        return self.kv_lens_S.shape[0]

    @property
    def row_slice(self) -> slice | None:
        """The rows as a slice of the dense batch; None when they are not consecutive."""
        first, count = self.row_ids[0], len(self.row_ids)
        if self.row_ids == tuple(range(first, first + count)):
            return slice(first, first + count)
        return None


def decode_batch(rows: DecodeRows, page_size: int) -> PagedBatch:
    """One row per request. Reads tensors of the device, so it waits for the stream."""
    return _paged_batch(
        row_ids=tuple(rows.row_ids_R.tolist()),
        row_counts=[1] * rows.num_rows,
        kv_lens=rows.kv_lens_R.tolist(),
        page_table_SP=rows.page_table_RP,
        page_size=page_size,
    )


def prefill_batch(rows: PrefillRows, page_size: int) -> PagedBatch:
    """A request per segment, its keys ending with the segment's last row. Waits for the stream."""
    starts = rows.row_starts_S.tolist()
    spans = [range(a, a + n) for a, n in zip(starts, rows.segment_rows, strict=True)]
    positions = rows.position_starts_S.tolist()
    return _paged_batch(
        row_ids=tuple(chain.from_iterable(spans)),
        row_counts=rows.segment_rows,
        kv_lens=[a + n for a, n in zip(positions, rows.segment_rows, strict=True)],
        page_table_SP=rows.page_table_SP,
        page_size=page_size,
    )


def _paged_batch(
    *,
    row_ids: tuple[int, ...],
    row_counts: Sequence[int],
    kv_lens: list[int],
    page_table_SP: Tensor,
    page_size: int,
) -> PagedBatch:
    table = page_table_SP.tolist()
    page_counts = [-(-kv_len // page_size) for kv_len in kv_lens]
    pages = [pages[:count] for pages, count in zip(table, page_counts, strict=True)]
    return PagedBatch(
        row_ids=row_ids,
        row_ends_S1=_int32([0, *accumulate(row_counts)]),
        page_ends_S1=_int32([0, *accumulate(page_counts)]),
        page_ids_P=_int32(list(chain.from_iterable(pages))),
        last_page_lens_S=_int32([(kv_len - 1) % page_size + 1 for kv_len in kv_lens]),
        kv_lens_S=_int32(kv_lens),
    )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


FA3_COLUMNS = (
    "qo_tile",
    "qo_start",
    "kv_start",
    "qo_len",
    "kv_len",
    "head",
    "work_ends",
    "request",
)
"""Arrays of an FA3 plan in the order of the byte offsets that `plan` returns (0.6.14); a flag
follows them. `work_ends` holds 0 and where each CTA's items end; the others, one entry an item."""


def fa3_tile_rows(head_dim: int) -> int:
    """Query rows of one FA3 work item."""
    return 192 if head_dim == 64 else 128


def deal_to_share(
    buffer: Tensor, plan_info: Sequence[int], num_ctas: int, num_sms: int, tile_rows: int
) -> int:
    """Deal the items of a causal FA3 plan to the first `num_sms` CTAs, in place.

    Items go in the planner's order (by head, long requests first, late tiles first), each to the
    CTA with the least work so far; work of an item is its keys plus twice its rows, the planner's
    own measure.

    Args:
        buffer: the plan's integer workspace on the host, uint8.
        plan_info: what FlashInfer's FA3 `plan` returned.
        num_ctas: CTAs that the plan was made for: the SMs of the device.
        num_sms: CTAs that get work.
        tile_rows: query rows of an item.

    Returns:
        Bytes of the buffer that are in use and must be copied to the device.

    Raises:
        ValueError: the plan has another layout.
    """
    if len(plan_info) != len(FA3_COLUMNS) + 1 or plan_info[-1]:
        raise ValueError(
            f"an FA3 plan has {len(FA3_COLUMNS)} offsets and a flag that is 0 (items for each "
            f"head), got {list(plan_info)}: install flashinfer-python==0.6.14, or give the call "
            "fewer rows"
        )
    offsets = dict(zip(FA3_COLUMNS, plan_info, strict=False))
    ends = _view(buffer, offsets.pop("work_ends"), num_ctas + 1)
    count = int(ends[-1])
    columns = {name: _view(buffer, offset, count) for name, offset in offsets.items()}
    items: dict[str, list[int]] = {name: column.tolist() for name, column in columns.items()}

    def work(item: int) -> int:
        """Keys that the item's last row sees, plus twice its rows."""
        qo_len, kv_len = items["qo_len"][item], items["kv_len"][item]
        last_row = min((items["qo_tile"][item] + 1) * tile_rows, qo_len)
        return kv_len - qo_len + last_row + 2 * tile_rows

    def place_in_order(item: int) -> tuple[int, int, int, int]:
        head, request = items["head"][item], items["request"][item]
        return head, -items["kv_len"][item], request, -items["qo_tile"][item]

    loads = [(0, cta) for cta in range(min(num_sms, num_ctas))]
    dealt: list[list[int]] = [[] for _ in range(num_ctas)]
    for item in sorted(range(count), key=place_in_order):
        load, cta = heapq.heappop(loads)
        dealt[cta].append(item)
        heapq.heappush(loads, (load + work(item), cta))
    place = torch.tensor(list(chain.from_iterable(dealt)), dtype=torch.int64)
    for column in columns.values():
        column.copy_(column[place])
    ends.copy_(_int32([0, *accumulate(len(mine) for mine in dealt)]))
    return max(max(plan_info[:-1]) + 4 * max(count, 1), plan_info[6] + 4 * (num_ctas + 1))


def _view(buffer: Tensor, offset: int, count: int) -> Tensor:
    return buffer[offset : offset + 4 * count].view(torch.int32)
