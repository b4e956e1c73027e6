"""A dense batch whose tensors stay where they are while steps come and go, for CUDA graphs.

All numbers of a step but its page tables lie in one block of memory (`staging`), and the tensors of
`DenseBatch` are views of it; page tables are gathered on the device (`page_tables`). What a step
does not fill is padding that no kernel lets through: rows with token 0 whose keys go to page 0,
decode rows without keys, segments without rows, logit rows whose token goes to a spare slot.

A captured graph sees room for everything (`is_captured`): kernels count on the device. Run eagerly,
the records that attention kernels get are cut to the step, with true lengths on the host.

Shape legend: T rows of the dense batch, R decode rows or logit rows, S prefill segments, P pages of
a request, N slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch_layout import Piece, Range, RowPlaces, place_rows
from .batch_memory import (
    BatchSizes,
    attention_ranges,
    num_page_entries,
    page_tables_in,
    staging_fields,
)
from .batching import DenseBatch
from .kernels.registry import DecodeRows, PrefillRows
from .page_tables import PageTables
from .plan import Schedule
from .staging import Array, Staging
from .step import NOT_YET_KNOWN, StepInputs


@dataclass(frozen=True, kw_only=True)
class StaticBatch(DenseBatch):
    """One for each executor; `fill` puts a step in."""

    schedule: Schedule
    sizes: BatchSizes
    is_captured: bool
    staging: Staging
    last_tokens_N: Tensor
    """By slot, the token sampled last; one spare slot at the end. Shared by all batches."""
    page_tables: Mapping[str, Tensor]
    """[rows, P] int32 of each attention nano-op, by the start of its fields' names."""
    live: dict[tuple[str, int], DecodeRows | PrefillRows | None]
    """By op and first row: what its kernels get."""

    @classmethod
    def make(
        cls,
        schedule: Schedule,
        sizes: BatchSizes,
        last_tokens_N: Tensor,
        *,
        is_captured: bool,
        block: Tensor | None = None,
        page_block: Tensor | None = None,
    ) -> StaticBatch:
        """Allocate, and fill with padding alone.

        Args:
            schedule: whose dense batch it is.
            sizes: what there is room for.
            last_tokens_N: by slot, the token sampled last.
            is_captured: whether kernels see room for everything.
            block: of `staging_bytes`, see `Staging`.
            page_block: of `num_page_entries`, for page numbers alone; other batches may share it.
        """
        device = last_tokens_N.device
        staging = Staging(staging_fields(schedule, sizes), device, block)
        tensors = staging.tensors
        if page_block is None:
            entries = num_page_entries(schedule, sizes)
            page_block = torch.zeros(entries, dtype=torch.int32, device=device)
        batch = cls(
            requests=(),
            page_size=sizes.page_size,
            rows=(),
            token_ids_T=torch.zeros_like(tensors["host_ids_T"]),
            positions_T=tensors["positions_T"],
            slots_T=tensors["slots_T"],
            logical_rows=(),
            logit_rows_R=tensors["logit_rows_R"],
            logit_requests=(),
            schedule=schedule,
            sizes=sizes,
            is_captured=is_captured,
            staging=staging,
            last_tokens_N=last_tokens_N,
            page_tables=page_tables_in(page_block, schedule, sizes),
            live={},
        )
        batch.clear()
        return batch

    @property
    def num_rows(self) -> int:
        """T."""
        return self.schedule.dense_batch_tokens

    @property
    def max_kv_len(self) -> int:
        """Most keys that a request may have."""
        return self.sizes.max_pages * self.sizes.page_size

    @property
    def has_live_rows(self) -> bool:
        """Attention rows are those of the last `fill`."""
        return True

    @property
    def logit_slots(self) -> Tensor:
        """Slot of each logit row; the spare one for padding."""
        return self.staging.tensors["logit_slots_R"][: self.sizes.num_logits]

    def narrowed(self, num_logits: int) -> StaticBatch:
        """The same memory with room for fewer logit rows; a `fill` of either fills both."""
        return replace(
            self,
            sizes=replace(self.sizes, num_logits=num_logits),
            logit_rows_R=self.logit_rows_R[:num_logits],
        )

    def decode_rows(self, tokens: Range) -> DecodeRows | None:
        """Decode rows of the step in a range of a decode nano-op."""
        rows = self.live["decode_attention", tokens[0]]
        assert rows is None or isinstance(rows, DecodeRows)
        return rows

    def prefill_rows(self, tokens: Range) -> PrefillRows | None:
        """Prefill segments of the step in a range of a prefill nano-op."""
        rows = self.live["prefill_attention", tokens[0]]
        assert rows is None or isinstance(rows, PrefillRows)
        return rows

    def fetch_token_ids(self) -> None:
        """Put each row's token in place: from the host, or the one sampled last in its slot."""
        tensors = self.staging.tensors
        sampled_T = self.last_tokens_N.index_select(0, tensors["sources_T"])
        torch.where(tensors["is_known_T"], tensors["host_ids_T"], sampled_T, out=self.token_ids_T)

    def clear(self) -> None:
        """Padding alone: what a graph is captured with."""
        no_rows = np.empty(0, dtype=np.int32)
        nothing = StepInputs(
            choice="",
            decode_slots_R=no_rows,
            decode_positions_R=no_rows,
            decode_tokens_R=np.empty(0, dtype=np.int64),
            chunks=(),
            page_updates_U3=no_rows.reshape(-1, 3),
        )
        self.fill(nothing, _no_tables(self.sizes.max_pages))

    def fill(self, inputs: StepInputs, tables: PageTables) -> None:
        """Lay a step out and send it to the device.

        Raises:
            ValueError: the step does not fit.
        """
        arrays = self.staging.next_arrays()
        num_prompt_tokens = inputs.num_rows - len(inputs.decode_slots_R)
        places = place_rows(self.schedule, len(inputs.decode_slots_R), num_prompt_tokens)
        self._fill_rows(arrays, inputs, places, tables.host_NP)
        self._fill_logits(arrays, inputs, places)
        widths: dict[str, tuple[int, int]] = {}
        for op, tokens in attention_ranges(self.schedule):
            prefix = f"{op}/{tokens[0]}/"
            view: Callable[[str], Array] = lambda name, p=prefix: arrays[p + name]  # noqa: E731
            if op == "decode_attention":
                rows, used = self._fill_decodes(view, inputs, places, tokens)
            else:
                pieces = list(places.pieces_within(tokens, inputs.chunks))
                rows, used = self._fill_segments(view, inputs, pieces, tokens)
            self.live[op, tokens[0]] = rows
            widths[prefix] = used
        self.staging.upload()
        for prefix, (count, longest) in widths.items():
            if count:
                slots = self.staging.tensors[prefix + "slots"][:count]
                width = -(-longest // self.sizes.page_size)
                tables.gather(slots, width, self.page_tables[prefix][:count])

    def _fill_rows(
        self,
        arrays: Mapping[str, Array],
        inputs: StepInputs,
        places: RowPlaces,
        page_table_NP: NDArray[np.int32],
    ) -> None:
        """Token, position and cache slot of each row."""
        for name in ("host_ids_T", "slots_T", "positions_T"):
            arrays[name][:] = 0
        arrays["sources_T"][:] = self.sizes.num_slots
        arrays["is_known_T"][:] = True
        decodes_R, prompts_N = places.decode_rows_R, places.prompt_rows
        chunks = inputs.chunks
        counts = [len(chunk.token_ids) for chunk in chunks]
        rows_X = np.concatenate((decodes_R, prompts_N))
        owners_X = np.concatenate(
            (inputs.decode_slots_R, np.repeat([chunk.slot for chunk in chunks], counts))
        ).astype(np.int64)
        firsts = [
            np.arange(c.first_position, c.first_position + n)
            for c, n in zip(chunks, counts, strict=True)
        ]
        positions_X = np.concatenate((inputs.decode_positions_R, *firsts)).astype(np.int64)
        size = self.sizes.page_size
        pages_X = page_table_NP[owners_X, positions_X // size].astype(np.int64)
        arrays["slots_T"][rows_X] = pages_X * size + positions_X % size
        arrays["positions_T"][rows_X] = positions_X
        if chunks:
            tokens = [np.array(chunk.token_ids, dtype=np.int64) for chunk in chunks]
            arrays["host_ids_T"][prompts_N] = np.concatenate(tokens)
        is_known_R = inputs.decode_tokens_R != NOT_YET_KNOWN
        arrays["host_ids_T"][decodes_R] = np.where(is_known_R, inputs.decode_tokens_R, 0)
        arrays["is_known_T"][decodes_R] = is_known_R
        arrays["sources_T"][decodes_R] = inputs.decode_slots_R

    def _fill_logits(
        self, arrays: Mapping[str, Array], inputs: StepInputs, places: RowPlaces
    ) -> None:
        ends = np.cumsum([len(chunk.token_ids) for chunk in inputs.chunks], dtype=np.int64) - 1
        wanted = [chunk.is_complete for chunk in inputs.chunks]
        last_rows = places.prompt_rows[ends[wanted]] if any(wanted) else ends[:0]
        rows_R = np.concatenate((places.decode_rows_R, last_rows))
        slots = inputs.logit_slots
        if len(rows_R) > self.sizes.num_logits:
            raise ValueError(
                f"a step predicts {len(rows_R)} tokens, but the executor has room for "
                f"{self.sizes.num_logits}: choose one with more logit rows"
            )
        arrays["logit_rows_R"][:] = 0
        arrays["logit_slots_R"][:] = self.sizes.num_slots
        arrays["logit_rows_R"][: len(rows_R)] = rows_R
        arrays["logit_slots_R"][: len(rows_R)] = slots

    def _fill_decodes(
        self,
        view: Callable[[str], Array],
        inputs: StepInputs,
        places: RowPlaces,
        tokens: Range,
    ) -> tuple[DecodeRows | None, tuple[int, int]]:
        """What kernels get, and the rows and most keys that the step has."""
        mine = places.decodes_within(tokens)
        count = mine.stop - mine.start
        kv_lens_R = inputs.decode_positions_R[mine] + 1
        used = count, int(kv_lens_R.max()) if count else 0
        view("rows")[:count], view("rows")[count:] = places.decode_rows_R[mine], 0
        view("kv_lens")[:count], view("kv_lens")[count:] = kv_lens_R, 0
        view("slots")[:count] = inputs.decode_slots_R[mine]
        shown, longest = self._shown(*used, tokens[1] - tokens[0])
        if shown == 0:
            return None, used
        prefix = f"decode_attention/{tokens[0]}/"
        tensor = self._tensors(prefix, shown)
        rows = DecodeRows(
            row_ids_R=tensor("rows"),
            kv_lens_R=tensor("kv_lens"),
            page_table_RP=self.page_tables[prefix][:shown],
            max_kv_len=longest,
        )
        return rows, used

    def _fill_segments(
        self,
        view: Callable[[str], Array],
        inputs: StepInputs,
        pieces: Sequence[Piece],
        tokens: Range,
    ) -> tuple[PrefillRows | None, tuple[int, int]]:
        """What kernels get, and the segments and most keys that the step has."""
        count = len(pieces)
        owners = [inputs.chunks[piece.chunk] for piece in pieces]
        starts = [c.first_position + p.offset for c, p in zip(owners, pieces, strict=True)]
        rows = tuple(piece.count for piece in pieces)
        used = count, max((start + n for start, n in zip(starts, rows, strict=True)), default=0)
        view("rows")[:count] = [piece.first_row for piece in pieces]
        view("counts")[:count], view("counts")[count:] = rows, 0
        view("positions")[:count] = starts
        view("slots")[:count] = [chunk.slot for chunk in owners]
        room = len(view("rows"))
        shown, longest = self._shown(*used, room)
        if shown == 0:
            return None, used
        prefix = f"prefill_attention/{tokens[0]}/"
        tensor = self._tensors(prefix, shown)
        segments = PrefillRows(
            row_starts_S=tensor("rows"),
            num_rows_S=tensor("counts"),
            position_starts_S=tensor("positions"),
            page_table_SP=self.page_tables[prefix][:shown],
            # Captured: a bound of the rows, from which grids are sized.
            segment_rows=(tokens[1] - tokens[0], *[1] * (room - 1)) if self.is_captured else rows,
            max_kv_len=longest,
        )
        return segments, used

    def _shown(self, count: int, longest: int, room: int) -> tuple[int, int]:
        """Entries and most keys that kernels are told of: all that fit when captured."""
        return (room, self.max_kv_len) if self.is_captured else (count, longest)

    def _tensors(self, prefix: str, shown: int) -> Callable[[str], Tensor]:
        return lambda name: self.staging.tensors[prefix + name][:shown]


def _no_tables(max_pages: int) -> PageTables:
    """For steps without rows."""
    return PageTables(1, max_pages, torch.device("cpu"), is_shared=True)
