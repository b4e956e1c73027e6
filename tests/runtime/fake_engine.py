"""An engine without a model: it answers with the prompt's own tokens, turned by the seed.

Answer token i is prompt[(i + seed) % length], end tokens left out; after as many tokens as those
comes the end token. It runs in threads like the real one. It can hold still (`may_go_on`), and wait
for ever after `holds_at` tokens of a request until that is cancelled.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

from nanoflow_tune.runtime.sequence import (
    EngineStats,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    OnEvent,
    RequestRejected,
    TokenEvent,
)

LOGPROB = -0.5


class FakeEngine:
    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int = 256,
        max_requests: int = 64,
        fails_with: str = "",
        holds_at: int | None = None,
    ) -> None:
        self.model_name = "echo"
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.stats = EngineStats(kv_pages_total=100, plan_in_use="sequential (7 keys)")
        self.failure: BaseException | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.is_closed = False
        self._max_requests = max_requests
        self._fails_with = fails_with
        self._holds_at = holds_at
        self._live: set[str] = set()
        self._inbox: queue.Queue[tuple[GenerationRequest, OnEvent] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._changed = threading.Condition()

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        self.is_closed = True
        with self._changed:
            self._changed.wait_for(lambda: not self._live, timeout_s)
            self._live.clear()
            self._changed.notify_all()
        self._inbox.put(None)
        self.may_go_on.set()
        self._thread.join(timeout_s)

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        if self.is_closed:
            raise RequestRejected(503, "the engine is shutting down: send elsewhere", 10.0)
        if len(self._live) >= self._max_requests:
            raise RequestRejected(429, "the queue is full; try again later", retry_after_s=2.5)
        self.submitted.append(request)
        self._live.add(request.request_id)
        self._inbox.put((request, on_event))

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._live.discard(request_id)
            self.cancelled.append(request_id)
            self._changed.notify_all()

    def wait_until_cancelled(self, request_id: str, timeout_s: float = 10.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: request_id in self.cancelled, timeout_s)

    def _loop(self) -> None:
        while (item := self._inbox.get()) is not None:
            threading.Thread(target=self._run, args=item, daemon=True).start()

    def _run(self, request: GenerationRequest, on_event: OnEvent) -> None:
        num_generated = 0
        reason: FinishReason = "error" if self._fails_with else "length"
        for token_id in () if self._fails_with else self._answer(request):
            self.may_go_on.wait()
            if num_generated == self._holds_at:
                self._wait_until_gone(request.request_id)
            if request.request_id not in self._live:
                reason = "cancelled"
                break
            num_generated += 1
            on_event(self._event(request, token_id))
            if token_id in self.eos_token_ids and not request.sampling.ignore_eos:
                reason = "stop"
                break
        with self._changed:
            self._live.discard(request.request_id)
            self._changed.notify_all()
        self.stats = replace(
            self.stats, tokens_generated_total=self.stats.tokens_generated_total + num_generated
        )
        on_event(
            FinishEvent(
                request_id=request.request_id,
                reason=reason,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_generated_tokens=num_generated,
                message=self._fails_with,
            )
        )

    def _wait_until_gone(self, request_id: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: request_id not in self._live)

    def _answer(self, request: GenerationRequest) -> Iterator[int]:
        prompt = [i for i in request.prompt_token_ids if i not in self.eos_token_ids]
        seed = request.sampling.seed or 0
        for i in range(request.sampling.max_tokens):
            is_end = i == len(prompt) and not request.sampling.ignore_eos
            yield self.eos_token_ids[0] if is_end else prompt[(i + seed) % len(prompt)]

    def _event(self, request: GenerationRequest, token_id: int) -> TokenEvent:
        count = request.sampling.logprobs
        if count is None:
            return TokenEvent(request_id=request.request_id, token_id=token_id)
        others = ((token_id + k) % self.vocab_size for k in range(count))
        top = tuple((other, LOGPROB - k) for k, other in enumerate(others))
        return TokenEvent(
            request_id=request.request_id, token_id=token_id, logprob=LOGPROB, top_logprobs=top
        )
