"""An hour of traffic through the engine in compressed time, and what became of each request.

    python benchmarks/trace_soak.py --seconds 3600 --out figures.csv

A tiny model on the CPU; each step counts as 50 ms of the trace, so that an hour takes minutes.
Bursts fill the KV cache and make it preempt; some requests are cancelled at any time, some
conversations go on with what was answered. Figure `trace_soak`: requests lost, duplicated or
altered, plus pages leaked. Altered is judged by plain forward passes of each request alone: every
token must be the most likely one after all before it, and the request must have ended where it
should.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import json
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ab import recorded_command
from figures import FIGURES, FigureRow, summary, write_figures
from tiny_serving import CPU, tiny_book, tiny_model, tiny_runner
from torch import Tensor

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.runtime.batching import Request
from nanoflow_tune.runtime.engine import Engine
from nanoflow_tune.runtime.engine_config import EngineConfig
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.model import reference_forward
from nanoflow_tune.runtime.model_runner import Launched, ModelRunner, Sampled
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.scheduler_records import SchedulerLimits
from nanoflow_tune.runtime.sequence import (
    Event,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from nanoflow_tune.runtime.step import StepInputs
from nanoflow_tune.runtime.weights import Weights, random_weights

STEP_S = 0.05
ROWS, PAGES, PAGE_SIZE = 64, 40, 16
MAX_LEN = 256
EOS = 2
RATE_PER_S, BURST_RATE_PER_S = 0.25, 3.0
BURST_EVERY_S, BURST_S = 120.0, 15.0
CANCELLED, CONTINUED = 0.08, 0.12
TIE = 1e-4
"""Logits nearer than this may come out in either order: the engine works in fp32."""


@dataclass(order=True, slots=True)
class _Due:
    at_s: float
    order: int
    request: GenerationRequest | None = field(compare=False)
    cancels: str = field(compare=False, default="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of all requests."""

    requests: int
    lost: int
    duplicated: int
    altered: int
    leaked_pages: int
    cancelled: int
    preemptions: int
    prefix_tokens: int
    fullest_cache: float
    """Largest part of the pages in use."""
    steps: int

    @property
    def faults(self) -> int:
        """The figure."""
        return self.lost + self.duplicated + self.altered + self.leaked_pages


class Traffic:
    """Requests and cancellations by trace time; follow-ups join as answers come."""

    def __init__(self, seconds: float, vocab_size: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._due: list[_Due] = []
        self._next = 0
        self.end_s = seconds
        self.requests: dict[str, GenerationRequest] = {}
        at_s = 0.0
        while at_s < seconds:
            in_burst = at_s % BURST_EVERY_S < BURST_S
            at_s += self._rng.expovariate(BURST_RATE_PER_S if in_burst else RATE_PER_S)
            self.add(at_s, self._tokens(self._length(40, 120)))

    def add(self, at_s: float, prompt: tuple[int, ...]) -> None:
        """Plan a request, and perhaps its cancellation."""
        prompt = prompt[: MAX_LEN - 8]
        most = min(self._length(24, MAX_LEN), MAX_LEN - len(prompt))
        name = f"r{self._next}"
        sampling = SamplingParams(
            max_tokens=most, temperature=0.0, ignore_eos=self._rng.random() < 0.5
        )
        request = GenerationRequest(
            request_id=name, prompt_token_ids=prompt, sampling=sampling, arrival_s=at_s
        )
        self.requests[name] = request
        self._push(at_s, request)
        if self._rng.random() < CANCELLED:
            self._push(at_s + self._rng.expovariate(1 / 2.0), None, name)

    def follow_up(self, now_s: float, request: GenerationRequest, answer: Sequence[int]) -> None:
        """Perhaps go on with a conversation."""
        if now_s < self.end_s and self._rng.random() < CONTINUED:
            text = (*request.prompt_token_ids, *answer, *self._tokens(self._length(8, 16)))
            if len(text) < MAX_LEN - 8:
                self.add(now_s + self._rng.expovariate(1 / 5.0), text)

    @property
    def next_s(self) -> float | None:
        """When something is due; None: nothing more."""
        return self._due[0].at_s if self._due else None

    def pop_due(self, now_s: float) -> list[_Due]:
        """What is due by now."""
        due: list[_Due] = []
        while self._due and self._due[0].at_s <= now_s:
            due.append(heapq.heappop(self._due))
        return due

    def _push(self, at_s: float, request: GenerationRequest | None, cancels: str = "") -> None:
        heapq.heappush(self._due, _Due(at_s, self._next, request, cancels))
        self._next += 1

    def _length(self, mean: float, limit: int) -> int:
        return max(1, min(limit, round(self._rng.expovariate(1 / mean))))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(count))


