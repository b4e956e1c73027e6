"""Runs of the engine, as the parent process sees them: the case, the books, the results.

No torch here: the parent (command line) asks for runs with `serve_contenders`, which travels
to the ranks by name; what they do is in `serving_run.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.plan_choice import PlanBook
from ..runtime.scheduler_records import SchedulerLimits
from ..runtime.sequence import EngineStats
from ..search_spaces.schema import HardwareSpec, ModelSpec

if TYPE_CHECKING:
    from ..runtime.launch import RankContext


RESERVED_BYTES = 8 << 30
"""Of a GPU's memory, for activations, logits, graphs and libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCase:
    """A model on some GPUs, and the requests it gets."""

    model: ModelSpec
    hardware: HardwareSpec
    tp_degree: int
    lengths: tuple[tuple[int, int], ...]
    """Prompt and generated tokens of each request, all known at the start."""
    page_size: int = 16
    num_pages: int | None = None
    """Of the cache; None: what fits the GPU."""
    seed: int = 0
    weights: Path | None = None
    """A Hugging Face folder; None: random ones by `seed`."""
    due_s: tuple[float, ...] = ()
    """When each request arrives, seconds after the start, ascending; empty: all at the start."""

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens in all."""
        return sum(prompt + generated for prompt, generated in self.lengths)

    @property
    def max_model_len(self) -> int:
        """Of the longest request."""
        return max(prompt + generated for prompt, generated in self.lengths)

    @property
    def expected_decode_tokens(self) -> float:
        """Mean generated length."""
        return statistics.mean(generated for _, generated in self.lengths)

    def limits(self, book: PlanBook) -> SchedulerLimits:
        """What a scheduler is told that serves the case with a book."""
        return SchedulerLimits(
            max_model_len=self.max_model_len,
            max_running=min(book.target_rows, len(self.lengths)),
            max_waiting=len(self.lengths),
            expected_decode_tokens=self.expected_decode_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A plan book that is to be run."""

    name: str
    book: PlanBook
    offload_host_pages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRun:
    """One whole run, ramps included; watts and clocks are means of this rank's GPU."""

    name: str
    elapsed_s: float
    num_tokens: int
    num_gpus: int
    joules: float
    """Of all GPUs; nan without a counter."""
    watts: float
    sm_clock_mhz: float
    stats: EngineStats
    latencies: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Any])
    """Milliseconds: `ttft`, `tpot`, `normalised`, each with mean, p50, p90, p99; empty when all
    requests were there from the start."""

    @property
    def tokens_per_s(self) -> float:
        """Prompt and generated tokens, all GPUs."""
        return self.num_tokens / self.elapsed_s

    @property
    def joules_per_token(self) -> float:
        """All GPUs; nan without a counter."""
        return self.joules / self.num_tokens


def serve_contenders(
    ctx: RankContext, cases: Sequence[ServingCase], contenders: Sequence[Contender], rounds: int
) -> list[list[ServingRun]]:
    """Serve each case with each book in interleaved rounds; see `serving_run.py`."""
    from . import serving_run

    return serving_run.run_contenders(ctx, cases, contenders, rounds)
