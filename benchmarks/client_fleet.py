"""Clients in several processes that send one schedule together, so that none is the limit.

Each process has every n-th request, so bursts are spread as well as all else. Times are those of
`time.perf_counter`, which on Linux is CLOCK_MONOTONIC: one clock for all processes. Prompts follow
from seed and place of a request alone, whatever the number of processes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from sse_client import Endpoint, Streamed, stream

from nanoflow_tune.profiler.latency import Served
from nanoflow_tune.profiler.traffic import PlannedRequest

MOST_PROCESSES = 8
WARM_UP = PlannedRequest(at_s=0.0, prompt_tokens=16, decode_tokens=4)
NUM_WARM_UPS = 2
"""Of each process before the run; they do not count."""
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 10, 250
"""Prompts are drawn from ids that every vocabulary has, special ones mostly left out."""
_HEAD_START_S = 0.2
"""Between the word to start and the first request: all processes must have heard it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process is to send."""

    endpoint: Endpoint
    model: str
    seed: int
    requests: tuple[tuple[int, PlannedRequest], ...]
    """Each with its place in the whole schedule."""


def default_processes() -> int:
    """One core is left to the server, on a machine with few."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1))


def send_all(
    endpoint: Endpoint, model: str, traffic: Sequence[PlannedRequest], seed: int, processes: int
) -> list[Served | str]:
    """Send requests when they are due; what became of each, in their order.

    Args:
        endpoint: of the server.
        model: name by which it knows its model.
        traffic: requests, with times from the start on.
        seed: of the prompts.
        processes: how many share the work.

    Raises:
        ValueError: a process ended early, or the warm-up failed.
    """
    if sys.platform != "linux" and processes > 1:
        raise ValueError(
            f"several client processes need one clock, which is known of Linux alone, but got "
            f"--processes {processes} on {sys.platform}; give --processes 1"
        )
    numbered = tuple(enumerate(traffic))
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Connection, multiprocessing.process.BaseProcess]] = []
    try:
        for place in range(min(processes, len(numbered))):
            here, there = context.Pipe()
            share = Share(
                endpoint=endpoint,
                model=model,
                seed=seed,
                requests=numbered[place::processes],
            )
            process = context.Process(target=work, args=(there, share), daemon=True)
            process.start()
            there.close()
            workers.append((here, process))
        for here, _ in workers:
            _said(here)
        start_s = time.perf_counter() + _HEAD_START_S
        for here, _ in workers:
            here.send(start_s)
        results = dict[int, Served | str]()
        for here, _ in workers:
            results |= _said(here)
    finally:
        for here, process in workers:
            here.close()
            process.join(10)
            if process.is_alive():
                process.terminate()
    return [results[place] for place, _ in numbered]


def _said(worker: Connection) -> dict[int, Served | str]:
    try:
        said = worker.recv()
    except EOFError:
        raise ValueError("a client process ended before its requests did; see its error") from None
    if isinstance(said, str):
        raise ValueError(f"every warm-up request must be served, but: {said}; look at the server")
    return said


def work(parent: Connection, share: Share) -> None:
    """One process: warm up, say so, wait for the start, send, give what came of it."""
    warm_ups = [
        share.endpoint.post(_body(WARM_UP, share, len(share.requests) + place))
        for place in range(NUM_WARM_UPS)
    ]
    posts = [share.endpoint.post(_body(planned, share, place)) for place, planned in share.requests]
    if error := asyncio.run(_warm_up(share.endpoint, warm_ups)):
        parent.send(error)
        return
    parent.send({})
    gc.freeze()  # nothing made so far is looked at again while others wait for their tokens
    results = asyncio.run(_send(share, posts, parent.recv()))
    parent.send(results)


async def _warm_up(endpoint: Endpoint, posts: Sequence[bytes]) -> str:
    replies = await asyncio.gather(*(stream(endpoint, post) for post in posts))
    return next((reply.error for reply in replies if reply.error), "")


async def _send(share: Share, posts: Sequence[bytes], start_s: float) -> dict[int, Served | str]:
    async def one(planned: PlannedRequest, post: bytes) -> Served | str:
        await asyncio.sleep(max(0.0, start_s + planned.at_s - time.perf_counter()))
        return outcome(planned, await stream(share.endpoint, post), start_s)

    requests = [planned for _, planned in share.requests]
    results = await asyncio.gather(*map(one, requests, posts))
    return dict(zip((place for place, _ in share.requests), results, strict=True))


def outcome(planned: PlannedRequest, reply: Streamed, start_s: float) -> Served | str:
    """A request that got exactly its tokens, or why not."""
    if reply.error:
        return reply.error
    if reply.num_tokens != planned.decode_tokens:
        return f"{reply.num_tokens} tokens came, not {planned.decode_tokens}"
    return Served(
        due_s=planned.at_s,
        sent_s=reply.sent_s - start_s,
        first_token_s=reply.first_token_s - start_s,
        end_s=reply.end_s - start_s,
        prompt_tokens=planned.prompt_tokens,
        decode_tokens=reply.num_tokens,
    )


def _body(planned: PlannedRequest, share: Share, place: int) -> bytes:
    rng = np.random.default_rng((share.seed, place))
    ids = FIRST_TOKEN_ID + rng.integers(NUM_TOKEN_IDS, size=planned.prompt_tokens)
    return json.dumps(
        {
            "model": share.model,
            "prompt": ids.tolist(),
            "max_tokens": planned.decode_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
    ).encode()