class SoakRunner:
    """A runner that lets trace time pass with each step, and feeds the engine what is due."""

    def __init__(self, soak: Soak, runner: ModelRunner) -> None:
        self._soak, self._runner = soak, runner

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step; requests that come meanwhile are seen by the next."""
        self._soak.advance(STEP_S)
        return self._runner.launch(inputs)

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled."""
        return self._runner.collect(launched)

    def close(self) -> None:
        """Note what is left in the store, then give everything back."""
        self._soak.bytes_left = self._runner.store.host_bytes
        self._runner.close()


class Soak:
    """One run."""

    def __init__(self, weights: Weights, seconds: float, seed: int) -> None:
        self.weights = weights
        self.traffic = Traffic(seconds, weights.model.vocab_size, seed)
        self.events: dict[str, list[Event]] = {}
        self.bytes_left = 0
        self._now_s = 0.0
        self._fullest = 0.0
        self._open = 0
        self._lock = threading.RLock()
        self._quiet = threading.Condition(self._lock)
        self.config = EngineConfig(
            model_name="tiny",
            vocab_size=weights.model.vocab_size,
            limits=SchedulerLimits(
                max_model_len=MAX_LEN,
                max_running=ROWS,
                expected_decode_tokens=16.0,
                admitted_fraction=1.2,  # hopeful, so that pages do run out
            ),
            num_pages=PAGES,
            page_size=PAGE_SIZE,
            eos_token_ids=(EOS,),
            offload_host_pages=48,
            offload_disk_pages=96,
        )
        book = tiny_book(OpGraph.build(weights.model), ROWS)
        self.engine = Engine(
            self.config,
            book,
            lambda: SoakRunner(self, tiny_runner(weights, self.config, book)),
        )

    def run(self) -> Verdict:
        """Play the trace to its end and judge."""
        self.engine.start()
        with self._lock:
            while self._open or self.traffic.next_s is not None:
                if not self._open:  # nothing steps: time goes on to what is due
                    assert self.traffic.next_s is not None
                    self._now_s = max(self._now_s, self.traffic.next_s)
                    self.advance(0.0)
                self._quiet.wait(timeout=1.0)
        self.engine.close()
        return self._judge()

    def advance(self, seconds: float) -> None:
        """Let trace time pass; submit and cancel what is due."""
        with self._lock:
            self._now_s += seconds
            stats = self.engine.stats
            self._fullest = max(self._fullest, stats.kv_pages_used / stats.kv_pages_total)
            for due in self.traffic.pop_due(self._now_s):
                if due.request is None:
                    self.engine.cancel(due.cancels)
                    continue
                self._open += 1
                self.events[due.request.request_id] = []
                self.engine.submit(due.request, self._on_event)

    def _on_event(self, event: Event) -> None:
        with self._lock:
            self.events[event.request_id].append(event)
            if isinstance(event, FinishEvent):
                self._open -= 1
                request = self.traffic.requests[event.request_id]
                self.traffic.follow_up(self._now_s, request, _tokens(self.events[event.request_id]))
                self._quiet.notify_all()

    def _judge(self) -> Verdict:
        ends = {
            name: [event for event in events if isinstance(event, FinishEvent)]
            for name, events in self.events.items()
        }
        stats = self.engine.stats
        whole = [name for name, found in ends.items() if len(found) == 1]
        altered = sum(
            not is_as_alone(self.weights, self.traffic.requests[name], self.events[name])
            for name in whole
        )
        page_bytes = self.weights.model.kv_bytes_per_token * PAGE_SIZE
        kept = self.config.offload_host_pages * page_bytes
        return Verdict(
            requests=len(self.traffic.requests),
            lost=sum(not found for found in ends.values())
            + len(self.traffic.requests.keys() - ends.keys()),
            duplicated=sum(len(found) > 1 for found in ends.values()),
            altered=altered,
            leaked_pages=stats.kv_pages_used + max(0, self.bytes_left - kept) // page_bytes,
            cancelled=stats.requests_cancelled_total,
            preemptions=stats.preemptions_total,
            prefix_tokens=stats.prefix_tokens_total,
            fullest_cache=self._fullest,
            steps=stats.steps_total,
        )


