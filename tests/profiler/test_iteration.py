"""Turns of whole iterations and of layers, on a made-up GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from nanoflow_tune.profiler import iteration, layer_turns
from nanoflow_tune.profiler.iteration import CLEARLY_WORSE, close_to_fastest


def test_only_the_clearly_worse_have_no_more_turns():
    edge = 100.0 * (1 + CLEARLY_WORSE)
    assert close_to_fastest([edge, 100.0, edge + 0.1, 103.0]) == [0, 1, 3]
    assert close_to_fastest([]) == []


class FakeMeter:
    joules, watts = 10.0, 690.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class FakeExecutor:
    """Takes 100 us plus 10 us a layer; the schedule's name says how much more."""

    def __init__(self, loaded, schedule):
        if schedule == "refused":
            raise ValueError("no such kernel\nsecond line")
        self.us = 100.0 + schedule * len(loaded.weights.layers)
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def fake_gpu(monkeypatch):
    made, shared = [], []

    @dataclass
    class Weights:
        layers: tuple[int, ...]

    @dataclass
    class Loaded:
        weights: Weights
        meter: FakeMeter
        graph: str = "graph"

    loaded = Loaded(Weights(tuple(range(16))), FakeMeter())

    def captured(ctx, loaded, schedule, shares_with=None):
        executor = FakeExecutor(loaded, schedule)
        made.append(executor)
        shared.append(shares_with)
        return executor

    for module in (iteration, layer_turns):
        monkeypatch.setattr(module, "loaded_for", lambda *_: loaded)
        monkeypatch.setattr(module, "captured", captured)
        monkeypatch.setattr(module, "compile_ahead", lambda *_: 7)
        monkeypatch.setattr(module, "iterations_of", lambda executor, turn_s: 8)
    monkeypatch.setattr(
        iteration,
        "timed_replays",
        lambda replay, count, meter: ([replay.__self__.us] * count, 1500.0),
    )
    monkeypatch.setattr(iteration.torch.cuda, "synchronize", lambda: None)
    return SimpleNamespace(made=made, shared=shared)


def test_a_layer_is_what_the_layers_that_are_taken_off_leave(fake_gpu):
    case = SimpleNamespace(model=SimpleNamespace(num_hidden_layers=16))
    said = []
    found = layer_turns.measure_layers(None, case, (10.0, "refused", 12.5), 3, 0.5, 4, said.append)
    assert [turns.layer_us for turns in found] == [(10.0,) * 3, (), (12.5,) * 3]
    assert [turns.error for turns in found] == ["", "no such kernel", ""]
    assert (found[0].watts, found[0].sm_clock_mhz) == (690.0, 1500.0)
    assert said[-1] == "2 of 3 schedules captured"
    first = fake_gpu.made[0]
    assert fake_gpu.shared == [None, first, first, first]


def test_a_clearly_slower_schedule_has_turns_in_half_of_the_rounds_only(fake_gpu):
    class Named(float):
        name = "as long as it is"

    schedules = tuple(map(Named, (10.0, 10.5, 100.0)))
    timings = iteration.measure_schedules(None, None, schedules, 4, 0.5)
    assert [timing.period_us for timing in timings] == [260.0, 268.0, 1700.0]
    fast, near, slow = (executor.replays for executor in fake_gpu.made)
    assert fast == near
    assert fast - slow == 2  # what two turns warm with; timed replays are not counted here
    assert timings[0].source == "measured"
