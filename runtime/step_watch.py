"""Notices that the device does not end a step.

A thread that waits for a GPU in a driver's call cannot be interrupted, and the collectives of a
replayed CUDA graph have no time-out of their own. So another thread asks now and then how long the
step under way has taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .gpu_failures import StalledStepError

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
        self._lock = threading.Lock()
        self._since_s: float | None = None
        self._stalled: StalledStepError | None = None

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step.

        Raises:
            StalledStepError: it came back after it had been given up.
        """
        self._begin()
        launched = self._runner.launch(inputs)
        self._end()
        return launched

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled, once it has run.

        Raises:
            StalledStepError: it came back after it had been given up.
        """
        self._begin()
        sampled = self._runner.collect(launched)
        self._end()
        return sampled

    def close(self) -> None:
        """Give everything back."""
        self._runner.close()

    def stalled(self) -> StalledStepError | None:
        """The error of a call that takes too long, from any thread; from then on it is given up."""
        with self._lock:
            since_s = self._since_s
            if self._stalled is None and since_s is not None:
                took_s = self._now() - since_s
                if took_s > self._limit_s:
                    self._stalled = StalledStepError(
                        f"a step must end within {self._limit_s:g} s, but has not after "
                        f"{took_s:.0f} s: a GPU or a link hangs, or a rank never came to a "
                        "collective; `nvidia-smi` shows whether the GPUs answer. Start again, and "
                        "raise --step-timeout where steps do take that long"
                    )
            return self._stalled

    def _begin(self) -> None:
        with self._lock:
            self._since_s = self._now()

    def _end(self) -> None:
        with self._lock:
            self._since_s = None
            if self._stalled is not None:
                raise self._stalled
