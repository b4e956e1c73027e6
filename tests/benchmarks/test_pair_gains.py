"""Gains of pairs: in a row by hand, and what the shipped profile says of each kind of pair."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.power_model import Load, PowerModel
from nanoflow_tune.profiler.profile import EnergyModel
from nanoflow_tune.profiler.store import shipped_profile
from nanoflow_tune.search_spaces.loader import load_hardware


@pytest.fixture(scope="module")
def costs():
    return CostModel(shipped_profile("h200"), load_hardware("h200"))


class Costs:
    """A card with a cap of 300 W, 100 of them static; dynamic joules rise with the clock."""

    power = PowerModel(
        base=EnergyModel(static_w=100.0, joules_per_flop=0.0, joules_per_byte=0.0),
        cap_w=300.0,
        exponent=1.0,
    )


def test_in_a_row_both_take_turns_at_the_clock_that_the_cap_leaves(load):
    pairs = load("pair_gains")
    busy = Load(us=100.0, joules=0.04, stretch_from=1.0)
    idle = Load(us=100.0, joules=0.0, stretch_from=0.0)
    us, joules, clock = pairs.in_a_row(Costs, ((busy, 1.0), (idle, 1.0)))
    assert (us, clock) == (pytest.approx(200.0), pytest.approx(1.0))  # 200 W: just at the cap
    hot = replace(busy, joules=0.08)
    us, joules, clock = pairs.in_a_row(Costs, ((hot, 1.0), (idle, 1.0)))
    assert 0.08 * clock == pytest.approx(200e-6 * us, rel=1e-6)
    assert us == pytest.approx(100 / clock + 100)
    assert joules == pytest.approx(300e-6 * us, rel=1e-6)


def test_gemms_gain_beside_attention_and_norms_do_not(load, costs):
    pairs = load("pair_gains")
    gains = [pairs.gain(costs, pair) for pair in costs.profile.pairs if pair.watts > 0]
    by_kinds = {kinds: [g for g in gains if g.kinds == kinds] for kinds in {g.kinds for g in gains}}

    def median_of(kinds, what):
        values = sorted(getattr(g, what) for g in by_kinds[kinds])
        return values[len(values) // 2]

    assert median_of(("gemm", "decode_attention"), "joules_gain") > 1.03
    assert median_of(("decode_attention", "norm"), "time_gain") < 1.0
    assert len(pairs.table(gains)) == 2 + len(by_kinds)
    cells = gains[0].cells()
    assert len(cells) == len(pairs.COLUMNS)
