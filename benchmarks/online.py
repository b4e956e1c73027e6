"""Online latency at a request rate: TTFT, TPOT and normalised latency; figure `online_p99`.

    nanoflow-serve --plan plan.yaml --weights DIR &
    python benchmarks/online.py --url http://127.0.0.1:8000 --peak 27000 --out figures.csv

An open loop: requests are sent when they are due, whatever has become of those before. Their
lengths have a workload's moments, their prompts are random token ids, and answers run to their full
length. `--peak` is the throughput of an offline run in tokens/s, prompts and answers together, of
which `--load` is offered; `--rate` gives requests/s instead. Without either, the peak is measured
first, with all requests at once. Normalised latency is a request's time from when it was due to its
last token, over its tokens. Talks to this machine alone; NANOFLOW_API_KEY holds the key of servers
that want one.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import ipaddress
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from ab import recorded_command
from figures import FigureRow, summary, write_figures

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.profiler.latency import Served, percentiles, summarise
from nanoflow_tune.profiler.traffic import PlannedRequest, plan_traffic
from nanoflow_tune.search_spaces.loader import load_workload

MAX_REQUESTS = 20_000
REACH, MEAN_LIMIT_MS = "<= 2", 200.0
LATE_S = 0.05
"""A client that sends this much later than planned measures itself."""
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 10, 250
"""Prompts are drawn from ids that every vocabulary has, special ones mostly left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run."""

    served: tuple[Served, ...]
    failed: tuple[str, ...]
    """Why requests were not served, one entry each."""

    @property
    def tokens_per_s(self) -> float:
        """Prompt and generated tokens over the whole run, ramps included."""
        tokens = sum(request.prompt_tokens + request.decode_tokens for request in self.served)
        return tokens / max(request.end_s for request in self.served)


def figure(outcome: Outcome, case: str, gpu: str) -> FigureRow:
    """p99 over mean of the normalised latency.

    Raises:
        ValueError: requests failed, or the mean is beyond its limit: the ratio says nothing then.
    """
    if outcome.failed:
        raise ValueError(
            f"every request must be served, but {len(outcome.failed)} were not "
            f"({outcome.failed[0]}); offer less load"
        )
    normalised = summarise(outcome.served)["normalised"]
    if normalised["mean"] > MEAN_LIMIT_MS:
        raise ValueError(
            f"the mean normalised latency must be within {MEAN_LIMIT_MS:g} ms/token, but is "
            f"{normalised['mean']:.1f}; offer less load"
        )
    halves = np.array_split(np.array([1e3 * r.normalised_s for r in outcome.served]), 2)
    ratios = sorted(part["p99"] / part["mean"] for part in map(percentiles, map(list, halves)))
    return FigureRow(
        id="online_p99",
        case=case,
        value=normalised["p99"] / normalised["mean"],
        unit="x",
        reach=REACH,
        spread=f"{ratios[0]:.3f}-{ratios[-1]:.3f}",
        command=recorded_command("online", sys.argv[1:]),
        commit=this_commit(),
        gpu=gpu,
        date=datetime.date.today().isoformat(),
    )


class Client:
    """Sends requests to one server."""

    def __init__(self, http: httpx.AsyncClient, model: str, seed: int) -> None:
        self._http, self._model = http, model
        self._rng = np.random.default_rng(seed)

    async def run(self, traffic: Sequence[PlannedRequest]) -> Outcome:
        """Send all when they are due."""
        bodies = [self._body(request) for request in traffic]
        start_s = time.perf_counter()

        async def one(request: PlannedRequest, body: bytes) -> Served | str:
            await asyncio.sleep(max(0.0, start_s + request.at_s - time.perf_counter()))
            return await self._send(request, body, lambda: time.perf_counter() - start_s)

        results = await asyncio.gather(*map(one, traffic, bodies))
        return Outcome(
            served=tuple(result for result in results if isinstance(result, Served)),
            failed=tuple(result for result in results if isinstance(result, str)),
        )

    def _body(self, request: PlannedRequest) -> bytes:
        ids = FIRST_TOKEN_ID + self._rng.integers(NUM_TOKEN_IDS, size=request.prompt_tokens)
        return json.dumps(
            {
                "model": self._model,
                "prompt": ids.tolist(),
                "max_tokens": request.decode_tokens,
                "ignore_eos": True,
                "return_token_ids": True,
                "stream": True,
            }
        ).encode()

    async def _send(
        self, request: PlannedRequest, body: bytes, now_s: Callable[[], float]
    ) -> Served | str:
        sent_s, first_token_s, num_tokens = now_s(), math.nan, 0
        headers = {"content-type": "application/json"}
        post = self._http.stream("POST", "/v1/completions", content=body, headers=headers)
        try:
            async with post as reply:
                if reply.status_code != 200:
                    return f"{reply.status_code}: {(await reply.aread()).decode()[:300]}"
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return str(chunk["error"])
                    num_new = len(chunk["choices"][0]["token_ids"])
                    if num_new and not num_tokens:
                        first_token_s = now_s()
                    num_tokens += num_new
        except httpx.HTTPError as err:
            return f"{type(err).__name__}: {err}"
        if num_tokens != request.decode_tokens:
            return f"{num_tokens} tokens came, not {request.decode_tokens}"
        return Served(
            due_s=request.at_s,
            sent_s=sent_s,
            first_token_s=first_token_s,
            end_s=now_s(),
            prompt_tokens=request.prompt_tokens,
            decode_tokens=num_tokens,
        )


async def measure(options: argparse.Namespace) -> tuple[Outcome, float]:
    """The run, and the requests/s that were offered."""
    workload = load_workload(options.workload)
    key = os.environ.get("NANOFLOW_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, limits=limits, timeout=None, trust_env=False
    ) as http:
        card = (await http.get("/v1/models")).raise_for_status().json()["data"][0]

        def traffic(rate_per_s: float) -> list[PlannedRequest]:
            return plan_traffic(
                workload,
                num_requests=options.requests,
                rate_per_s=rate_per_s,
                max_tokens=min(options.max_tokens, card["max_model_len"]),
                seed=options.seed,
            )

        client = Client(http, card["id"], options.seed)
        if options.rate is not None:
            return await client.run(traffic(options.rate)), options.rate
        peak = options.peak
        if peak is None:
            burst = await client.run(traffic(math.inf))
            if burst.failed:
                raise ValueError(
                    f"the peak was not found: {burst.failed[0]}; give --peak or --rate"
                )
            peak = burst.tokens_per_s
            print(f"all at once: {peak:.0f} tokens/s", file=sys.stderr)
        planned = traffic(1.0)
        per_request = np.mean(
            [request.prompt_tokens + request.decode_tokens for request in planned]
        )
        rate = options.load * peak / float(per_request)
        return await client.run(traffic(rate)), rate


def table(outcome: Outcome, rate: float) -> str:
    """The latencies, for people."""
    late = sum(request.sent_s - request.due_s > LATE_S for request in outcome.served)
    lines = [
        f"{len(outcome.served)} served, {len(outcome.failed)} failed, {late} sent late, at "
        f"{rate:.2f} requests/s; {outcome.tokens_per_s:.0f} tokens/s",
        f"{'ms':>12}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name, values in summarise(outcome.served).items():
        lines.append(f"{name:>12}" + "".join(f"{value:10.2f}" for value in values.values()))
    return "\n".join(lines)


def loopback(url: str) -> str:
    """The URL of a server on this machine, without a slash at its end.

    Raises:
        argparse.ArgumentTypeError: it is elsewhere.
    """
    host = urlsplit(url).hostname or ""
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    if not is_here:
        raise argparse.ArgumentTypeError(
            f"must be http://127.0.0.1:PORT: only servers on this machine are measured, not {url!r}"
        )
    return url.rstrip("/")


def _requests(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_REQUESTS:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_REQUESTS}, but got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", type=loopback, default="http://127.0.0.1:8000", help="(%(default)s)")
    add("--workload", default="sharegpt", help="moments of the lengths (%(default)s)")
    add("--requests", type=_requests, default=1000, help="(%(default)s)")
    add("--max-tokens", type=int, default=4096, help="of prompt and answer (%(default)s)")
    add("--rate", type=float, help="requests/s")
    add("--peak", type=float, help="tokens/s of an offline run")
    add("--load", type=float, default=0.8, help="part of the peak to offer (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--gpu", default="cpu", help="name of the GPU, for the figure (%(default)s)")
    add("--label", default="", help="the case in words, for the figure")
    add("--out", type=Path, help="write the figure here")
    return parser


def main() -> None:
    options = parser().parse_args()
    try:
        outcome, rate = asyncio.run(measure(options))
        if not outcome.served:
            raise ValueError(f"no request was served: {outcome.failed[0]}")
        print(table(outcome, rate))
        where = options.label or f"{options.workload} moments, {100 * options.load:.0f} % of peak"
        row = figure(outcome, where, options.gpu)
    except (ValueError, httpx.HTTPError) as err:
        sys.exit(f"online.py: {type(err).__name__}: {err}")
    print(summary([row]))
    if options.out is not None:
        write_figures([row], options.out)


if __name__ == "__main__":
    main()
