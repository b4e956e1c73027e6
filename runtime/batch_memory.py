"""What memory the numbers and the page tables of a static batch take, and where each lies in it.

Shape legend: P pages of a request.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .batch_layout import Range
from .plan import Schedule
from .staging import Field, num_bytes

_ALIGNED_ENTRIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """What a static batch has room for."""

    num_logits: int
    max_chunks: int
    max_pages: int
    """Of one request."""
    num_slots: int
    page_size: int


def staging_fields(schedule: Schedule, sizes: BatchSizes) -> dict[str, Field]:
    """The numbers of a step: type and shape by name; of an attention nano-op, `op/first row/`."""
    rows, logits = schedule.dense_batch_tokens, sizes.num_logits
    fields: dict[str, Field] = {
        "host_ids_T": ("i8", (rows,)),
        "sources_T": ("i8", (rows,)),
        "slots_T": ("i8", (rows,)),
        "logit_rows_R": ("i8", (logits,)),
        "logit_slots_R": ("i8", (logits,)),
        "positions_T": ("i4", (rows,)),
        "is_known_T": ("?", (rows,)),
    }
    segments = sizes.max_chunks + len(schedule.nano_batches)
    for op, (start, end) in attention_ranges(schedule):
        if op == "decode_attention":
            fields[f"{op}/{start}/rows"] = ("i4", (end - start,))
            fields[f"{op}/{start}/kv_lens"] = ("i4", (end - start,))
            fields[f"{op}/{start}/slots"] = ("i4", (end - start,))
        else:
            for name in ("rows", "counts", "positions", "slots"):
                fields[f"{op}/{start}/{name}"] = ("i4", (segments,))
    return fields


def _table_rows(schedule: Schedule, sizes: BatchSizes) -> dict[str, int]:
    """Rows of the page table of each attention nano-op, by the start of its fields' names."""
    segments = sizes.max_chunks + len(schedule.nano_batches)
    return {
        f"{op}/{start}/": end - start if op == "decode_attention" else segments
        for op, (start, end) in attention_ranges(schedule)
    }


def staging_bytes(schedule: Schedule, sizes: BatchSizes) -> int:
    """Of device memory that a batch's numbers take."""
    return num_bytes(staging_fields(schedule, sizes))


def num_page_entries(schedule: Schedule, sizes: BatchSizes) -> int:
    """Of device memory that a batch's page tables take, int32."""
    return sum(_entries(rows, sizes.max_pages) for rows in _table_rows(schedule, sizes).values())


def attention_ranges(schedule: Schedule) -> tuple[tuple[str, Range], ...]:
    """Attention nano-ops of a schedule: op and rows; no two of an op start at the same row."""
    return tuple(
        (nano_op.op, nano_op.tokens)
        for nano_op in schedule.nano_ops
        if nano_op.op in ("decode_attention", "prefill_attention")
    )


def _entries(num_rows: int, num_columns: int) -> int:
    """Of a table, up to where the next one may begin: kernels are compiled for aligned ones."""
    return -(-num_rows * num_columns // _ALIGNED_ENTRIES) * _ALIGNED_ENTRIES


def page_tables_in(block: Tensor, schedule: Schedule, sizes: BatchSizes) -> dict[str, Tensor]:
    """[rows, P] of each attention nano-op, one behind the other in a block of page numbers."""
    tables: dict[str, Tensor] = {}
    begin = 0
    for name, count in _table_rows(schedule, sizes).items():
        end = begin + count * sizes.max_pages
        tables[name] = block[begin:end].view(count, sizes.max_pages)
        begin += _entries(count, sizes.max_pages)
    return tables