def is_as_alone(weights: Weights, request: GenerationRequest, events: Sequence[Event]) -> bool:
    """Whether a request's events are what it gives when it runs alone."""
    end, tokens = events[-1], _tokens(events)
    if not isinstance(end, FinishEvent) or end.num_generated_tokens != len(tokens):
        return False
    sampling = request.sampling
    stops = [EOS in tokens[: place + 1] and not sampling.ignore_eos for place in range(len(tokens))]
    if any(stops[:-1]) or len(tokens) > sampling.max_tokens or end.reason == "error":
        return False
    is_stop = bool(stops) and stops[-1]
    if end.reason == "stop" and not is_stop:
        return False
    if end.reason == "length" and (is_stop or len(tokens) != sampling.max_tokens):
        return False
    if not tokens:
        return end.reason == "cancelled"
    logits_RV = _logits(weights, (*request.prompt_token_ids, *tokens[:-1]))[-len(tokens) :]
    chosen_R = logits_RV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((chosen_R >= logits_RV.amax(dim=1) - TIE).all())


def _logits(weights: Weights, text: tuple[int, ...]) -> Tensor:
    """Logits behind every token of a text, from a plain forward pass without a cache."""
    cache = PagedKvCache(weights.model, num_pages=1, device=CPU, num_layers=len(weights.layers))
    whole = Request(token_ids=text, first_position=0, pages=(), is_decode=False)
    x_TD = reference_forward(weights, cache, [whole]).layer_outputs_TD[-1]
    scale_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + weights.model.rms_norm_eps)
    normed_TD = x_TD * scale_T1 * weights.final_norm_D.double()
    return normed_TD @ weights.lm_head_VD.double().t()


def _tokens(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def soak(seconds: float, seed: int = 0) -> Verdict:
    """Run a trace of some length with a fresh engine."""
    torch.set_num_threads(1)  # small ops
    return Soak(random_weights(tiny_model(), device=CPU, seed=seed), seconds, seed).run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0, help="of trace (%(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="", help="of the source; default: git's")
    parser.add_argument("--out", type=Path, default=FIGURES, help="figures file (%(default)s)")
    options = parser.parse_args(arguments)
    verdict = soak(options.seconds, options.seed)
    values = {name: getattr(verdict, name) for name in Verdict.__slots__}
    row = FigureRow(
        id="trace_soak",
        case=f"{options.seconds:g} s of traffic, tiny model, CPU",
        value=float(verdict.faults),
        unit="count",
        reach="<= 0",
        spread="",
        command=recorded_command(
            "trace_soak", arguments if arguments is not None else sys.argv[1:]
        ),
        commit=options.commit or this_commit(),
        gpu="cpu",
        date=datetime.date.today().isoformat(),
    )
    write_figures([row], options.out)
    print(summary([row]))
    print(json.dumps(values, separators=(",", ":")))


if __name__ == "__main__":
    main()
