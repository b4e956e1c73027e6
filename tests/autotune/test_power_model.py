"""Power model: hand-computed working points, fits with known answers.

`tests/benchmarks/test_measured_plans.py` holds it to measured plans.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest

from nanoflow_tune.autotune.baselines import nano_only, sequential
from nanoflow_tune.autotune.bounds import power_limit_of
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.power_fit import fit_error, fit_power
from nanoflow_tune.autotune.power_model import (
    EXPONENT,
    FASTEST,
    Load,
    PowerModel,
    Price,
    period_at,
)
from nanoflow_tune.autotune.simulator import Simulator, predict
from nanoflow_tune.profiler.energy import point_costs
from nanoflow_tune.profiler.profile import EnergyModel, Point, Profile, Row
from nanoflow_tune.profiler.store import shipped_profile

from .fakes import MIX, graph_of, h200, linear_profile

BASE = EnergyModel(static_w=100.0, joules_per_flop=1e-12, joules_per_byte=100e-12)
MODEL = PowerModel(base=BASE, cap_w=700.0, exponent=1.0)
GRAPH = graph_of("llama3-8b")


def compute(us: float, joules: float) -> Load:
    return Load(us=us, joules=joules, stretch_from=1.0)


def memory(us: float, joules: float) -> Load:
    return Load(us=us, joules=joules, stretch_from=0.0)


def test_working_point_of_compute_alone_by_hand():
    """D x = 600 W x t / x, so x^2 = 600 t / D = 600e-6 x 1000 / 1.2 = 1 / 2."""
    load = compute(1000.0, 1.2)
    clock = MODEL.clock_under_cap(load.joules, load.us_at)
    assert clock == pytest.approx(0.5**0.5, rel=1e-6)
    assert load.us_at(clock) == pytest.approx(1000 * 2**0.5, rel=1e-6)


def test_working_point_of_memory_alone_costs_no_time():
    load = memory(1000.0, 1.2)
    assert MODEL.clock_under_cap(load.joules, load.us_at) == pytest.approx(0.5, rel=1e-6)
    assert load.us_at(0.5) == 1000.0
    assert MODEL.price([(load, 1)]).us_per_joule == 0.0


def test_below_the_cap_nothing_slows_down():
    load = compute(1000.0, 0.5)
    assert MODEL.clock_under_cap(load.joules, load.us_at) == 1.0
    assert MODEL.price([(load, 3)]) == FASTEST


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.8])
def test_price_is_the_slope_of_the_period(scale: float):
    """Small changes of joules and time against the period solved anew."""
    loads = [(compute(700.0, 0.9), 2), (memory(600.0 * scale, 0.5), 3)]

    def period_us(extra_j: float = 0.0, extra_us: float = 0.0) -> float:
        more = [*loads, (memory(extra_us, extra_j), 1)]

        def at(clock: float) -> float:
            return sum(count * load.us_at(clock) for load, count in more)

        joules = sum(count * load.joules for load, count in more)
        return at(MODEL.clock_under_cap(joules, at))

    price = MODEL.price(loads)
    assert price.us_per_joule > 0
    by_joule = (period_us(extra_j=1e-4) - period_us()) / (1e-4 * price.clock)
    by_us = (period_us(extra_us=0.1) - period_us()) / 0.1
    assert by_joule / by_us == pytest.approx(price.us_per_joule, rel=2e-2)


def test_period_between_clocks_is_exact_for_what_stretches():
    periods = {x: 500 + 300 / x for x in (1.0, 0.6)}
    assert period_at(periods, 0.8) == pytest.approx(500 + 300 / 0.8)
    assert period_at(periods, 0.4) == pytest.approx(500 + 300 / 0.4)
    assert period_at({1.0: 7.0}, 0.5) == 7.0


def measured_row(variant: str, clock_mhz: float, factor: float, num_sms: int = 132) -> Row:
    """A GEMM whose FLOPs cost `factor` x `BASE` at 1980 MHz, in proportion to the clock."""
    point = Point(
        kind="gemm", shape="n4096_k4096", variant=variant, tokens=2048, kv_len=0, num_sms=num_sms
    )
    return with_joules(point, clock_mhz, factor)


def with_joules(point: Point, clock_mhz: float, factor: float) -> Row:
    seconds, clock = 100e-6, clock_mhz / 1980
    flops, moved, _ = point_costs(point)
    dynamic = factor * clock * BASE.dynamic_joules(flops, 0.0)
    dynamic += clock**EXPONENT * BASE.dynamic_joules(0.0, moved)
    joules = dynamic + BASE.static_w * seconds
    return Row(
        point=point,
        median_us=90.0,
        p10_us=89.0,
        p90_us=91.0,
        n=10,
        joules=joules,
        joules_source="measured",
        sm_clock_mhz=clock_mhz,
        watts=joules / seconds,
    )


def test_fit_finds_exponent_and_factors_of_made_up_rows():
    """Many rows of two variants of which one takes 10 % more, joules as clock^1.0."""
    rows: list[Row] = []
    for index in range(60):
        clock = 1200 + 13 * index
        for variant, factor in (("lean", 1.3), ("hungry", 1.43)):
            point = replace(measured_row(variant, clock, factor).point, tokens=1024 + index)
            rows.append(with_joules(point, clock, factor))
    power = fit_power(Profile(hardware="h200", dtype="bfloat16", rows=tuple(rows)), BASE, 700.0)
    top = max(row.sm_clock_mhz for row in rows)
    assert power.exponent == pytest.approx(1.0, abs=0.03)
    ratio = power.effects["gemm", "hungry"] - power.effects["gemm", "lean"]
    ratio += power.effects["gemm", "hungry", "132"] - power.effects["gemm", "lean", "132"]
    assert exp(ratio) == pytest.approx(1.1, abs=0.01)
    whole = sum(
        power.effects[key] for key in (("gemm",), ("gemm", "lean"), ("gemm", "lean", "132"))
    )
    assert exp(whole) == pytest.approx(1.3 * top / 1980, rel=0.02)


def test_without_measured_joules_the_energy_model_stands():
    power = fit_power(None, BASE, 700.0)
    assert (power.exponent, power.effects) == (EXPONENT, {})
    op = GRAPH.op("down")
    load = power.load(op, MIX, 132, "cublas", 300.0)
    assert load.joules == pytest.approx(BASE.dynamic_joules(op.flops(MIX), op.memory_bytes(MIX)))


def test_few_rows_move_a_factor_little():
    profile = Profile(hardware="h200", dtype="bfloat16", rows=(measured_row("odd", 1980.0, 1.5),))
    power = fit_power(profile, BASE, 700.0)
    assert 0 < sum(power.effects.values()) < log(1.5)


def hungry_costs(joules_per_byte: float, cap_w: float = 700.0) -> CostModel:
    """Decode attention in two made-up variants: `quick`, and `lean` on 48 SMs."""
    profile, rows = linear_profile(GRAPH), list[Row]()
    for row in profile.rows:
        if row.point.kind != "decode_attention":
            rows.append(row)
            continue
        is_lean = row.point.num_sms == 48
        rows.append(
            replace(row, median_us=300.0 * row.point.tokens / 1024 * (1.02 if is_lean else 1))
        )
    energy = EnergyModel(static_w=117.0, joules_per_flop=1e-12, joules_per_byte=joules_per_byte)
    hardware = replace(h200(), power_cap_w=cap_w)
    costs = CostModel(replace(profile, rows=tuple(rows), energy=energy), hardware)
    assert costs.power is not None
    effects = {
        ("decode_attention", "triton", str(n)): (-0.4 if n == 48 else 0.0)
        for n in (16, 48, 64, 132)
    }
    costs._power = replace(costs.power, effects=effects)  # pyright: ignore[reportPrivateUsage]
    return costs


def test_the_low_joule_share_wins_at_the_cap_and_the_fast_one_without_it():
    capped, free = hungry_costs(130e-12), hungry_costs(130e-12, cap_w=5000.0)
    shares = {
        name: {n.op: n.num_sms for n in sequential(GRAPH, costs, MIX).nano_ops}
        for name, costs in (("capped", capped), ("free", free))
    }
    assert shares["capped"]["decode_attention"] == 48
    assert set(shares["free"].values()) == {132}


def test_a_higher_cap_is_never_slower_and_saves_no_clock():
    periods: list[float] = []
    clocks: list[float] = []
    for cap_w in (300.0, 400.0, 500.0, 700.0, 1000.0, 3000.0):
        costs = CostModel(linear_profile(GRAPH), replace(h200(), power_cap_w=cap_w))
        timing = predict(nano_only(GRAPH, costs, MIX), GRAPH, costs, MIX)
        assert timing.watts <= cap_w * (1 + 1e-9)
        periods.append(timing.period_us)
        clocks.append(timing.sm_clock_mhz)
    assert periods == sorted(periods, reverse=True)
    assert clocks == sorted(clocks)
    assert clocks[-1] == 1980.0


def test_choosing_by_joules_is_never_slower_than_the_fastest_kernels():
    costs = CostModel(shipped_profile("h200"), h200())
    blind = CostModel(shipped_profile("h200"), h200())
    blind.energy = None  # joules cost nothing
    for model, tp_degree in (("llama3-8b", 1), ("llama2-70b", 2)):
        graph = graph_of(model, tp_degree)
        aware, fastest = (sequential(graph, c, MIX) for c in (costs, blind))
        us = [predict(schedule, graph, costs, MIX).period_us for schedule in (aware, fastest)]
        assert us[0] <= us[1] * (1 + 1e-9)


def test_price_of_a_roofline_is_the_fastest():
    assert CostModel(None, h200()).price(GRAPH, MIX) == FASTEST
    costs = CostModel(shipped_profile("h200"), h200())
    price = costs.price(GRAPH, MIX)
    assert isinstance(price, Price)
    assert 0.5 < price.clock < 1
    assert 500 < price.us_per_joule < 3000


def test_memory_bound_work_waits_for_ports_only_on_few_sms():
    op = GRAPH.op("decode_attention")
    moved = op.memory_bytes(MIX)
    wide, narrow = (
        MODEL.load(op, MIX, num_sms, "triton", moved / rate)
        for num_sms, rate in ((132, 4.2e6), (16, 60 * 16 * 1980.0))
    )
    assert wide.us_at(0.7) == wide.us
    assert narrow.us_at(0.7) == pytest.approx(narrow.us / 0.7, rel=1e-6)


def test_joules_of_the_shipped_rows_are_told_within_a_tenth():
    """Leave-one-out; the worst is an embedding of 0.3 mJ that L2 serves."""
    profile = shipped_profile("h200")
    assert profile is not None
    assert profile.energy is not None
    error = fit_error(profile, profile.energy)
    assert error.num_rows >= 60
    assert error.median < 0.08
    assert error.worst < 1.2


def test_bytes_of_gemms_are_told_apart_from_their_flops():
    """Rows of few and of many tokens, whose bytes cost half of the energy model's."""
    rows: list[Row] = []
    for tokens in (64, 128, 256, 512, 1024, 2048, 4096) * 6:
        point = replace(measured_row("sm90", 1980.0, 1.2).point, tokens=tokens)
        flops, moved, _ = point_costs(point)
        dynamic = 1.2 * BASE.dynamic_joules(flops, 0.0) + 0.5 * BASE.dynamic_joules(0.0, moved)
        joules = dynamic + BASE.static_w * 100e-6
        rows.append(replace(with_joules(point, 1980.0, 1.2), joules=joules, watts=joules / 100e-6))
    power = fit_power(Profile(hardware="h200", dtype="bfloat16", rows=tuple(rows)), BASE, 700.0)
    assert power.gemm_bytes == pytest.approx(0.5, abs=0.1)


