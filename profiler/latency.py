"""Latencies of requests that were served online: time to first token, per token, normalised.

All count from when a request was due, so that a client or a queue that is late shows. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What became of a request; times in seconds from the start of the run."""

    due_s: float
    sent_s: float
    first_token_s: float
    end_s: float
    prompt_tokens: int
    decode_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token, from when the request was due."""
        return self.first_token_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; nan with one token."""
        later = self.decode_tokens - 1
        return (self.end_s - self.first_token_s) / later if later else math.nan

    @property
    def normalised_s(self) -> float:
        """Whole time over generated tokens."""
        return (self.end_s - self.due_s) / self.decode_tokens


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99 of what is not nan."""
    known = np.asarray(values)[~np.isnan(values)]
    if not known.size:
        return dict.fromkeys(("mean", "p50", "p90", "p99"), math.nan)
    p50, p90, p99 = (float(value) for value in np.percentile(known, (50, 90, 99)))
    return {"mean": float(known.mean()), "p50": p50, "p90": p90, "p99": p99}


def summarise(served: Sequence[Served]) -> dict[str, dict[str, float]]:
    """Percentiles of the three latencies, in milliseconds."""
    return {
        name: percentiles([1e3 * getattr(request, f"{name}_s") for request in served])
        for name in ("ttft", "tpot", "normalised")
    }
