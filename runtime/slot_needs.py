"""What the sampler must compute for a step, from the requests in its slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .sampling import GREEDY, SamplingMode, mode_of
from .sequence import SamplingParams
from .step import SlotTaken


class SlotNeeds:
    """The mode of each slot's request, as one of few numbers, so that a step's is found quickly."""

    def __init__(self, num_slots: int) -> None:
        """Make all slots greedy."""
        self._codes_N = np.zeros(num_slots, dtype=np.int64)
        self._code_of: dict[SamplingMode, int] = {GREEDY: 0}
        self._examples = [SamplingParams(max_tokens=1, temperature=0.0)]
        """By code: parameters that need this mode."""

    def take(self, taken: Iterable[SlotTaken]) -> None:
        """Requests move into slots."""
        for item in taken:
            mode = mode_of([item.sampling])
            if mode not in self._code_of:
                self._code_of[mode] = len(self._examples)
                self._examples.append(item.sampling)
            self._codes_N[item.slot] = self._code_of[mode]

    def mode_of(self, slots: Sequence[int]) -> SamplingMode:
        """What the rows of these slots need together."""
        codes = np.unique(self._codes_N[list(slots)])
        return mode_of([self._examples[code] for code in codes.tolist()])
