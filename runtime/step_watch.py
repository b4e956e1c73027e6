"""Notices that the device does not end a step.

A thread that waits for a GPU in a driver's call cannot be interrupted, and the collectives of a
replayed CUDA graph have no time-out of their own. So another thread asks now and then how long the
step under way has taken, or gives it up because it knows that another rank has failed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from .gpu_failures import GpuFailureError, StalledStepError

if TYPE_CHECKING:
    from .model_runner import Launched, Sampled
    from .step import StepInputs


class Runner(Protocol):
    """What runs steps: a `ModelRunner`, or one that drives several ranks."""

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step."""
        ...

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled, once it has run."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class GivenUpError(Exception):
    """A call came back after it had been given up: its thread must end, and tell nobody."""


class WatchedRunner:
    """A runner whose calls are timed while they last."""

    def __init__(self, runner: Runner, limit_s: float, clock: Callable[[], float]) -> None:
        """Take over a runner.

        Args:
            runner: does the work, in the engine's thread.
            limit_s: a call that takes longer has hung.
            clock: seconds.
        """
        self._runner, self._limit_s, self._now = runner, limit_s, clock
        self._lock = threading.RLock()  # `give_up` may come in a signal handler
        self._since_s: float | None = None
        self._given_up: GpuFailureError | None = None

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step.

        Raises:
            GivenUpError: it came back after it had been given up.
        """
        with self._timed():
            return self._runner.launch(inputs)

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled, once it has run.

        Raises:
            GivenUpError: it came back after it had been given up.
        """
        with self._timed():
            return self._runner.collect(launched)

    def close(self) -> None:
        """Give everything back."""
        self._runner.close()

    def give_up(self, why: GpuFailureError) -> None:
        """Wait for no call any more, from any thread."""
        with self._lock:
            self._given_up = self._given_up or why

    def failure(self) -> GpuFailureError | None:
        """Why calls were given up, from any thread; one that takes too long is, when asked."""
        with self._lock:
            since_s = self._since_s
            if self._given_up is None and since_s is not None:
                took_s = self._now() - since_s
                if took_s > self._limit_s:
                    self._given_up = StalledStepError(
                        f"a step must end within {self._limit_s:g} s, but has not after "
                        f"{took_s:.0f} s: a GPU or a link hangs, or a rank never came to a "
                        "collective; `nvidia-smi` shows whether the GPUs answer. Start again, and "
                        "raise --step-timeout where steps do take that long"
                    )
            return self._given_up

    @contextmanager
    def _timed(self) -> Generator[None, None, None]:
        with self._lock:
            self._since_s = self._now()
        yield  # a call that raises ends the engine: there is nothing left to time
        with self._lock:
            self._since_s = None
            if self._given_up is not None:
                raise GivenUpError
