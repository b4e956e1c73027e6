"""Hardware in the loop, where the true costs of the hardware are known: a model times factors."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from random import Random

import optuna
import pytest

from nanoflow_tune.autotune.baselines import (
    equal_split,
    equal_split_choice,
    nano_only,
    sequential,
)
from nanoflow_tune.autotune.corrections import (
    NO_CORRECTIONS,
    CorrectedCostModel,
    Corrections,
    Learner,
    corrected,
    learned,
)
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.hardware_loop import refine_on_hardware
from nanoflow_tune.autotune.refine import Family, checked, refine, study_name
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.profiler.profile import Profile
from nanoflow_tune.runtime.plan import Candidate, Schedule, Timing
from nanoflow_tune.runtime.schedule import IllegalScheduleError

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, row_of

GRAPH = graph_of("llama3-8b")


def profile_with_rival() -> Profile:
    """Beside each cuBLAS row one of a kernel that is 3 % slower."""
    profile = linear_profile(GRAPH)
    rivals = [
        row_of(replace(row.point, variant="rival"), 1.03 * row.median_us)
        for row in profile.rows
        if row.point.variant == "cublas"
    ]
    return replace(profile, rows=(*profile.rows, *rivals))


COSTS = CostModel(profile_with_rival(), h200())
SPACE = quick_space(sm_shares=(32, 48, 84, 100), row_orders=("interleaved",), token_granularity=512)
TRUE = Corrections(
    factors={
        "kind decode_attention": 1.1,
        "variant gemm cublas": 1.15,
        "variant gemm_silu rival": 1.15,
        "beside compute memory": 1.25,
        "beside memory compute": 1.4,
    }
)
"""Attention and the GEMMs that seem best are slower than profiled, and overlap disturbs more."""


class Hardware:
    """Measures by the true model, with noise and a pace of its own in every batch."""

    def __init__(self, true: Corrections, noise: float = 0.0, drift: float = 0.0) -> None:
        self.model = CorrectedCostModel(COSTS, true)
        self.noise, self.drift, self.rng = noise, drift, random.Random(0)
        self.batches: list[list[Schedule]] = []

    def us(self, schedule: Schedule) -> float:
        return predict(schedule, GRAPH, self.model, MIX).period_us

    def __call__(self, schedules: Sequence[Schedule]) -> list[Timing]:
        self.batches.append(list(schedules))
        pace = exp(self.drift * len(self.batches))
        return [
            Timing(
                period_us=self.us(s) * pace * exp(self.rng.gauss(0, self.noise)), source="measured"
            )
            for s in schedules
        ]


def family() -> Family:
    return Family(graph=GRAPH, cost_model=COSTS, space=SPACE, mix=MIX)


def first_trial() -> list[dict[str, object]]:
    return [family().parameters(equal_split_choice(GRAPH, MIX, h200(), SPACE))]


def best_of_all(model: CostModel) -> Schedule:
    """The fastest schedule of the whole family in one model, by brute force."""
    around, found = replace(family(), is_variant_free=True), list[tuple[float, Schedule]]()

    def objective(trial: optuna.Trial) -> float:
        try:
            schedule = checked(around, trial)
        except IllegalScheduleError as err:
            raise optuna.TrialPruned from err
        found.append((predict(schedule, GRAPH, model, MIX).period_us, schedule))
        return found[-1][0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.BruteForceSampler(seed=0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(sampler=sampler).optimize(objective)
    assert len(found) > 50
    return min(found, key=lambda item: item[0])[1]


def raced(hardware: Hardware) -> list[Candidate]:
    """What the search measures before the loop: baselines and the simulator's best."""
    schedules = [
        sequential(GRAPH, COSTS, MIX),
        nano_only(GRAPH, COSTS, MIX),
        equal_split(GRAPH, COSTS, MIX, SPACE),
        min(refine(family(), trials=30, seed=0), key=lambda c: c.predicted.period_us).schedule,
    ]
    timings = hardware(schedules)
    return [
        Candidate(schedule=s, predicted=predict(s, GRAPH, COSTS, MIX), measured=timing)
        for s, timing in zip(schedules, timings, strict=True)
    ]


