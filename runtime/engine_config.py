"""What an operator decides about an engine."""

from __future__ import annotations

from dataclasses import dataclass

from .scheduler_records import SchedulerLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSizes:
    """Sizes of a rank's tables and batches."""

    max_model_len: int
    max_running: int
    """Slots."""
    max_chunks: int
    """Prompt chunks of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTarget:
    """Limits that the engine keeps at the price of throughput."""

    ttft_s: float | None = None
    """Time to first token, from arrival."""
    tpot_s: float | None = None
    """Time per output token: one step."""

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive seconds, but got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an operator decides."""

    model_name: str
    vocab_size: int
    limits: SchedulerLimits
    num_pages: int
    page_size: int
    eos_token_ids: tuple[int, ...] = ()
    latency: LatencyTarget = LatencyTarget()
    offload_host_pages: int = 0
    """Pages of finished requests to keep in host memory; 0: none."""
    offload_disk_pages: int = 0
    page_bytes: int = 0
    """Of one page, all layers and ranks; for the counts in `EngineStats`."""
    seed: int = 0
    memory_remedy: str = "give the KV cache fewer pages, or the dense batch fewer rows"
    """What helps when a step finds no memory, in the words of the command that was given."""
    step_timeout_s: float = 600.0
    """A step that takes longer has hung; the first ones may wait for a compiler."""

    @property
    def runner_sizes(self) -> RunnerSizes:
        """What a `ModelRunner` for this engine is made with."""
        return RunnerSizes(
            max_model_len=self.limits.max_model_len,
            max_running=self.limits.max_running,
            max_chunks=self.limits.max_chunks,
        )
