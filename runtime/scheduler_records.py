"""What the scheduler is told once, what it decides for a step, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from .admission import Growth
from .sequence_state import Sequence
from .step import Chunk, StepInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Sizes that hold for the engine's life."""

    max_model_len: int
    """Prompt and generated tokens of a request."""
    max_running: int
    """Requests with a slot."""
    max_chunks: int = 64
    """Prompt chunks of a step."""
    max_waiting: int = 4096
    """Requests in the queue; more are refused."""
    expected_decode_tokens: float = 256.0
    """What requests are taken to generate before any has ended."""
    admitted_fraction: float = 0.98
    """Of the pages that the expected peak may fill."""
    tile_rows: int = 128
    """Of a GEMM: decodes come in whole tiles where the pages decide how many there are."""
    max_swapped_pages: int | None = None
    """Of requests preempted to host memory; None: no limit. A request that finds no room ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step computes, and for whom."""

    decodes: tuple[Sequence, ...]
    chunks: tuple[tuple[Sequence, Chunk], ...]
    inputs: StepInputs
    """`choice` is empty: what runs the step is not the scheduler's concern."""

    @property
    def predicting(self) -> tuple[Sequence, ...]:
        """Owners of the rows that predict a token, in the order of the sampled tokens."""
        ends = (sequence for sequence, chunk in self.chunks if chunk.is_complete)
        return (*self.decodes, *ends)

    @property
    def num_rows(self) -> int:
        """Rows that are not padding."""
        return self.inputs.num_rows


@dataclass(slots=True)
class Totals:
    """Counts since the start."""

    preemptions: int = 0
    generated: int = 0
    prompt: int = 0
    prefix: int = 0
    finished: int = 0
    cancelled: int = 0
    swapped_pages: int = 0


@dataclass(slots=True)
class Forming:
    """The step that is being put together."""

    decodes: list[Sequence] = field(default_factory=list[Sequence])
    chunks: list[tuple[Sequence, Chunk]] = field(default_factory=list[tuple[Sequence, Chunk]])
    preempted: bool = False
    growths: list[Growth] | None = None
    """Of the running requests, once an admission has asked."""
