from __future__ import annotations

import time
from dataclasses import replace
from random import Random

import pytest

from nanoflow_tune.autotune.baselines import equal_split, nano_only, sequential
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.sensitivity import disturbed, sensitivity
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.profiler.store import shipped_profile
from nanoflow_tune.runtime.plan import Schedule

from .fakes import MIX, graph_of, h200, linear_profile, quick_space

GRAPH = graph_of("llama3-8b")
PROFILE = replace(linear_profile(GRAPH), energy=None)
POWERLESS = CostModel(PROFILE, replace(h200(), name="card"))  # no energy model stands in


class Constant(Random):
    """Always the upper end."""

    def uniform(self, a: float, b: float) -> float:
        return b


def plans_of(costs: CostModel) -> dict[str, Schedule]:
    base = sequential(GRAPH, costs, MIX)
    overlapped = equal_split(GRAPH, costs, MIX, quick_space())
    return {"sequential": base, "best overlapped": overlapped, "winner": base}


def test_zero_noise_moves_nothing():
    found = sensitivity(POWERLESS, GRAPH, MIX, plans_of(POWERLESS), seed=3, noise=0.0, trials=4)
    assert found is not None
    for movement in found.movements:
        assert (movement.p10, movement.p50, movement.p90) == (0.0, 0.0, 0.0)
    assert found.flip_share == 0.0


def test_the_same_factor_on_every_row_scales_the_period():
    assert POWERLESS.energy is None
    slower = CostModel(disturbed(PROFILE, 0.05, Constant()), POWERLESS.hardware)
    schedule = plans_of(POWERLESS)["sequential"]
    before, after = (predict(schedule, GRAPH, costs, MIX) for costs in (POWERLESS, slower))
    assert after.period_us == pytest.approx(1.05 * before.period_us, rel=1e-9)


def test_only_the_excess_of_a_slowdown_is_scaled():
    slower = disturbed(PROFILE, 0.05, Constant()).pairs[0]
    assert PROFILE.pairs[0].slowdown_a == 1.08
    assert slower.slowdown_a == pytest.approx(1 + 0.08 * 1.05)
    assert slower.slowdown_b == pytest.approx(1 + 0.10 * 1.05)


def test_factors_stay_within_the_noise_and_differ_between_rows():
    shaken = disturbed(PROFILE, 0.05, Random(0))
    factors = [b.median_us / a.median_us for a, b in zip(PROFILE.rows, shaken.rows, strict=True)]
    assert min(factors) >= 0.95
    assert max(factors) <= 1.05
    assert max(factors) - min(factors) > 0.09
    assert len(set(factors)) > len(factors) // 2


def test_periods_move_less_than_the_noise_and_percentiles_are_in_order():
    found = sensitivity(POWERLESS, GRAPH, MIX, plans_of(POWERLESS), seed=0)
    assert found is not None
    assert [movement.role for movement in found.movements] == [
        "sequential, winner",
        "best overlapped",
    ]
    for movement in found.movements:
        assert -0.05 < movement.p10 <= movement.p50 <= movement.p90 < 0.05
        assert movement.p10 < movement.p90


def test_the_seed_decides_everything():
    plans = plans_of(POWERLESS)
    first, again, other = (
        sensitivity(POWERLESS, GRAPH, MIX, plans, seed=seed, trials=3) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_choice_at_the_margin_flips_in_some_trials():
    # Kernels on the whole batch made slower until the split plan wins by just the search's margin.
    plans = plans_of(POWERLESS)
    rival = nano_only(GRAPH, POWERLESS, MIX, "interleaved")
    ratio = (
        predict(rival, GRAPH, POWERLESS, MIX).period_us
        / predict(plans["sequential"], GRAPH, POWERLESS, MIX).period_us
    )
    assert ratio > 1
    tokens = MIX.tokens
    whole_batch = {
        row.point: ratio / 0.98 if row.point.tokens == tokens else 1.0 for row in PROFILE.rows
    }
    rows = tuple(
        replace(row, median_us=row.median_us * whole_batch[row.point]) for row in PROFILE.rows
    )
    costs = CostModel(replace(PROFILE, rows=rows), POWERLESS.hardware)
    close = {"sequential": plans["sequential"], "best overlapped": rival}
    found = sensitivity(costs, GRAPH, MIX, close, seed=0)
    assert found is not None
    assert 0 < found.flip_share < 1


def test_without_a_profile_there_is_nothing_to_disturb():
    costs = CostModel(None, h200())
    assert sensitivity(costs, GRAPH, MIX, plans_of(costs), seed=0) is None


def test_the_shipped_h200_profile_takes_less_than_five_seconds():
    costs, started = CostModel(shipped_profile("h200"), h200()), time.monotonic()
    assert sensitivity(costs, GRAPH, MIX, plans_of(costs), seed=0) is not None
    assert time.monotonic() - started < 5
