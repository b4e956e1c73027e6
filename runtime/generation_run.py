"""The choices of one HTTP request on the engine: submitted together, streamed, cancelled together.

The engine calls back from its own thread; `EventBridge` carries events into the event loop, waking
it once a step, not once a token. A stream that keeps up is given one token at a time; one that is
behind (its client, or the whole server) gets all that has come at once, so that it catches up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Protocol

from .choice import Choice, ChoiceDelta
from .metrics import ServerMetrics
from .sequence import EngineStats, Event, GenerationRequest, OnEvent, RequestRejected

_MANY_EVENTS = 32
_GATHER_S = 1e-3
"""About as long as an engine takes to hand out a step's tokens to some hundred streams."""


class ServingEngine(Protocol):
    """What the server needs of an engine; `engine.Engine` is one."""

    def start(self) -> None:
        """Start its thread."""
        ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop admitting, finish or cancel what runs, end its thread."""
        ...

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Take a request.

        Raises:
            RequestRejected: it was not taken.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request; nothing happens when it has ended already."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine at this instant."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What ended its thread; None while it is well."""
        ...

    @property
    def model_name(self) -> str:
        """Name of the model."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...


class EventBridge:
    """Carries events from the engine's thread into the event loop, to the runs they belong to."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver into this loop."""
        self._loop = loop
        self._events: deque[tuple[Arrivals, int, Event]] = deque()
        self._is_scheduled = False
        self._num_delivered = 0

    def listener(self, arrivals: Arrivals, place: int) -> OnEvent:
        """A callback for the engine that adds (place, event) to some arrivals."""
        return partial(self._post, arrivals, place)

    def _post(self, arrivals: Arrivals, place: int, event: Event) -> None:
        self._events.append((arrivals, place, event))
        # Reset before the deque is emptied: an event is either seen by that turn or wakes another.
        if not self._is_scheduled:
            self._is_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        # The engine hands out a step's tokens one after the other. To write the first of many at
        # once would take the interpreter away from it between each two of them.
        if self._num_delivered >= _MANY_EVENTS:
            self._loop.call_later(_GATHER_S, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        self._is_scheduled = False
        # Counted first: an engine that goes on posting must not keep the streams from their turn.
        self._num_delivered = len(self._events)
        for _ in range(self._num_delivered):
            arrivals, place, event = self._events.popleft()
            arrivals.add(place, event)


class Arrivals:
    """Events of one run that nobody has taken yet; belongs to the event loop."""

    __slots__ = ("_events", "_waiting")

    def __init__(self) -> None:
        """Start empty."""
        self._events: list[tuple[int, Event]] = []
        self._waiting: asyncio.Future[None] | None = None

    def add(self, place: int, event: Event) -> None:
        """Put an event of the choice at some place."""
        self._events.append((place, event))
        if (waiting := self._waiting) is not None:
            self._waiting = None
            if not waiting.done():  # cancelled: whoever waited has left
                waiting.set_result(None)

    async def take(self) -> list[tuple[int, Event]]:
        """All that has come, in order; waits for one event at least. One taker at a time."""
        while not self._events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        events, self._events = self._events, []
        return events


class GenerationRun:
    """The choices of one HTTP request while the engine works on them."""

    def __init__(
        self,
        engine: ServingEngine,
        bridge: EventBridge,
        metrics: ServerMetrics,
        choices: Sequence[Choice],
    ) -> None:
        """Submit all choices, or none.

        Raises:
            RequestRejected: the engine took one not, so the others were withdrawn.
        """
        self.choices = tuple(choices)
        self._engine = engine
        self._metrics = metrics
        self._arrivals = Arrivals()
        self._submitted: list[Choice] = []
        self._num_unfinished = len(self.choices)
        self._start_s = time.perf_counter()
        self._first_token_s: dict[int, float] = {}
        self._counted: set[int] = set()
        try:
            for place, choice in enumerate(self.choices):
                engine.submit(choice.request, bridge.listener(self._arrivals, place))
                self._submitted.append(choice)
        except RequestRejected as err:
            metrics.rejected(err.status)
            self.close()
            raise

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self._num_unfinished == 0

    async def turns(self) -> AsyncIterator[list[ChoiceDelta]]:
        """What comes, until all choices have ended: each turn has a delta of each choice with news.

        Tokens that came while the caller was busy are one turn, and one delta for each choice.
        """
        while not self.is_finished:
            arrived = await self._arrivals.take()
            by_choice: dict[int, list[Event]] = {}
            for place, event in arrived:
                by_choice.setdefault(place, []).append(event)
            news = list[ChoiceDelta]()
            for place, events in by_choice.items():
                delta = self._take(place, events)
                if not delta.is_empty:
                    news.append(delta)
            if news:
                yield news

    def close(self) -> None:
        """Cancel what the engine still works on, and count it; may be called twice."""
        for place, choice in enumerate(self._submitted):
            if not choice.is_engine_done:
                self._engine.cancel(choice.request.request_id)
            self._count(place, choice)

    def _take(self, place: int, events: Sequence[Event]) -> ChoiceDelta:
        choice = self.choices[place]
        was_finished = choice.is_finished
        delta = choice.push(events)
        if delta.token_ids and place not in self._first_token_s:
            self._first_token_s[place] = now_s = time.perf_counter()
            self._metrics.first_token(now_s - self._start_s)
        if choice.is_finished and not was_finished:
            self._num_unfinished -= 1
            if choice.needs_cancel:
                self._engine.cancel(choice.request.request_id)
            self._count(place, choice)
            return delta
        # After its end a choice has nothing new; only the engine's last word comes.
        return delta if not was_finished else _nothing(choice)

    def _count(self, place: int, choice: Choice) -> None:
        if place in self._counted:
            return
        self._counted.add(place)
        self._metrics.finished(
            reason=choice.finish_reason or "cancelled",
            num_prompt_tokens=len(choice.request.prompt_token_ids),
            num_generated_tokens=choice.num_generated_tokens,
            first_token_s=self._first_token_s.get(place, self._start_s) - self._start_s,
            whole_s=time.perf_counter() - self._start_s,
        )


def _nothing(choice: Choice) -> ChoiceDelta:
    return ChoiceDelta(index=choice.index, text="", token_ids=(), records=(), finish_reason=None)
