"""Synthetic traffic with a workload's moments: lengths of prompts and answers, and arrivals.

Lengths are log-normal with the workload's mean and standard deviation (constant where that is 0),
cut where a model's context ends; arrivals are a Poisson process. The same seed gives the same
requests. No torch, no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..search_spaces.schema import WorkloadSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """A request that is to be sent."""

    at_s: float
    """When, from the start on."""
    prompt_tokens: int
    decode_tokens: int


def plan_traffic(
    workload: WorkloadSpec, *, num_requests: int, rate_per_s: float, max_tokens: int, seed: int
) -> list[PlannedRequest]:
    """Requests in order of arrival.

    Args:
        workload: moments of the lengths.
        num_requests: how many.
        rate_per_s: mean arrivals; infinite sends all at once.
        max_tokens: of a prompt and its answer together.
        seed: of lengths and arrivals.

    Raises:
        ValueError: a number that must be positive is not, or no room for both.
    """
    if num_requests < 1 or not rate_per_s > 0 or max_tokens < 2:
        raise ValueError(
            "there must be at least one request, a positive rate and room for two tokens, but got "
            f"num_requests={num_requests}, rate_per_s={rate_per_s}, max_tokens={max_tokens}"
        )
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0, num_requests) / rate_per_s
    prompts = _lengths(rng, workload.prompt_tokens, workload.prompt_tokens_std, num_requests)
    answers = _lengths(rng, workload.decode_tokens, workload.decode_tokens_std, num_requests)
    answers = np.minimum(answers, max_tokens - 1)
    prompts = np.minimum(prompts, max_tokens - answers)
    return [
        PlannedRequest(at_s=float(at), prompt_tokens=int(prompt), decode_tokens=int(answer))
        for at, prompt, answer in zip(np.cumsum(gaps) - gaps[0], prompts, answers, strict=True)
    ]


def _lengths(rng: np.random.Generator, mean: float, std: float, count: int) -> np.ndarray:
    """At least one token each."""
    if mean == 0:
        return np.ones(count, dtype=np.int64)
    variance = np.log1p((std / mean) ** 2)
    lengths = rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)
    return np.maximum(1, np.rint(lengths)).astype(np.int64)
