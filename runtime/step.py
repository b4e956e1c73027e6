"""One step as the scheduler decides it and as every rank gets it: plain records without torch.

The scheduler's `Step` refers to sequences and stays with it; `StepInputs` holds numbers alone and
travels to the ranks. A slot is a place for one running request: page table, last sampled token and
sampling parameters are kept by slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .sequence import SamplingParams

NOT_YET_KNOWN = -1
"""Token id of a decode whose token was sampled in the step before: the device has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOp:
    """Move whole pages of one request between the device and a store; ops run in order."""

    kind: Literal["save", "load", "demote", "drop"]
    """`save` to host memory, `load` from where it is, `demote` from host memory to disk."""
    key: int
    """Names the stored pages."""
    pages: tuple[int, ...] = ()
    """On the device; a load may take fewer pages than were saved, the first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive prompt tokens of one request in one step."""

    slot: int
    first_position: int
    token_ids: tuple[int, ...]
    is_complete: bool
    """Ends the prompt, so its last row predicts a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTaken:
    """A request moves into a slot."""

    slot: int
    sampling: SamplingParams
    seed: int
    """The request's own, or one drawn by the engine."""
    num_generated: int
    """Tokens generated before: not 0 for a request that comes back from host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Everything that a rank needs to run one step; R decode rows, U page updates."""

    choice: str
    """Key of the executor, see `plan_choice`."""
    decode_slots_R: NDArray[np.int32]
    decode_positions_R: NDArray[np.int32]
    decode_tokens_R: NDArray[np.int64]
    """`NOT_YET_KNOWN` where the device has it."""
    chunks: tuple[Chunk, ...]
    page_updates_U3: NDArray[np.int32]
    """Slot, place in its page table, page."""
    slots_taken: tuple[SlotTaken, ...] = ()
    cache_ops: tuple[CacheOp, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the dense batch that are not padding."""
        return len(self.decode_slots_R) + sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def logit_slots(self) -> tuple[int, ...]:
        """Slots of the rows that predict a token: decodes, then chunks that end their prompt."""
        ends = (chunk.slot for chunk in self.chunks if chunk.is_complete)
        return (*self.decode_slots_R.tolist(), *ends)


@dataclass(slots=True)
class PageUpdates:
    """Page-table entries that changed since the last step."""

    entries: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def add(self, slot: int, first: int, pages: list[int]) -> None:
        """Pages that a slot's table holds from place `first` on."""
        self.entries.extend((slot, first + place, page) for place, page in enumerate(pages))

    def take(self) -> NDArray[np.int32]:
        """All of them, and forget them."""
        entries, self.entries = self.entries, []
        return np.array(entries, dtype=np.int32).reshape(-1, 3)
