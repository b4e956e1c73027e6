"""The engine: takes requests from any thread, and runs steps in one thread of its own.

    form step i + 1 -> queue it -> wait for step i -> hand its tokens out -> ...

A step is formed and queued while the one before runs, so the device never waits for the host as
long as forming takes less time than running. The price: the end of a request is seen one step late,
and the row that it had by then is dropped.

With a latency target, the dense batch is the largest whose step time (measured, else predicted by
the plan) keeps the limit for time between tokens, and a request whose first token would come too
late is refused with the time to try again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace

import numpy as np

from .engine_config import EngineConfig
from .gpu_failures import GpuFailureError, explained
from .model_runner import Launched, Sampled
from .page_pool import PagePool
from .plan_choice import Choice, Chosen, PlanBook
from .prefix_index import PrefixIndex
from .scheduler import Scheduler
from .scheduler_records import Step
from .sequence import EngineStats, GenerationRequest, OnEvent, RequestRejected, TokenEvent
from .step_watch import GivenUpError, Runner, WatchedRunner

_LOGGER = logging.getLogger(__name__)
_POLL_S, _LAST_S = 0.5, 10.0
_SMOOTHING = 0.1
"""Weight of the last step in the running mean of step times."""


@dataclass(slots=True)
class _Clock:
    """Where the time goes."""

    measured_s: dict[int, float] = field(default_factory=dict[int, float])
    """Mean time of a step by rows of its dense batch."""
    last_step_s: float = 0.0
    step_s: float = 0.0
    host_s: float = 0.0
    steps: int = 0
    eager_steps: int = 0
    padding_rows: int = 0
    last_end_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: Step
    launched: Launched
    rows: int
    began_s: float
    follows: bool
    """Queued while another step ran, so that the time between ends is its own."""


class Engine:
    """Thread-safe front of a scheduler and a runner; see the module."""

    def __init__(
        self,
        config: EngineConfig,
        book: PlanBook,
        make_runner: Callable[[], Runner],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            config: sizes and limits.
            book: what steps may run; the runner has the same.
            make_runner: called in the engine's thread, which then owns the device.
            clock: seconds.

        Raises:
            ValueError: more requests than rows may run at once.
        """
        limits = config.limits
        if limits.max_running > book.max_rows:
            raise ValueError(
                "`max_running` must be at most the rows of the largest dense batch, but got "
                f"max_running={limits.max_running}, rows={book.max_rows}: each running request "
                "needs a row"
            )
        self.config, self._book = config, book
        self._make_runner, self._now = make_runner, clock
        index = PrefixIndex(config.offload_host_pages, config.offload_disk_pages, config.page_size)
        self._index = index
        self._scheduler = Scheduler(
            limits,
            PagePool(config.num_pages, config.page_size),
            frozenset(config.eos_token_ids),
            index,
            config.seed,
        )
        self._wake = threading.Condition()
        self._arrivals: deque[tuple[GenerationRequest, OnEvent]] = deque()
        self._arriving: set[str] = set()
        self._cancelled: deque[str] = deque()
        self._thread: threading.Thread | None = None
        self._is_closing = self._is_ready = False
        self._deadline_s = float("inf")
        self._failure: BaseException | None = None
        self._runner: WatchedRunner | None = None
        self._time = _Clock()
        self._stats = EngineStats(kv_pages_total=config.num_pages, replaced_kernels=book.replaced)

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return self.config.model_name

    @property
    def max_model_len(self) -> int:
        """Most prompt and generated tokens of a request."""
        return self.config.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a request unless it says otherwise."""
        return self.config.eos_token_ids

    @property
    def stats(self) -> EngineStats:
        """As of the last step."""
        return self._stats

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine; None while it is well. A step beyond its limit ends it, too."""
        given_up = self._runner.failure() if self._runner is not None else None
        if self._failure is None and given_up is not None:
            self._fail(given_up)  # its thread waits for the device
        return self._failure

    def give_up(self, why: GpuFailureError) -> None:
        """Fail for a reason that the engine's thread cannot see; from any thread, at any time."""
        if self._runner is not None:
            self._runner.give_up(why)

    def start(self) -> None:
        """Start the engine's thread and wait until its runner is made.

        Raises:
            Exception: whatever making the runner raised.
        """
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        with self._wake:
            self._wake.wait_for(lambda: self._is_ready or self._failure is not None)
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def close(self, timeout_s: float = 10.0) -> None:
        """Admit nothing more, let running requests finish, cancel what is left, end the thread."""
        with self._wake:
            self._is_closing = True
            self._deadline_s = self._now() + timeout_s
            self._wake.notify_all()
        thread = self._thread
        while thread is not None and thread.is_alive() and self.failure is None:
            thread.join(_POLL_S)
        is_given_up = self._runner is not None and self._runner.failure() is not None
        if thread is not None and not is_given_up:
            thread.join(_LAST_S)  # what failed may leave the device in no state to be given back

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Take a request; its events come from the engine's thread.

        Raises:
            RequestRejected: the request can never run (400, 413), too many wait or it would wait
                too long (429), or the engine ends (503).
        """
        token_ids = request.prompt_token_ids
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            bad = next(t for t in token_ids if not 0 <= t < self.vocab_size)
            raise RequestRejected(
                400, f"token ids must lie in [0, {self.vocab_size}), but got {bad}"
            )
        with self._wake:
            if self._is_closing or self._failure is not None or self._thread is None:
                raise RequestRejected(503, "the engine is shutting down: send elsewhere", 10.0)
            if request.request_id in self._arriving:
                raise RequestRejected(400, f"request {request.request_id!r} is waiting already")
            self._scheduler.check(request, len(self._arrivals))
            self._check_ttft()
            self._arrivals.append((request, on_event))
            self._arriving.add(request.request_id)
            self._wake.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request; nothing happens when it has ended already."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify_all()

    def _check_ttft(self) -> None:
        limit_s = self.config.latency.ttft_s
        if limit_s is None:
            return
        rows = self._max_rows()
        ahead = sum(len(request.prompt_token_ids) for request, _ in self._arrivals)
        ahead += self._scheduler.num_queued_prompt_tokens
        step_s = self._book.step_s(self._size_of(rows), self._time.measured_s)
        free = max(1, rows - len(self._scheduler.running))
        wait_s = (ahead // free + 2) * step_s
        if wait_s > limit_s:
            raise RequestRejected(
                429,
                f"the first token would come in about {wait_s:.2f} s, but the limit is "
                f"{limit_s:.2f} s: try again later",
                wait_s - limit_s,
            )

    def _max_rows(self) -> int:
        limit_s = self.config.latency.tpot_s
        if limit_s is None:
            return max(self._book.target_rows, len(self._scheduler.running))
        return self._book.rows_within(limit_s, self._time.measured_s)

    def _size_of(self, rows: int) -> int:
        return next(size for size in self._book.sizes if size >= rows)

    def _run(self) -> None:
        try:
            runner = self._make_runner()
            self._runner = WatchedRunner(runner, self.config.step_timeout_s, self._now)
            with self._wake:
                self._is_ready = True
                self._wake.notify_all()
            self._loop(self._runner)
        except GivenUpError:  # whoever noticed tells the requests
            return
        except BaseException as err:  # the thread's boundary: every request must hear of it
            if self._failure is not None:
                return
            what = "a step" if self._is_ready else "the start"
            self._fail(explained(err, what, self.config.memory_remedy))
        finally:
            if self._runner is not None:
                with suppress(Exception) if self._failure is not None else nullcontext():
                    self._runner.close()

    def _fail(self, err: BaseException) -> None:
        """End every request with an error, and take no more."""
        with self._wake:
            self._failure = err
            arrived = list(self._arrivals)
            self._arrivals.clear()
            self._wake.notify_all()
        for request, on_event in arrived:
            self._scheduler.add(request, on_event)
        told = err.cause if isinstance(err, GpuFailureError) else f"{type(err).__name__}: {err}"
        self._scheduler.fail_all(f"the engine failed: {told}")
        self._publish()

    def _loop(self, runner: Runner) -> None:
        in_flight: _InFlight | None = None
        while self._take_orders(is_idle=in_flight is None):
            began_s = self._now()
            step = self._scheduler.schedule(self._max_rows())
            queued = None
            if step is not None:
                queued = self._launch(runner, step, began_s, follows=in_flight is not None)
            self._time.host_s += self._now() - began_s
            if in_flight is not None:
                sampled = runner.collect(in_flight.launched)
                self._count(in_flight)
                began_s = self._now()
                self._scheduler.update(
                    in_flight.step, sampled.token_ids, _details(in_flight.step, sampled)
                )
                self._time.host_s += self._now() - began_s
            in_flight = queued
            self._publish()

    def _launch(self, runner: Runner, step: Step, began_s: float, *, follows: bool) -> _InFlight:
        chosen = self._choose(step)
        inputs = replace(step.inputs, choice=chosen.choice.key)
        launched = runner.launch(inputs)
        clock = self._time
        clock.steps += 1
        if launched.is_eager:
            self._count_eager(chosen.choice)
        clock.padding_rows += chosen.choice.rows - step.num_rows
        self._stats = replace(
            self._stats, plan_in_use=chosen.label, bucket_tokens=chosen.choice.rows
        )
        return _InFlight(step, launched, chosen.choice.rows, began_s, follows)

    def _count_eager(self, choice: Choice) -> None:
        """The device may wait for the host in such a step, so the first one is said aloud."""
        self._time.eager_steps += 1
        if not self._stats.eager_why:
            names = ", ".join(choice.host_planned)
            why = f"{names} plans on the host" if names else "it was not captured"
            self._stats = replace(self._stats, eager_why=f"{choice.key}: {why}")
            _LOGGER.warning(
                "steps run without CUDA graphs, op by op, which costs throughput (%s): tune again, "
                "or give kernels that a graph holds",
                self._stats.eager_why,
            )

    def _choose(self, step: Step) -> Chosen:
        positions_R = step.inputs.decode_positions_R
        decodes = len(positions_R)
        mean = float(np.mean(positions_R)) + 1 if decodes else 0.0
        return self._book.choose(decodes, step.num_rows - decodes, mean)

    def _count(self, done: _InFlight) -> None:
        """Time of a step: between the ends of two that follow each other, or from its start."""
        now_s, clock = self._now(), self._time
        began_s = clock.last_end_s if done.follows else done.began_s
        clock.last_end_s = now_s
        clock.last_step_s = now_s - began_s
        clock.step_s += clock.last_step_s
        mean = clock.measured_s.get(done.rows, clock.last_step_s)
        clock.measured_s[done.rows] = mean + _SMOOTHING * (clock.last_step_s - mean)

    def _take_orders(self, *, is_idle: bool) -> bool:
        """Take in arrivals and cancellations; wait for some when idle. False ends the loop."""
        with self._wake:
            while is_idle and not (
                self._arrivals or self._cancelled or self._is_closing or self._scheduler.has_work
            ):
                self._wake.wait()
            is_late = self._now() >= self._deadline_s
            arrivals, cancelled = list(self._arrivals), list(self._cancelled)
            self._arrivals.clear()
            self._arriving.clear()
            self._cancelled.clear()
        for request, on_event in arrivals:
            self._scheduler.add(request, on_event)
        for request_id in cancelled:
            self._scheduler.cancel(request_id)
        if self._is_closing and is_late:
            self._scheduler.cancel_all()
        return not (self._is_closing and is_idle and not self._scheduler.has_work)

    def _publish(self) -> None:
        scheduler, clock, config = self._scheduler, self._time, self.config
        totals = scheduler.totals
        self._stats = replace(
            self._stats,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            swapped=len(scheduler.swapped),
            kv_pages_used=scheduler.pool.num_used,
            tokens_generated_total=totals.generated,
            prompt_tokens_total=totals.prompt,
            preemptions_total=totals.preemptions,
            steps_total=clock.steps,
            last_step_s=clock.last_step_s,
            requests_finished_total=totals.finished,
            requests_cancelled_total=totals.cancelled,
            padding_rows_total=clock.padding_rows,
            eager_steps_total=clock.eager_steps,
            host_s_total=clock.host_s,
            step_s_total=clock.step_s,
            prefix_tokens_total=totals.prefix,
            offload_host_bytes=self._index.host_used * config.page_bytes,
            offload_disk_bytes=self._index.disk_used * config.page_bytes,
            swap_bytes_total=totals.swapped_pages * config.page_bytes,
        )


def _details(step: Step, sampled: Sampled) -> list[TokenEvent] | None:
    """Events with the log-probabilities that each request asked for; None when none did."""
    if sampled.logprobs is None:
        return None
    events: list[TokenEvent] = []
    for row, (sequence, token) in enumerate(zip(step.predicting, sampled.token_ids, strict=True)):
        wanted = sequence.request.sampling.logprobs
        top = sampled.top_logprobs[row][:wanted] if sampled.top_logprobs and wanted else []
        events.append(
            TokenEvent(
                request_id=sequence.request.request_id,
                token_id=token,
                logprob=None if wanted is None else sampled.logprobs[row],
                top_logprobs=tuple(top),
            )
        )
    return events
