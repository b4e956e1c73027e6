from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.search import SearchResult, pick_winner, search
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.plan import Candidate, Schedule, Timing
from nanoflow_tune.search_spaces.loader import load_hardware

from .fakes import MIX, graph_of, h200, linear_profile, quick_space

SPACE = quick_space(milp_time_limit_s=1.0, simulator_trials=12)
MODELS = [
    ("llama3-8b", 1),
    ("llama2-70b", 2),
    ("llama3-70b", 2),
    ("qwen2-72b", 2),
    ("deepseek-67b", 2),
]
SHIPPED = linear_profile(graph_of("llama3-8b"), graph_of("llama2-70b", 2))


def run(model: str, tp_degree: int, has_profile: bool = True, **options: object) -> SearchResult:
    costs = CostModel(SHIPPED if has_profile else None, h200())
    graph = graph_of(model, tp_degree)
    options = {"seed": 0, "space": SPACE, "mix": MIX, "most_batches": 2, **options}
    return search(graph, costs, h200(), **options)  # pyright: ignore


@pytest.mark.parametrize("has_profile", [True, False])
@pytest.mark.parametrize(("model", "tp_degree"), MODELS)
def test_every_search_keeps_its_promises(model: str, tp_degree: int, has_profile: bool):
    result = run(model, tp_degree, has_profile)
    graph, base_us = graph_of(model, tp_degree), result.sequential.best_known.period_us
    source = "predicted" if has_profile else "roofline"
    for candidate in result.race:
        check(candidate.schedule, graph, 132, 8)
        assert candidate.predicted.period_us >= result.lower_bound_us
        assert candidate.predicted.source == source
    assert result.winner.best_known.period_us <= base_us
    if result.winner.schedule.name not in ("sequential", "nano_only", "equal_split"):
        assert result.winner.best_known.period_us < 0.99 * base_us
    assert result.best_overlapped.schedule.is_overlapped
    names = {candidate.schedule.name for candidate in result.race}
    assert {"sequential", "nano_only", "equal_split"} <= names
    assert any(name.startswith("overlapped_") for name in names)
    schedules = [(c.schedule.nano_batches, c.schedule.nano_ops) for c in result.race]
    assert len(set(schedules)) == len(schedules)
    assert result.certificate.bound_us > 0
    best_us = min(candidate.predicted.period_us for candidate in result.race)
    assert 0 < result.space_bound.bound_us <= best_us
    assert result.lower_bound_us <= result.space_bound.bound_us * (1 + 1e-6)
    assert result.bound in ("compute", "memory", "network", "power")


def test_the_same_seed_finds_the_same_plan():
    space = replace(SPACE, milp_time_limit_s=30.0, milp_relative_gap=0.2)
    first, second = (run("llama3-8b", 1, space=space) for _ in range(2))
    assert first.winner == second.winner
    assert first.history == second.history
    assert first.race == second.race


def test_a_card_with_other_sms_and_no_energy_model_is_searched_on_its_roofline():
    a100, graph = load_hardware("a100-80"), graph_of("llama2-70b", 8)
    result = search(graph, CostModel(None, a100), a100, SPACE, MIX, seed=0)
    assert result.power_limit_us == 0.0
    assert {c.predicted.source for c in result.race} == {"roofline"}
    for candidate in result.race:
        check(candidate.schedule, graph, a100.num_sms, a100.sm_granularity)


@pytest.mark.parametrize(("decodes", "prefills"), [(256, 0), (0, 2048), (255.6, 0.4)])
def test_batches_of_one_kind_and_small_ones_are_searched_too(decodes: float, prefills: float):
    mix = replace(MIX, decode_tokens=decodes, prefill_tokens=prefills)
    result = run("llama3-8b", 1, mix=mix)
    assert result.best_overlapped.schedule.is_overlapped
    assert result.winner.best_known.period_us >= result.lower_bound_us


def test_progress_is_told():
    told: list[str] = []
    run("llama3-8b", 1, on_progress=told.append)
    assert told[0].startswith("baselines: sequential")
    assert any("structure MILP" in line and "gap" in line for line in told)
    assert told[-1].startswith("winner:")


@pytest.mark.parametrize(("factor", "is_overlapped"), [(1.1, False), (0.9, True)])
def test_measurements_overrule_predictions(factor: float, is_overlapped: bool):
    graph, costs = graph_of("llama3-8b"), CostModel(SHIPPED, h200())
    base_us = run("llama3-8b", 1).sequential.predicted.period_us

    def measure(schedules: Sequence[Schedule]) -> list[Timing]:
        assert all(not s.is_overlapped or s.nano_batches for s in schedules)
        times = [
            factor * base_us if s.is_overlapped else base_us * len(s.nano_batches)
            for s in schedules
        ]
        return [Timing(period_us=time, source="measured") for time in times]

    result = search(graph, costs, h200(), SPACE, MIX, seed=0, measure=measure)
    assert result.winner.schedule.is_overlapped == is_overlapped
    assert result.winner.measured is not None
    assert result.sequential.measured is not None
    assert result.best_overlapped.measured is not None
    equal = next(c for c in result.race if c.schedule.name == "equal_split")
    assert equal.measured is not None


def test_a_predicted_gain_within_the_margin_does_not_win():
    graph, costs = graph_of("llama3-8b"), CostModel(SHIPPED, h200())
    base = run("llama3-8b", 1).sequential
    assert base.predicted == predict(base.schedule, graph, costs, MIX)

    def rival(part: float, measured: float | None = None) -> Candidate:
        us = base.predicted.period_us
        found = replace(base, predicted=replace(base.predicted, period_us=part * us))
        timing = Timing(period_us=measured, source="measured") if measured else None
        return replace(found, measured=timing)

    assert pick_winner(base, [rival(0.985)]) is base
    assert pick_winner(base, [close := rival(0.975)]) is close
    measured = replace(base, measured=Timing(period_us=100.0, source="measured"))
    assert pick_winner(measured, [rival(0.5, 101.0)]) is measured
    assert pick_winner(measured, [rival(0.5)]) is measured
    assert pick_winner(measured, [rival(0.5, 99.8)]) is measured
    assert pick_winner(measured, [fast := rival(1.5, 99.0)]) is fast