def test_the_power_limit_is_below_every_prediction_and_near_the_sequential_one():
    costs = CostModel(shipped_profile("h200"), h200())
    limit_us = power_limit_of(GRAPH, MIX, costs)
    period_us = predict(sequential(GRAPH, costs, MIX), GRAPH, costs, MIX).period_us
    assert 0.85 * period_us < limit_us < 1.01 * period_us
    top_mhz, power = 1980.0, costs.power
    assert power is not None
    at = {mhz: power_limit_of(GRAPH, MIX, costs, mhz) for mhz in (1400.0, top_mhz)}
    assert at[1400.0] < limit_us < at[top_mhz]
    assert at[1400.0] == pytest.approx(at[top_mhz] * (1400.0 / top_mhz) ** power.exponent)


def test_a_simulator_at_a_lower_clock_is_the_sum_of_its_stretched_ops():
    costs = CostModel(linear_profile(GRAPH), h200())
    schedule = sequential(GRAPH, costs, MIX)
    simulator = Simulator(schedule, GRAPH, costs, MIX)
    stretched = sum(load.us_at(0.7) - load.us for load in simulator.loads) * GRAPH.num_layers
    overhead = costs.overhead_loads(GRAPH, MIX)
    stretched += sum(load.us_at(0.7) - load.us for load in overhead)
    slower = simulator.timeline(clock=0.7).period_us
    assert slower == pytest.approx(simulator.timeline().period_us + stretched, rel=1e-6)
