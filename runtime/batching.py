"""The dense batch: which request owns which row, for any split into nano-batches.

The logical batch is a list of requests, decodes first. Its rows are laid out per nano-batch: the
decode rows the nano-batch asks for, then its prefill rows. The stream of prefill tokens is cut
exactly at nano-batch boundaries, so a request may straddle. Requests, their pages, cached keys and
token ids do not depend on the layout; `logical_rows` maps a layout row to the row it has in the
logical batch, so that two layouts can be compared.

Shape legend: T rows of the dense batch, R decode rows, S prefill segments, P pages of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .kernels.registry import DecodeRows, PrefillRows
from .plan import NanoBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one request brings to this iteration: one decode token, or a chunk of its prompt."""

    token_ids: tuple[int, ...]
    """Tokens of this iteration, in order."""
    first_position: int
    """Position of the first of them; keys before it are in the cache already."""
    pages: tuple[int, ...]
    """Pages of the cache, covering all positions up to the last of this iteration."""
    is_decode: bool
    is_complete: bool = True
    """Whether its last row predicts a token: always for a decode, for a prefill at its end."""

    def __post_init__(self) -> None:
        if not self.token_ids or (self.is_decode and len(self.token_ids) != 1):
            raise ValueError(
                "a decode brings exactly one token and a prefill at least one, but got "
                f"{len(self.token_ids)} with is_decode={self.is_decode}"
            )

    @property
    def num_rows(self) -> int:
        """Rows of the dense batch."""
        return len(self.token_ids)

    @property
    def kv_len(self) -> int:
        """Keys in the cache after this iteration."""
        return self.first_position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Row:
    request: int
    offset: int
    """Place among the request's rows of this iteration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBatch:
    """One iteration's rows in the layout of a schedule."""

    requests: tuple[Request, ...]
    page_size: int
    rows: tuple[_Row, ...]
    token_ids_T: Tensor
    """int64."""
    positions_T: Tensor
    """int32: position of the row within its request."""
    slots_T: Tensor
    """int64: page * page_size + offset where the row's key and value go."""
    logical_rows: tuple[int, ...]
    """Row of the logical batch (all requests one after the other) of each layout row."""
    logit_rows_R: Tensor
    """int64: layout rows that predict a token, in request order."""
    logit_requests: tuple[int, ...]
    """Index of the request of each logit row."""

    @classmethod
    def build(
        cls,
        nano_batches: Sequence[NanoBatch],
        requests: Sequence[Request],
        *,
        page_size: int,
        device: torch.device,
    ) -> DenseBatch:
        """Lay the requests out over the nano-batches.

        Raises:
            ValueError: the requests do not bring the decode and prefill rows of the nano-batches.
        """
        rows = tuple(_lay_out(nano_batches, requests))
        starts = [0, *accumulate(request.num_rows for request in requests)]
        last_row = {row.request: place for place, row in enumerate(rows)}
        predicting = [index for index in sorted(last_row) if requests[index].is_complete]
        positions = [requests[row.request].first_position + row.offset for row in rows]
        slots = [
            requests[row.request].pages[position // page_size] * page_size + position % page_size
            for row, position in zip(rows, positions, strict=True)
        ]
        token_ids = [requests[row.request].token_ids[row.offset] for row in rows]
        logit_rows = [last_row[index] for index in predicting]
        return cls(
            requests=tuple(requests),
            page_size=page_size,
            rows=rows,
            token_ids_T=torch.tensor(token_ids, dtype=torch.int64, device=device),
            positions_T=torch.tensor(positions, dtype=torch.int32, device=device),
            slots_T=torch.tensor(slots, dtype=torch.int64, device=device),
            logical_rows=tuple(starts[row.request] + row.offset for row in rows),
            logit_rows_R=torch.tensor(logit_rows, dtype=torch.int64, device=device),
            logit_requests=tuple(predicting),
        )

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.rows)

    @property
    def max_kv_len(self) -> int:
        """Keys of the longest request after this iteration."""
        return max(request.kv_len for request in self.requests)

    @property
    def has_live_rows(self) -> bool:
        """Whether attention rows are another record each run: then a launch looks them up."""
        return False

    def fetch_token_ids(self) -> None:
        """Runs before the embedding, for batches whose token ids are not all in place yet."""

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.token_ids_T.device

    def decode_rows(self, tokens: tuple[int, int]) -> DecodeRows | None:
        """Decode rows of a range of layout rows, or None when it has none."""
        places = [p for p in range(*tokens) if self.requests[self.rows[p].request].is_decode]
        if not places:
            return None
        owners = [self.requests[self.rows[place].request] for place in places]
        return DecodeRows(
            row_ids_R=self._int32(places),
            kv_lens_R=self._int32([owner.kv_len for owner in owners]),
            page_table_RP=self._page_table(owners, [owner.kv_len for owner in owners]),
            max_kv_len=max(owner.kv_len for owner in owners),
        )

    def prefill_rows(self, tokens: tuple[int, int]) -> PrefillRows | None:
        """Prefill segments of a range of layout rows, or None when it has none."""
        segments: list[list[int]] = []
        for place in range(*tokens):
            row = self.rows[place]
            if self.requests[row.request].is_decode:
                continue
            before = self.rows[place - 1] if segments and segments[-1][-1] == place - 1 else None
            if before is not None and before.request == row.request:
                segments[-1].append(place)
            else:
                segments.append([place])
        if not segments:
            return None
        firsts = [self.rows[segment[0]] for segment in segments]
        owners = [self.requests[row.request] for row in firsts]
        position_starts = [
            owner.first_position + row.offset for owner, row in zip(owners, firsts, strict=True)
        ]
        segment_rows = tuple(len(segment) for segment in segments)
        kv_lens = [start + n for start, n in zip(position_starts, segment_rows, strict=True)]
        return PrefillRows(
            row_starts_S=self._int32([segment[0] for segment in segments]),
            num_rows_S=self._int32(segment_rows),
            position_starts_S=self._int32(position_starts),
            page_table_SP=self._page_table(owners, kv_lens),
            segment_rows=segment_rows,
            max_kv_len=max(kv_lens),
        )

    def straddling_requests(self, nano_batches: Sequence[NanoBatch]) -> tuple[int, ...]:
        """Prefill requests with rows in more than one nano-batch."""
        holders: dict[int, set[int]] = {}
        for index, nano_batch in enumerate(nano_batches):
            for place in range(*nano_batch.tokens):
                holders.setdefault(self.rows[place].request, set()).add(index)
        return tuple(sorted(request for request, where in holders.items() if len(where) > 1))

    def to_logical(self, x_TX: Tensor) -> Tensor:
        """Reorder layout rows into the order of the logical batch."""
        order_T = torch.tensor(self.logical_rows, device=x_TX.device)
        return torch.empty_like(x_TX).index_copy_(0, order_T, x_TX)

    def _int32(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def _page_table(self, owners: Sequence[Request], kv_lens: Sequence[int]) -> Tensor:
        counts = [-(-kv_len // self.page_size) for kv_len in kv_lens]
        width = max(counts)
        table = [
            [*owner.pages[:count], *[0] * (width - count)]
            for owner, count in zip(owners, counts, strict=True)
        ]
        return torch.tensor(table, dtype=torch.int32, device=self.device)


def _lay_out(nano_batches: Sequence[NanoBatch], requests: Sequence[Request]) -> Iterable[_Row]:
    decodes = [_Row(index, 0) for index, request in enumerate(requests) if request.is_decode]
    prefills = [
        _Row(index, offset)
        for index, request in enumerate(requests)
        if not request.is_decode
        for offset in range(request.num_rows)
    ]
    want_decodes = sum(nano_batch.decode_tokens for nano_batch in nano_batches)
    want_prefills = sum(nano_batch.num_tokens for nano_batch in nano_batches) - want_decodes
    if (len(decodes), len(prefills)) != (want_decodes, want_prefills):
        raise ValueError(
            f"the nano-batches hold {want_decodes} decode and {want_prefills} prefill rows, but "
            f"the requests bring {len(decodes)} and {len(prefills)}"
        )
    next_decode = next_prefill = 0
    for nano_batch in nano_batches:
        num_prefills = nano_batch.num_tokens - nano_batch.decode_tokens
        yield from decodes[next_decode : next_decode + nano_batch.decode_tokens]
        yield from prefills[next_prefill : next_prefill + num_prefills]
        next_decode += nano_batch.decode_tokens
        next_prefill += num_prefills
