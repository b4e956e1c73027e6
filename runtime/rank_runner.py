"""One runner for all tensor-parallel ranks: rank 0 tells the others each step.

Rank 0 holds the engine and decides; what a rank needs for a step are few numbers (`StepInputs`),
which every rank lays out by itself. They travel over a gloo group, from host to host, so that
telling takes no time of the devices.

    group = step_group()                              # on every rank
    Engine(..., lambda: LeadingRunner(runner, group)) # on rank 0
    follow(runner, group)                             # on the others, until rank 0 closes
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .model_runner import Launched, Sampled
from .step import StepInputs

if TYPE_CHECKING:
    from .step_watch import Runner

_PATIENCE = timedelta(days=365)
"""An idle engine tells nothing for as long as nobody asks."""


def step_group() -> Any:  # noqa: ANN401 - process group
    """A group of all ranks that carries steps; every rank must make it at the same point."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


class LeadingRunner:
    """The runner of rank 0: what it queues, every rank queues."""

    def __init__(self, runner: Runner, group: Any) -> None:  # noqa: ANN401
        """Take over a rank's runner."""
        self._runner, self._group = runner, group

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step on all ranks."""
        dist.broadcast_object_list([inputs], src=0, group=self._group)
        return self._runner.launch(inputs)

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled, once it has run; all ranks sampled the same."""
        return self._runner.collect(launched)

    def close(self) -> None:
        """End the other ranks' `follow` and give everything back."""
        dist.broadcast_object_list([None], src=0, group=self._group)
        self._runner.close()


def follow(runner: Runner, group: Any) -> None:  # noqa: ANN401
    """Queue what rank 0 queues until it closes."""
    while True:
        box: list[StepInputs | None] = [None]
        dist.broadcast_object_list(box, src=0, group=group)
        if box[0] is None:
            break
        runner.launch(box[0])
    runner.close()
