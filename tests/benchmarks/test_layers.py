"""Layer benchmark: contenders from a search, solo points of a plan, the power limit by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from nanoflow_tune.profiler.profile import Point, Row
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_hardware

from .conftest import BENCHMARKS


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "schedules.yaml"
    command = [sys.executable, str(BENCHMARKS / "layers.py"), "--case", "8b"]
    subprocess.run(
        [*command, "--search-only", str(path)],
        check=True,
        capture_output=True,
        cwd=BENCHMARKS.parent,
    )
    return path


@pytest.fixture
def layers(load):
    return load("layers")


@pytest.fixture
def schedules(layers, stored):
    found = layers.yaml.safe_load(stored.read_text())
    return [layers.from_mapping(layers.Schedule, entry, "stored") for entry in found]


@pytest.fixture
def graph(layers):
    case = layers.iteration_case(layers.CASES["8b"], load_hardware("h200"))
    return OpGraph.build(case.model, 1)


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


def test_the_exponent_of_the_clock_comes_from_two_shares_and_noise_is_kept_out(layers):
    large, small = row(1.0, 700.0, 1400.0), row(2.0, 400.0, 1960.0)
    exponent = layers.clock_exponent(large, small, 0.0)
    assert 1.4**exponent == pytest.approx(2.0)
    assert layers.clock_exponent(large, replace(small, sm_clock_mhz=1405.0), 0.0) == 0.0
    assert layers.clock_exponent(large, replace(small, joules=0.5), 0.0) == 0.0
