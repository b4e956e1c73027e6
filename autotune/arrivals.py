"""When requests arrive: a Poisson process at some rate, or the timestamps of a trace.

Timestamps are those of the column TIMESTAMP, seconds or ISO 8601 (as in the Azure LLM inference
traces); they keep their pattern and are stretched to the rate that is asked for. No torch.
"""

from __future__ import annotations

import math
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from ..profiler.traffic import plan_traffic
from ..search_spaces.schema import WorkloadSpec
from .ablation import trace_rows

_MICROSECONDS = len("2023-11-16 18:17:03.979960")
"""Of an ISO time; traces have a digit more, which Python does not take."""


def poisson_arrivals(
    workload: WorkloadSpec, num_requests: int, max_tokens: int, seed: int, rate_per_s: float
) -> tuple[float, ...]:
    """Seconds of the requests that `workload_lengths` gives for the same arguments."""
    planned = plan_traffic(
        workload,
        num_requests=num_requests,
        rate_per_s=rate_per_s,
        max_tokens=max_tokens,
        seed=seed,
    )
    return tuple(request.at_s for request in planned)


def trace_arrivals(path: Path, max_tokens: int, limit: int, rate_per_s: float) -> tuple[float, ...]:
    """Seconds of the requests that `trace_lengths` gives for the same arguments.

    Args:
        path: a CSV with the column TIMESTAMP.
        max_tokens: longer requests are left out.
        limit: most requests.
        rate_per_s: mean of the run, to which the trace's own pace is stretched.

    Raises:
        ValueError: no such column, a time that is none, or times that do not ascend.
    """
    texts = [text for *_, text in trace_rows(path, max_tokens, limit)]
    times = [_seconds(text, f"{path}, request {n}") for n, text in enumerate(texts, start=1)]
    if any(later < earlier for earlier, later in pairwise(times)):
        raise ValueError(f"the TIMESTAMPs of {path} must ascend: sort its rows by them")
    length_s = times[-1] - times[0]
    if length_s <= 0:
        raise ValueError(
            f"{path} must have two requests at different times to be replayed, but its "
            f"{len(times)} last {length_s:g} s: leave --rate out, to send all at once"
        )
    factor = (len(times) - 1) / rate_per_s / length_s
    return tuple((at - times[0]) * factor for at in times)


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text.strip()[:_MICROSECONDS]).timestamp()
        except ValueError:
            value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{where}: --rate replays a trace by its column TIMESTAMP, seconds or ISO 8601, but "
            f"got {text[:40]!r}"
        )
    return value
