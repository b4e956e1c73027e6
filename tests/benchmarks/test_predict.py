"""Predicted against measured: which plans are chosen, what is stored, and the figures by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule

from .conftest import BENCHMARKS

ORIGIN = {"command": "python x.py", "commit": "abc", "gpu": "a GPU", "date": "2026-01-01"}


@dataclass(frozen=True)
class Turns:
    layer_us: tuple[float, ...]
    watts: float = 690.0
    sm_clock_mhz: float = 1500.0
    error: str = ""


@pytest.fixture
def predict(load):
    return load("predict")


@pytest.fixture
def cases(load):
    return load("layer_cases")


@pytest.fixture(scope="module")
def stored(search_only):
    return search_only("predict", "--commit", "abc")


def prediction(cases, name, us, rows=64):
    batch = NanoBatch(tokens=(0, rows), decode_tokens=rows)
    nano_op = NanoOp(op="kqv", tokens=(0, rows), lane="compute", num_sms=132, variant="triton")
    schedule = Schedule(name=name, nano_batches=(batch,), nano_ops=(nano_op,))
    return cases.Prediction(
        schedule=schedule, layer_us=us, watts=700.0, sm_clock_mhz=1500.0, source="predicted"
    )


def forecast(cases, *predictions):
    return cases.Forecast(
        case="8b",
        commit="abc",
        profile="p.csv",
        profile_commit="def",
        date="2026-01-01",
        predictions=predictions,
    )


def test_the_stored_plans_are_many_differ_span_and_keep_their_predictions(predict, cases, stored):
    kept = cases.load_forecast(stored, cases.CASES["8b"])
    periods = [p.layer_us for p in kept.predictions]
    assert len(kept.predictions) == predict.NUM_PLANS
    assert max(periods) / min(periods) >= 1 + predict.LEAST_SPAN
    assert len(cases.once_each([p.schedule for p in kept.predictions])) == len(periods)
    batches = {len(p.schedule.nano_batches) for p in kept.predictions}
    assert batches >= {1, 2, 3, 4}
    assert (kept.commit, kept.profile_commit != "") == ("abc", True)
    with pytest.raises(ValueError, match="case 8b, not of 70b"):
        cases.load_forecast(stored, cases.CASES["70b"])


def test_kinds_take_turns_and_the_farthest_from_the_chosen_comes_next(predict, cases):
    pool = [prediction(cases, "a", us) for us in (100.0, 101.0, 102.0, 120.0)]
    pool += [prediction(cases, "b", us) for us in (110.0, 111.0)]
    pool.append(prediction(cases, "b", 1000.0))
    found = [(p.schedule.name, p.layer_us) for p in predict.spread(pool, 4)]
    assert found == [("a", 100.0), ("b", 110.0), ("b", 111.0), ("a", 120.0)]
    assert len(predict.spread(pool, 99)) == 6


def test_ranks_of_ties_are_shared(predict):
    assert predict.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert predict.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1 2.5 2.5 4 against 1 2 3 4, by hand: 4.5 / sqrt(4.5 x 5).
    assert predict.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)


def test_figures_are_the_errors_of_the_stored_predictions(predict, cases, tmp_path):
    names = [f"plan{index}" for index in range(21)]
    periods = [1000.0 + 20 * index for index in range(21)]
    made = forecast(
        cases, *(prediction(cases, name, us) for name, us in zip(names, periods, strict=True))
    )
    measured = [Turns((us / 1.02, us / 1.01, us / 1.03)) for us in periods]
    measured[3] = Turns((), error="no such kernel")
    measured[20] = Turns((periods[20] / 0.92,) * 3)
    case = cases.CASES["8b"]
    rows = predict.compare(case, made, measured, ORIGIN)
    assert len(rows) == 20
    found = {figure.id: figure for figure in predict.figures(rows, ORIGIN)}
    assert found["predict_median"].value == pytest.approx(2.0)
    assert found["predict_worst"].value == pytest.approx(8.0)
    assert found["predict_rank"].value == pytest.approx(1.0)
    assert all(figure.is_reached for figure in found.values())
    table = tmp_path / "details.csv"
    predict.write_details([replace(rows[0], case="another")], table)
    predict.write_details(rows, table)
    predict.write_details(rows, table)
    kept = predict.read_details(table)
    assert len(kept) == 21
    assert kept[1].error == pytest.approx(2.0, abs=0.01)
    assert kept[1].profile_commit == "def"
    with pytest.raises(ValueError, match="no figure is written"):
        predict.figures(rows[:19], ORIGIN)
    with pytest.raises(ValueError, match="no figure is written"):
        predict.figures([replace(row, measured_us=1000.0) for row in rows], ORIGIN)


def test_the_scatter_is_drawn_from_the_table_alone(predict, cases, tmp_path):
    made = forecast(cases, *(prediction(cases, f"p{n}", 1000.0 + n) for n in range(3)))
    rows = predict.compare(cases.CASES["8b"], made, [Turns((1010.0, 1020.0, 990.0))] * 3, ORIGIN)
    table, picture = tmp_path / "details.csv", tmp_path / "scatter.png"
    predict.write_details(rows, table)
    command = [sys.executable, str(BENCHMARKS / "predict.py"), "--draw"]
    subprocess.run(
        [*command, "--details", str(table), "--picture", str(picture)],
        check=True,
        cwd=tmp_path,
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measuring_imports_neither_optuna_nor_a_solver():
    script = (
        "import sys; sys.path.insert(0, 'benchmarks'); import predict, layers\n"
        "import nanoflow_tune.profiler.iteration\n"
        "print(sorted({'optuna', 'pulp', 'highspy', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
    )
    assert run.stdout.strip() == "[]"
