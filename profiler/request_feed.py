"""Sends a run's requests to an engine, all at once or when each is due, and notes when tokens come.

An open loop: a request is sent when it is due, whatever has become of those before. No torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ..runtime.sequence import Event, FinishEvent, GenerationRequest, OnEvent
from .latency import Served

Submit = Callable[[GenerationRequest, OnEvent], None]


class RequestFeed:
    """One run of some requests."""

    def __init__(self, requests: Sequence[GenerationRequest], due_s: Sequence[float]) -> None:
        """Send nothing yet.

        Args:
            requests: in order of arrival; ids are their places.
            due_s: seconds after the start, one each and ascending; none: all at once.
        """
        assert not due_s or len(due_s) == len(requests)
        self.failures: list[str] = []
        """Why requests were not served whole."""
        self.elapsed_s = 0.0
        self._requests, self._due_s = requests, due_s
        self._sent_s: dict[str, float] = {}
        self._first_s: dict[str, float] = {}
        self._end_s: dict[str, float] = {}
        self._done = threading.Semaphore(0)
        self._began_s = 0.0

    def run(self, submit: Submit, tick: Callable[[float], None], every_s: float | None) -> None:
        """Send all of them and wait until the last has ended.

        Args:
            submit: of the engine.
            tick: called with the seconds since the start while waiting.
            every_s: how often at least; None: when a request ends.
        """
        self._began_s = time.perf_counter()
        on_event = self._on_timed if self._due_s else self._on_event
        for place, request in enumerate(self._requests):
            if self._due_s:
                self._wait_for(self._due_s[place], tick, every_s)
                self._sent_s[request.request_id] = self._now_s()
            submit(request, on_event)
        for _ in self._requests:
            is_done = False
            while not is_done:
                is_done = self._done.acquire(timeout=every_s)
                tick(self._now_s())
        self.elapsed_s = self._now_s()

    def served(self) -> list[Served]:
        """Times of the requests of a run that had due times; empty of others."""
        if not self._due_s:
            return []
        return [
            Served(
                due_s=due_s,
                sent_s=self._sent_s[request.request_id],
                first_token_s=self._first_s[request.request_id],
                end_s=self._end_s[request.request_id],
                prompt_tokens=len(request.prompt_token_ids),
                decode_tokens=request.sampling.max_tokens,
            )
            for request, due_s in zip(self._requests, self._due_s, strict=True)
        ]

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def _wait_for(self, due_s: float, tick: Callable[[float], None], every_s: float | None) -> None:
        while (left_s := due_s - self._now_s()) > 0:
            time.sleep(left_s if every_s is None else min(left_s, every_s))
            tick(self._now_s())

    def _on_event(self, event: Event) -> None:
        """Of the engine's thread: as little as may be."""
        if isinstance(event, FinishEvent):
            if event.reason != "length":
                self.failures.append(
                    f"{event.request_id} ended with {event.reason}: {event.message}"
                )
            self._done.release()

    def _on_timed(self, event: Event) -> None:
        if isinstance(event, FinishEvent):
            self._end_s[event.request_id] = self._now_s()
        elif event.request_id not in self._first_s:
            self._first_s[event.request_id] = self._now_s()
        self._on_event(event)
