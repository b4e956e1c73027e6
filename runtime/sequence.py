"""What passes between server and engine: requests, sampling parameters and the events of a request.

Frozen records without torch. A request goes in as a `GenerationRequest`; out come `TokenEvent`s, in
order, and one `FinishEvent`, always the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

MAX_LOGPROBS = 20
"""Most alternatives that may be reported beside each token."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends."""

    max_tokens: int
    """Most tokens to generate."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int | None = None
    """The same seed and prompt give the same tokens; None: the engine draws one."""
    stop_token_ids: tuple[int, ...] = ()
    """End the request like the model's own end-of-sequence tokens do."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever is sampled, stop tokens included."""
    logprobs: int | None = None
    """Alternatives to report beside each token; None reports no log-probabilities at all."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(
                f"`max_tokens` must be at least 1, but got {self.max_tokens}: ask for a token"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"`temperature` must be finite and not negative, but got {self.temperature}: "
                "use 0 for greedy sampling, 1 for the model's own distribution"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"`top_p` must lie in (0, 1], but got {self.top_p}: 1 keeps all tokens"
            )
        if self.top_k < 0:
            raise ValueError(
                f"`top_k` must not be negative, but got {self.top_k}: 0 keeps all tokens"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(
                f"`logprobs` must lie between 0 and {MAX_LOGPROBS}, but got {self.logprobs}: "
                "ask for fewer alternatives, or leave it out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt and what to do with it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float = 0.0
    """When it came, on the caller's clock; decides nothing but what is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token."""

    request_id: str
    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability, before temperature, top-k and top-p."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvent:
    """The end of a request; nothing of it follows."""

    request_id: str
    reason: FinishReason
    """`stop`: an end-of-sequence or stop token, which is the last TokenEvent."""
    num_prompt_tokens: int
    num_generated_tokens: int
    message: str = ""
    """What went wrong, for `error`."""


Event = TokenEvent | FinishEvent
OnEvent = Callable[[Event], None]
"""Called from the engine's thread: it must not block and must not raise."""


class RequestRejected(RuntimeError):  # noqa: N818 - the name the server and the HTTP status go by
    """A request that was not taken, with the HTTP status that says why."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        """Keep the parts.

        Args:
            status: 400 bad request, 413 too long, 429 queue full, 503 shutting down.
            message: rule, value, remedy.
            retry_after_s: when to try again, for 429 and 503.
        """
        super().__init__(status, message, retry_after_s)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine at one instant; totals count since its start."""

    running: int = 0
    """Requests with pages on the device."""
    waiting: int = 0
    """Admitted to the queue, without pages."""
    swapped: int = 0
    """Preempted: their pages lie in host memory."""
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    tokens_generated_total: int = 0
    prompt_tokens_total: int = 0
    """Prompt tokens computed or taken from the cache of finished requests."""
    preemptions_total: int = 0
    steps_total: int = 0
    last_step_s: float = 0.0
    plan_in_use: str = ""
    """`sequential`, `overlapped` ... of the last step, with the reason where it is a fallback."""
    bucket_tokens: int = 0
    """Rows of the last step's dense batch."""
    requests_finished_total: int = 0
    requests_cancelled_total: int = 0
    padding_rows_total: int = 0
    eager_steps_total: int = 0
    """Steps whose layout no captured graph had."""
    eager_why: str = ""
    """Why the first of them had none; empty where there are none."""
    replaced_kernels: tuple[str, ...] = ()
    """The plan's kernels that others stand in for, one remark each."""
    host_s_total: float = 0.0
    """Time in which the engine thread worked for its steps rather than waited for the device."""
    step_s_total: float = 0.0
    prefix_tokens_total: int = 0
    """Prompt tokens whose keys came back from the offload store."""
    offload_host_bytes: int = 0
    offload_disk_bytes: int = 0
    swap_bytes_total: int = 0