def test_without_plans_nothing_is_corrected_and_a_factor_of_one_changes_nothing():
    assert Learner(GRAPH, COSTS, MIX).fit().factors == {}
    same = CorrectedCostModel(COSTS, Corrections())
    for schedule in (sequential(GRAPH, COSTS, MIX), equal_split(GRAPH, COSTS, MIX, SPACE)):
        assert predict(schedule, GRAPH, same, MIX) == predict(schedule, GRAPH, COSTS, MIX)


def test_a_factor_on_all_kinds_is_a_factor_on_layers_and_joules():
    kinds = {op.kind for op in (*GRAPH.prologue, *GRAPH.layer, *GRAPH.epilogue)}
    twice = CorrectedCostModel(COSTS, Corrections(factors={f"kind {kind}": 2.0 for kind in kinds}))
    schedule = sequential(GRAPH, COSTS, MIX)
    plain, slow = (predict(schedule, GRAPH, model, MIX) for model in (COSTS, twice))
    assert slow.period_us == pytest.approx(2 * plain.period_us, rel=1e-6)
    assert slow.watts == pytest.approx(plain.watts, rel=1e-6)
    assert slow.sm_clock_mhz == pytest.approx(plain.sm_clock_mhz)


def test_factors_are_learnt_from_periods_and_hold_for_plans_not_seen():
    hardware = Hardware(TRUE, noise=0.002)
    around = replace(family(), is_variant_free=True)
    pool = [c.schedule for c in refine(around, trials=40, seed=5, enqueue=first_trial())]
    learner = Learner(GRAPH, COSTS, MIX)
    for schedule, timing in zip(pool[:20], hardware(pool[:20]), strict=True):
        learner.add(schedule, timing.period_us)
    fit = learner.fit()
    assert fit.num_plans == len(learner)
    assert fit.error < 0.01 < 0.03 < fit.error_before
    assert fit.cost_factor("decode_attention", "triton") == pytest.approx(1.1, rel=0.05)
    model = CorrectedCostModel(COSTS, fit)
    errors = {
        name: max(abs(predict(s, GRAPH, costs, MIX).period_us / hardware.us(s) - 1) for s in pool)
        for name, costs in (("plain", COSTS), ("corrected", model))
    }
    assert errors["corrected"] < 0.4 * errors["plain"]
    assert "kind decode_attention x 1." in fit.told()


@pytest.mark.parametrize("seed", range(4))
def test_periods_that_no_factors_explain_are_never_told_worse_than_before(seed):
    rng = Random(seed)
    learner = Learner(GRAPH, COSTS, MIX)
    for candidate in raced(Hardware(TRUE)):
        learner.add(candidate.schedule, candidate.measured.period_us * rng.uniform(0.6, 1.6))
    fit = learner.fit()
    assert fit.error <= fit.error_before


def test_one_plan_moves_factors_a_little_and_a_plan_as_predicted_none():
    learner = Learner(GRAPH, COSTS, MIX)
    schedule = sequential(GRAPH, COSTS, MIX)
    us = predict(schedule, GRAPH, COSTS, MIX).period_us
    learner.add(schedule, us)
    assert all(factor == pytest.approx(1.0) for factor in learner.fit().factors.values())
    learner.add(replace(schedule, name="again"), 1.1 * us)
    assert len(learner) == 1
    assert learner.measured_us(schedule) == pytest.approx(1.1 * us)
    assert all(0.97 < factor < 1.1 for factor in learner.fit().factors.values())


def test_the_loop_finds_the_truly_better_plan():
    hardware = Hardware(TRUE, noise=0.002)
    known = raced(hardware)
    found = refine_on_hardware(
        family(), trials=16, seed=0, measure=hardware, enqueue=first_trial(), known=known
    )
    best_us = min(hardware.us(candidate.schedule) for candidate in found)
    blind_us, truly_us = (hardware.us(best_of_all(m)) for m in (COSTS, hardware.model))
    assert truly_us < 0.99 * blind_us  # there is something to find
    assert best_us == pytest.approx(truly_us, rel=0.005)


