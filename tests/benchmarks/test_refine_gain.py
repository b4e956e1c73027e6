"""Gain of the hardware in the loop: which race is stored, and the figure on made-up ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanoflow_tune.autotune.corrections import CorrectedCostModel, Corrections
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.search_spaces.loader import load_hardware

from .conftest import PROFILE

ORIGIN = {"command": "x", "commit": "abc", "gpu": "a GPU", "date": "2026-01-01"}


@pytest.fixture(scope="module")
def stored(search_only):
    return search_only("refine_gain")


@pytest.fixture
def predictions(cases, stored):
    return cases.load_forecast(stored, cases.CASES["8b"]).predictions


@pytest.fixture
def gain(load):
    return load("refine_gain")


@pytest.fixture
def cases(load):
    return load("layer_cases")


@pytest.fixture
def predictor(cases):
    return cases.Predictor(cases.CASES["8b"], load_hardware("h200"), PROFILE)


def made_up_gpu(predictor, cases, factors, calls):
    """Answers calls as ranks whose GPU is the cost model times some factors."""
    true = CorrectedCostModel(predictor.cost_model, Corrections(factors=factors))

    def call(function, iteration, schedules, rounds, turn_s):
        calls.append((function.__name__, schedules))
        timings = [predict(s, predictor.graph, true, cases.MIX) for s in schedules]
        if function.__name__ == "measure_schedules":
            return [[replace(timing, source="measured") for timing in timings]]
        return [[SimpleNamespace(layer_us=(t.period_us / 16,) * rounds, error="") for t in timings]]

    return call


def test_the_race_holds_the_solvers_plans_and_the_best_of_every_other_kind(gain, predictions):
    names = [prediction.schedule.name for prediction in predictions]
    assert names[0] in gain.SOLVER
    assert "sequential" in names
    assert len(names) == gain.RACE_SIZE
    solved = gain.solvers_plan(predictions)
    assert solved.name in gain.SOLVER
    assert (
        solved
        == min(
            (p for p in predictions if p.schedule.name in gain.SOLVER), key=lambda p: p.layer_us
        ).schedule
    )


def test_the_gain_is_the_solvers_layer_over_that_of_the_fastest_measured(
    gain, cases, predictor, predictions, monkeypatch, ranks_that
):
    """The GEMMs that the profile likes best are slower on this card than it says."""
    factors = {"variant gemm sm90": 1.2, "variant gemm_silu sm90_c2": 1.2}
    calls: list[tuple[str, tuple[object, ...]]] = []
    call = made_up_gpu(predictor, cases, factors, calls)
    monkeypatch.setattr(gain, "gpu_ranks", ranks_that(call))
    monkeypatch.setattr(gain, "MOST_TRIALS", 4)
    row = gain.run(cases.CASES["8b"], predictor, predictions, 60.0, ORIGIN)
    assert (row.id, row.reach, row.unit) == ("refine_gain", ">= 1.00", "x")
    assert row.value >= 1.0
    assert calls[0][1] == tuple(p.schedule for p in predictions)
    assert calls[-1][0] == "measure_turns"
    assert calls[-1][1][0] == gain.solvers_plan(predictions)
    assert f"{sum(len(s) - 1 for name, s in calls[1:-1])} trials" in row.spread
