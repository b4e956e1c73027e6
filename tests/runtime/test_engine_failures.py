"""An engine whose device fails: every request hears of it, and nothing waits for ever."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from engine_builders import CPU, MODEL, Collector, book_of, config_of, make_request

from nanoflow_tune.runtime.engine import Engine
from nanoflow_tune.runtime.gpu_failures import CollectiveError, OutOfMemoryError, StalledStepError
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.model_runner import ModelRunner
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.sequence import RequestRejected
from nanoflow_tune.runtime.weights import random_weights

ASKED = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"
PEER = "NCCL error in: ProcessGroupNCCL.cpp:3, remote process exited or there was a network error"


class FailingRunner:
    """A real runner until its third step, which raises, or waits for a gate that nobody opens."""

    def __init__(self, runner, error):
        self.runner, self.error, self.steps = runner, error, 0
        self.gate, self.is_closed = threading.Event(), threading.Event()

    def launch(self, inputs):
        self.steps += 1
        if self.steps == 3 and self.error is not None:
            raise self.error
        return self.runner.launch(inputs)

    def collect(self, launched):
        if self.steps > 3 and self.error is None:
            self.gate.wait(60)
        return self.runner.collect(launched)

    def close(self):
        self.is_closed.set()
        self.runner.close()


def started(error, **overrides):
    """A running engine with two requests, its runner and their events."""
    config, book = config_of(**overrides), book_of()
    weights = random_weights(MODEL, device=CPU)
    made = []

    def make_runner():
        cache = PagedKvCache(MODEL, num_pages=config.num_pages, device=CPU)
        own = ModelRunner(OpGraph.build(MODEL), weights, cache, book, config.runner_sizes)
        made.append(FailingRunner(own, error))
        return made[0]

    engine, collector = Engine(config, book, make_runner), Collector()
    engine.start()
    for name in ("a", "b"):
        request = make_request(name, 10, 40, ignore_eos=True)
        engine.submit(request, collector.on_event)
    return engine, made[0], collector


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (torch.OutOfMemoryError(ASKED), OutOfMemoryError, "out of memory"),
        (torch.distributed.DistBackendError(PEER), CollectiveError, "a collective among the GPUs"),
        (KeyError("planted"), KeyError, "KeyError: 'planted'"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_step_that_fails_ends_all_requests_with_the_cause(error, kind, cause):
    engine, runner, collector = started(error, memory_remedy="lower --kv-cache-gib")
    collector.wait(["a", "b"])
    for name in ("a", "b"):
        (end,) = collector.ends(name)
        assert end.reason == "error"
        assert f"the engine failed: {cause}" in end.message
    assert isinstance(engine.failure, kind)
    if kind is OutOfMemoryError:
        told = str(engine.failure)
        assert "no memory for a step: 20.00 MiB were asked for; lower --kv-cache-gib" in told
    with pytest.raises(RequestRejected) as rejected:
        engine.submit(make_request("late", 3, 3), collector.on_event)
    assert rejected.value.status == 503
    engine.close()
    assert runner.is_closed.is_set()


def test_a_step_that_does_not_end_is_given_up_by_whoever_asks():
    engine, runner, collector = started(None, step_timeout_s=0.5)
    deadline = time.monotonic() + 20
    while engine.failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert isinstance(engine.failure, StalledStepError)
    assert "a step must end within 0.5 s" in str(engine.failure)
    assert "--step-timeout" in str(engine.failure)
    collector.wait(["a", "b"])
    assert "the GPU does not answer" in collector.ends("a")[0].message
    began_s = time.monotonic()
    engine.close()
    assert time.monotonic() - began_s < 5, "closing must not wait for the device"
    assert not runner.is_closed.is_set()
    seen = len(collector.events["a"])
    runner.gate.set()  # the device answers after all: nobody is told anything any more
    assert runner.is_closed.wait(20)
    assert len(collector.events["a"]) == seen


def test_a_start_without_memory_is_told_to_whoever_starts():
    def make_runner():
        raise torch.OutOfMemoryError(ASKED)

    engine = Engine(config_of(memory_remedy="buy more"), book_of(), make_runner)
    with pytest.raises(OutOfMemoryError, match=r"no memory for the start: 20.00 MiB.*; buy more"):
        engine.start()
    engine.close()
