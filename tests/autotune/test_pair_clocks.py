"""Slowdowns of pairs at one clock, against hand-computed clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.pair_clocks import at_equal_clocks, pair_clock
from nanoflow_tune.autotune.power_model import Load, PowerModel
from nanoflow_tune.profiler.profile import EnergyModel, PairRow, Point

POWER = PowerModel(
    base=EnergyModel(static_w=100.0, joules_per_flop=1e-12, joules_per_byte=1e-10),
    cap_w=700.0,
    exponent=1.0,
)
GEMM = Point(kind="gemm", shape="n1_k1", variant="sm90", tokens=1024, kv_len=0, num_sms=108)
DECODE = replace(GEMM, kind="decode_attention", kv_len=1024, num_sms=24)
LOADS = {
    GEMM: Load(us=100.0, joules=0.075, stretch_from=1.0),
    DECODE: Load(us=100.0, joules=0.025, stretch_from=0.9),
}
PAIR = PairRow(
    a=GEMM, b=DECODE, slowdown_a=1.25, slowdown_b=1.25, watts=690.0, sm_clock_mhz=1950, n=99
)


def test_the_clock_of_a_pair_by_hand():
    """0.1 J in 125 us are 800 W at the highest clock; 600 W are left: x = 3 / 4."""
    assert pair_clock(PAIR, (LOADS[GEMM], LOADS[DECODE]), POWER) == pytest.approx(0.75)


def test_what_the_clock_explains_is_no_interference():
    """1.25 of which 1 / 0.75 is the clock's: less than nothing is left of the GEMM's."""
    (found,) = at_equal_clocks([PAIR], LOADS.__getitem__, POWER)
    assert found.slowdown_a == pytest.approx(1.25 * 0.75)
    assert found.slowdown_b == PAIR.slowdown_b


def test_a_gemm_that_waits_for_memory_stays_slowed():
    """2.5 of the GEMM: 0.03 J in 100 us and 0.02 are 500 W, so that no clock fell."""
    starved = replace(PAIR, slowdown_a=2.5)
    (found,) = at_equal_clocks([starved], LOADS.__getitem__, POWER)
    assert found.slowdown_a == 2.5


def test_pairs_below_the_cap_and_of_unmeasured_kernels_stay():
    below = replace(PAIR, watts=500.0)
    assert at_equal_clocks([below], LOADS.__getitem__, POWER) == [below]
    assert at_equal_clocks([PAIR], lambda _: None, POWER) == [PAIR]
