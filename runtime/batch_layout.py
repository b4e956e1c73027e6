"""Which row of a schedule's dense batch each decode and each prompt token gets: numbers alone.

Decodes fill the nano-batches' decode rows in order; the stream of prompt tokens fills what is left
of each, so a chunk may straddle nano-batches. Rows that nothing fills are padding, at the end of
their nano-batch.

Shape legend: R decode rows, N prompt tokens of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .plan import Schedule
from .plan_lookup import with_decodes
from .step import Chunk

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of consecutive prompt tokens of one chunk."""

    chunk: int
    offset: int
    """Of its first token within the chunk."""
    first_row: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlaces:
    """Rows of one step."""

    decode_rows_R: NDArray[np.int64]
    """Ascending."""
    stream: tuple[tuple[int, int, int], ...]
    """Of each stretch of prompt rows: first token within the stream, first row, count."""

    @property
    def prompt_rows(self) -> NDArray[np.int64]:
        """Row of each token of the stream."""
        rows = [np.arange(row, row + count) for _, row, count in self.stream]
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)

    def decodes_within(self, tokens: Range) -> slice:
        """Which decodes have their row in a range."""
        first, end = np.searchsorted(self.decode_rows_R, tokens)
        return slice(int(first), int(end))

    def pieces_within(self, tokens: Range, chunks: Sequence[Chunk]) -> Iterator[Piece]:
        """Prompt rows in a range, cut where a chunk or a stretch of rows ends."""
        for first, row, count in self.stream:
            low, high = max(row, tokens[0]), min(row + count, tokens[1])
            if low < high:
                yield from _pieces(low, first + low - row, high - low, chunks)


def place_rows(schedule: Schedule, num_decodes: int, num_prompt_tokens: int) -> RowPlaces:
    """Lay a step out over the nano-batches of a schedule.

    Raises:
        ValueError: more rows than the schedule has.
    """
    if num_decodes + num_prompt_tokens > schedule.dense_batch_tokens:
        raise ValueError(
            f"a step of {num_decodes} decodes and {num_prompt_tokens} prompt tokens does not fit "
            f"{schedule.dense_batch_tokens} rows: choose a larger bucket"
        )
    decode_rows: list[NDArray[np.int64]] = []
    stream: list[tuple[int, int, int]] = []
    done = 0
    for nano_batch in with_decodes(schedule, num_decodes).nano_batches:
        start, end = nano_batch.tokens
        first = start + nano_batch.decode_tokens
        decode_rows.append(np.arange(start, first))
        count = min(end - first, num_prompt_tokens - done)
        if count > 0:
            stream.append((done, first, count))
            done += count
    return RowPlaces(decode_rows_R=np.concatenate(decode_rows), stream=tuple(stream))


def _pieces(row: int, token: int, count: int, chunks: Sequence[Chunk]) -> Iterator[Piece]:
    """The tokens [token, token + count) of the stream, from `row` on."""
    start = 0
    for index, chunk in enumerate(chunks):
        end = start + len(chunk.token_ids)
        low, high = max(start, token), min(end, token + count)
        if low < high:
            yield Piece(index, low - start, row + low - token, high - low)
        start = end
