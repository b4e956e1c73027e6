"""Layer benchmark: contenders from a search, solo points of a plan, the power limit by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanoflow_tune.profiler.profile import Point, Row
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_hardware


@pytest.fixture(scope="module")
def stored(search_only):
    return search_only("layers")


@pytest.fixture
def layers(load):
    return load("layers")


@pytest.fixture
def case(load):
    return load("layer_cases").CASES["8b"]


@pytest.fixture
def schedules(layers, case, stored):
    return [p.schedule for p in layers.load_forecast(stored, case).predictions]


@pytest.fixture
def graph(layers, case):
    return OpGraph.build(layers.iteration_case(case, load_hardware("h200")).model, 1)


def row(joules, watts, clock, **changes):
    point = Point(kind="gemm", shape="n64_k64", variant="v", tokens=128, kv_len=0, num_sms=132)
    return Row(
        point=replace(point, **changes),
        median_us=1.0,
        p10_us=1.0,
        p90_us=1.0,
        n=5,
        joules=joules,
        joules_source="measured",
        sm_clock_mhz=clock,
        watts=watts,
    )


def test_the_race_holds_sequential_ones_and_overlapped_ones_each_once(layers, schedules, graph):
    names = [schedule.name for schedule in schedules]
    assert names[:2] == ["sequential", "sequential_cublas"]
    is_overlapped = [layers.overlaps(schedule, graph) for schedule in schedules]
    assert 1 <= sum(is_overlapped) <= layers.OVERLAPPED_IN_RACE
    assert len(names) - sum(is_overlapped) >= 2
    assert len({(s.nano_batches, s.nano_ops) for s in schedules}) == len(schedules)


def test_the_figures_come_from_the_final_of_the_fastest_of_each_kind(
    layers, case, schedules, graph, monkeypatch, ranks_that
):
    """One schedule cannot run; the race is close, the final decides and gives the ratio."""
    is_overlapped = [layers.overlaps(schedule, graph) for schedule in schedules]
    calls = []

    def call(function, iteration, asked, rounds, turn_s):
        calls.append(asked)
        return [[turns(schedule) for schedule in asked]]

    def turns(schedule):
        place = schedules.index(schedule)
        found = SimpleNamespace(layer_us=(), watts=0.0, sm_clock_mhz=0.0, error="no kernel")
        if place == 0:
            return found
        us = (110.0 if is_overlapped[place] else 100.0) + place
        return SimpleNamespace(layer_us=(us, us), watts=700.0, sm_clock_mhz=1500.0, error="")

    monkeypatch.setattr(layers, "gpu_ranks", ranks_that(call))
    monkeypatch.setattr(layers, "_limits", lambda *_: (50.0, 40.0))
    origin = {"command": "x", "commit": "abc", "gpu": "a GPU", "date": "2026-01-01"}
    ratio, limit, by_rows = layers.measure(case, load_hardware("h200"), schedules, origin)
    final = calls[1]
    assert schedules[0] not in final
    assert len(final) == 2 * layers.FINALISTS
    best, rival = (
        100.0 + min(i for i, o in enumerate(is_overlapped) if not o and i),
        110.0 + is_overlapped.index(True),
    )
    assert (ratio.id, ratio.value) == ("layer_8b", pytest.approx(best / rival))
    assert (limit.id, limit.value) == ("layer_limit", pytest.approx(best / 50.0))
    assert (by_rows.reach, by_rows.value) == ("", pytest.approx(best / 40.0))


def test_solo_points_are_the_nano_ops_of_the_plan_on_the_whole_gpu(layers, schedules, graph):
    points = layers.solo_points(schedules[0], graph, 132)
    assert len(points) == len(graph.layer)
    assert {point.num_sms for point in points} == {132}
    by_kind = {point.kind: point for point in points}
    assert (by_kind["decode_attention"].tokens, by_kind["decode_attention"].kv_len) == (1024, 768)
    assert (by_kind["prefill_attention"].tokens, by_kind["prefill_attention"].kv_len) == (1024, 512)
    split = next(s for s in schedules if len(s.nano_batches) > 1)
    rows = [p.tokens for p in layers.solo_points(split, graph, 132) if p.kind == "gemm_silu"]
    assert sum(rows) == 2048


def test_the_power_limit_is_dynamic_joules_at_the_plans_clock_over_the_free_watts(layers):
    """1 J at 700 W of which 100 W are static: 6/7 J dynamic, 600 W free."""
    rows = [row(1.0, 700.0, 1500.0)]
    assert layers.limit_us(rows, 0.0, 1500.0, 100.0, 700.0) == pytest.approx(1e6 / 700)
    slower = layers.limit_us(rows, 2.0, 750.0, 100.0, 700.0)
    assert slower == pytest.approx(1e6 / 700 / 4)
    with pytest.raises(ValueError, match="joules of every op"):
        layers.limit_us([replace(rows[0], joules_source="missing")], 0.0, 1500.0, 100.0, 700.0)


def test_the_limit_takes_joules_in_turn_to_the_plans_clock(layers, case, schedules, graph):
    """0.6 J beyond static in turn, a plan at half of that clock, joules with the clock: 0.3 J."""
    pytest.importorskip("torch")
    from nanoflow_tune.profiler.timing import InTurn

    schedule = schedules[0]
    points = layers.solo_points(schedule, graph, 132)
    rows = [row(1.0, 700.0, 750.0, **{"kind": p.kind, "num_sms": p.num_sms}) for p in points]
    small = row(2.0, 700.0, 1500.0, num_sms=64)
    in_turn = InTurn(us=1e6, watts=0.7, sm_clock_mhz=1500.0)
    solo = layers.Solo(rows=rows, small=small, in_turn=in_turn, static_w=0.1, cap_w=0.7)
    asked = []

    class Ranks:
        def call(self, function, iteration, points, small):
            asked.append((points, small))
            return [solo, None]

    iteration = layers.iteration_case(case, load_hardware("h200"))
    turns = SimpleNamespace(layer_us=(1e6,), watts=0.7, sm_clock_mhz=750.0)
    limit, by_rows = layers._limits(Ranks(), iteration, schedule, turns, graph)
    assert limit == pytest.approx(1e6 * 0.3 / 0.6)
    assert by_rows == pytest.approx(layers.limit_us(rows, 1.0, 750.0, 0.1, 0.7))
    assert asked[0][0] == tuple(points)
    assert asked[0][1].num_sms == 64


def test_the_exponent_of_the_clock_comes_from_two_shares_and_noise_is_kept_out(layers):
    large, small = row(1.0, 700.0, 1400.0), row(2.0, 400.0, 1960.0)
    exponent = layers.clock_exponent(large, small, 0.0)
    assert 1.4**exponent == pytest.approx(2.0)
    assert layers.clock_exponent(large, replace(small, sm_clock_mhz=1405.0), 0.0) == 0.0
    assert layers.clock_exponent(large, replace(small, joules=0.5), 0.0) == 0.0
