"""Online latency at a request rate: TTFT, TPOT and normalised latency; figure `online_p99`.

    nanoflow-serve --plan plan.yaml --weights DIR &
    python benchmarks/online.py --url http://127.0.0.1:8000 --peak 27000 --out figures.csv

An open loop: requests are sent when they are due, whatever has become of those before. Their
lengths have a workload's moments, their prompts are random token ids, and answers run to their full
length. `--peak` is the throughput of an offline run in tokens/s, prompts and answers together, of
which `--load` is offered; `--rate` gives requests/s instead. Without either, the peak is measured
first, with all requests at once. Normalised latency is a request's time from when it was due to its
last token, over its tokens. Several client processes share the schedule (`--processes`), since one
that cannot keep up would measure itself; with more than 1 % of the requests sent late there is no
figure. Talks to this machine alone; NANOFLOW_API_KEY holds the key of servers that want one.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import ipaddress
import json
import math
import os
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from ab import recorded_command
from client_fleet import default_processes, send_all
from figures import FigureRow, summary, write_figures
from sse_client import Endpoint

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.profiler.latency import Served, percentiles, summarise
from nanoflow_tune.profiler.traffic import PlannedRequest, plan_traffic
from nanoflow_tune.search_spaces.loader import load_workload

MAX_REQUESTS, MAX_PROCESSES = 20_000, 64
REACH, MEAN_LIMIT_MS = "<= 2", 200.0
LATE_S = 0.05
"""A client that sends this much later than planned measures itself."""
MOST_LATE = 0.01
"""Of all requests: with more of them the figure is refused."""
MODEL_CARD_S = 60.0


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

    @property
    def num_late(self) -> int:
        """Requests that the client sent late."""
        return sum(request.sent_s - request.due_s > LATE_S for request in self.served)


def figure(outcome: Outcome, case: str, gpu: str) -> FigureRow:
    """p99 over mean of the normalised latency.

    Raises:
        ValueError: requests failed or were sent late, or the mean is beyond its limit: the ratio
            says nothing then.
    """
    if outcome.failed:
        raise ValueError(
            f"every request must be served, but {len(outcome.failed)} were not "
            f"({outcome.failed[0]}); offer less load"
        )
    if outcome.num_late > MOST_LATE * len(outcome.served):
        raise ValueError(
            f"at most {100 * MOST_LATE:g} % of the requests may be sent more than "
            f"{1e3 * LATE_S:g} ms late, but {outcome.num_late} of {len(outcome.served)} were: the "
            "client measured itself; give it more --processes, or the machine more cores"
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


def send(
    endpoint: Endpoint, model: str, traffic: Sequence[PlannedRequest], options: argparse.Namespace
) -> Outcome:
    """Send all when they are due."""
    results = send_all(endpoint, model, traffic, options.seed, options.processes)
    return Outcome(
        served=tuple(result for result in results if isinstance(result, Served)),
        failed=tuple(result for result in results if isinstance(result, str)),
    )


def model_card(endpoint: Endpoint) -> dict[str, Any]:
    """The server's model: `id` and `max_model_len`.

    Raises:
        ValueError: the server does not say.
    """
    request = urllib.request.Request(f"{endpoint.url}/v1/models")
    if endpoint.key:
        request.add_header("Authorization", f"Bearer {endpoint.key}")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=MODEL_CARD_S) as reply:
            return json.load(reply)["data"][0]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as err:
        raise ValueError(
            f"{endpoint.url} must serve a model, but /v1/models says {type(err).__name__}: {err}; "
            "start nanoflow-serve, or give its --url"
        ) from err


def measure(options: argparse.Namespace) -> tuple[Outcome, float]:
    """The run, and the requests/s that were offered."""
    workload = load_workload(options.workload)
    endpoint = Endpoint(url=options.url, key=os.environ.get("NANOFLOW_API_KEY"))
    card = model_card(endpoint)

    def traffic(rate_per_s: float) -> list[PlannedRequest]:
        return plan_traffic(
            workload,
            num_requests=options.requests,
            rate_per_s=rate_per_s,
            max_tokens=min(options.max_tokens, card["max_model_len"]),
            seed=options.seed,
        )

    if options.rate is not None:
        return send(endpoint, card["id"], traffic(options.rate), options), options.rate
    peak = options.peak
    if peak is None:
        burst = send(endpoint, card["id"], traffic(math.inf), options)
        if burst.failed:
            raise ValueError(f"the peak was not found: {burst.failed[0]}; give --peak or --rate")
        peak = burst.tokens_per_s
        print(f"all at once: {peak:.0f} tokens/s", file=sys.stderr)
    planned = traffic(1.0)
    per_request = np.mean([request.prompt_tokens + request.decode_tokens for request in planned])
    rate = options.load * peak / float(per_request)
    return send(endpoint, card["id"], traffic(rate), options), rate


def table(outcome: Outcome, rate: float) -> str:
    """The latencies, for people."""
    lines = [
        f"{len(outcome.served)} served, {len(outcome.failed)} failed, "
        f"{outcome.num_late} sent late, at {rate:.2f} requests/s; "
        f"{outcome.tokens_per_s:.0f} tokens/s",
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


def _processes(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_PROCESSES:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_PROCESSES}, but got {value}")
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
    add(
        "--processes",
        type=_processes,
        default=default_processes(),
        help="of the client (%(default)s: cores but one, at most 8)",
    )
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--gpu", default="cpu", help="name of the GPU, for the figure (%(default)s)")
    add("--label", default="", help="the case in words, for the figure")
    add("--out", type=Path, help="write the figure here")
    return parser


def main() -> None:
    options = parser().parse_args()
    try:
        outcome, rate = measure(options)
        if not outcome.served:
            raise ValueError(f"no request was served: {outcome.failed[0]}")
        print(table(outcome, rate))
        where = options.label or f"{options.workload} moments, {100 * options.load:.0f} % of peak"
        row = figure(outcome, where, options.gpu)
    except ValueError as err:
        sys.exit(f"online.py: {type(err).__name__}: {err}")
    print(summary([row]))
    if options.out is not None:
        write_figures([row], options.out)


if __name__ == "__main__":
    main()
