"""Serving on several GPUs: one process a rank; that of rank 0 holds engine and HTTP server.

The process that the operator started waits, and passes SIGTERM and SIGINT on to rank 0.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from .gpu_failures import CollectiveError, memory_for
from .launch import PEER_FAILED, DeviceType, RankContext, RankGroup

_FOR_EVER_S = 365 * 86400.0
"""How long a rank may serve before it counts as hung."""


def serve_on_ranks(options: argparse.Namespace, num_ranks: int, device: DeviceType) -> None:
    """Serve until a signal comes.

    Args:
        options: of the command line; every rank reads its inputs anew.
        num_ranks: tensor-parallel degree.
        device: what each rank runs on.

    Raises:
        GpuFailureError: a rank died, or ran out of memory.
        RankError: a rank crashed.
        ValueError: a rank met bad input.
    """
    with RankGroup(num_ranks, device, timeout_s=_FOR_EVER_S) as ranks:
        (leader, *_) = ranks.call(_process_id)
        with _passing_signals_to(leader):
            ranks.call(_serve_rank, options)


def _process_id(context: RankContext) -> int:
    del context
    return os.getpid()


def _serve_rank(context: RankContext, options: argparse.Namespace) -> None:
    from .rank_runner import LeadingRunner, follow, step_group
    from .server import read_inputs, serve_http

    setting, text = read_inputs(options, say=lambda _: None)  # the parent has said it
    if context.rank == 0:
        engine = setting.engine(lambda: LeadingRunner(setting.make_runner(context), step_group()))
        why = CollectiveError("another rank has failed: it is told by the process that started all")
        signal.signal(PEER_FAILED, lambda _, __: engine.give_up(why))
        serve_http(options, text, engine)
        return
    runner, group = setting.make_runner(context), step_group()
    with memory_for("a step", setting.config.memory_remedy):
        follow(runner, group)


@contextmanager
def _passing_signals_to(process_id: int) -> Generator[None, None, None]:
    def forward(number: int, frame: FrameType | None) -> None:
        del number, frame
        os.kill(process_id, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