def test_trials_are_counted_at_the_incumbents_pace():
    """The card slows down by 5 % from batch to batch: that is no reason to prefer early plans."""
    steady, drifting = Hardware(TRUE), Hardware(TRUE, drift=0.05)
    runs: list[list[Schedule]] = []
    for hardware in (steady, drifting):
        known = raced(Hardware(TRUE))
        found = refine_on_hardware(
            family(), trials=8, seed=0, measure=hardware, enqueue=first_trial(), known=known
        )
        runs.append([candidate.schedule for candidate in found])
        assert all(c.measured and c.measured.source == "measured" for c in found)
    assert runs[0] == runs[1]
    assert runs[0]


def test_what_cannot_win_is_pruned_with_its_reason_and_nothing_is_measured_twice(tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/search.db"
    hardware = Hardware(TRUE)
    known = raced(hardware)
    refine_on_hardware(
        family(),
        trials=8,
        seed=0,
        measure=hardware,
        storage=storage,
        enqueue=first_trial(),
        known=known,
    )
    study = optuna.load_study(study_name=study_name(family(), 0, "hardware"), storage=storage)
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    assert pruned
    assert any("above the incumbent's" in trial.user_attrs["reason"] for trial in pruned)
    assert study.user_attrs["corrections"]["kind decode_attention"] > 1
    proposed = [t for t in study.trials if "proposed_by" in t.user_attrs]
    assert proposed
    trials = [schedule for batch in hardware.batches[1:] for schedule in batch[1:]]
    keys = {(s.nano_batches, s.nano_ops) for s in trials}
    assert len(keys) == len(trials) > 0
    assert not keys & {(c.schedule.nano_batches, c.schedule.nano_ops) for c in known}
    # Resumed with as many trials, nothing is left to measure, and what was learnt is known.
    told: list[str] = []
    again = refine_on_hardware(
        family(),
        trials=len(trials),
        seed=0,
        measure=hardware,
        storage=storage,
        known=known,
        tell=told.append,
    )
    assert len(again) == len(trials)
    assert all(candidate.measured is None for candidate in again)
    assert f"predictions of {len(trials) + len(known)} measured plans" in told[0]


def test_a_budget_of_time_ends_the_loop_and_so_does_a_space_with_nothing_left():
    hardware = Hardware(TRUE)
    assert not refine_on_hardware(
        family(), trials=8, seed=0, measure=hardware, is_over=lambda: True
    )
    tiny = quick_space(sm_shares=(32, 100), row_orders=("interleaved",), token_granularity=1024)
    narrow = Family(graph=GRAPH, cost_model=COSTS, space=tiny, mix=MIX)
    found = refine_on_hardware(narrow, trials=200, seed=0, measure=hardware)
    assert 0 < len(found) < 200


def test_the_same_measurements_give_the_same_trials():
    runs = [
        refine_on_hardware(
            family(), trials=6, seed=3, measure=Hardware(TRUE), enqueue=first_trial()
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_other_points_are_priced_by_what_was_measured():
    """Measured candidates of one batch correct predictions of another; two teach nothing."""
    true = CorrectedCostModel(COSTS, TRUE)
    schedules = [
        sequential(GRAPH, COSTS, MIX),
        nano_only(GRAPH, COSTS, MIX),
        equal_split(GRAPH, COSTS, MIX, SPACE),
    ]
    race = [
        Candidate(
            schedule=schedule,
            predicted=predict(schedule, GRAPH, COSTS, MIX),
            measured=predict(schedule, GRAPH, true, MIX),
        )
        for schedule in schedules
    ]
    half = replace(MIX, decode_tokens=MIX.decode_tokens / 2, prefill_tokens=MIX.prefill_tokens / 2)
    other = sequential(GRAPH, COSTS, half)
    costs = corrected(COSTS, learned(GRAPH, COSTS, MIX, race))
    us = [predict(other, GRAPH, model, half).period_us for model in (COSTS, costs, true)]
    assert us[0] < 0.95 * us[2]
    assert us[1] == pytest.approx(us[2], rel=0.02)
    assert learned(GRAPH, COSTS, MIX, race[:2]) is NO_CORRECTIONS
    assert corrected(COSTS, NO_CORRECTIONS) is COSTS
