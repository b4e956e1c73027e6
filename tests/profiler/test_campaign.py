"""A run within its minutes: coarse first, resumed, joules where they tell most."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.profiler.campaign import (
    CHUNK,
    JOULES_UNTIL,
    SECONDS_PER_JOULE_POINT,
    SOLO_UNTIL,
    Budget,
    measure_joules,
    stage_ends,
)
from nanoflow_tune.profiler.joule_points import joule_points

from .curves import explore, family, linear, row_of, staircase

FAMILIES = (family(), family(shape="n4096_k4096"), family(kind="norm", shape="d4096", edge=8))


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5])
def test_a_run_ends_within_its_part_of_the_time(seconds):
    rows, used, is_whole = explore(FAMILIES, staircase(), seconds)
    assert not is_whole
    assert used <= SOLO_UNTIL * seconds
    assert used > 0.8 * SOLO_UNTIL * seconds
    assert rows


def test_a_run_out_of_time_has_the_first_rows_of_every_family():
    coarse = len(FAMILIES) * len(FAMILIES[0].shares)
    rows, _, _ = explore(FAMILIES, staircase(), seconds=0.026 * (coarse + 3) / SOLO_UNTIL)
    measured = {(p.kind, p.shape) for p in rows if p.tokens == 2048}
    assert measured == {(f.kind, f.shape) for f in FAMILIES}


def test_a_run_that_was_cut_goes_on_to_the_same_rows():
    whole, _, _ = explore(FAMILIES, staircase())
    rows, _, is_whole = explore(FAMILIES, staircase(), seconds=1.0)
    assert not is_whole
    again, _, is_whole = explore(FAMILIES, staircase(), rows=rows)
    assert is_whole
    assert set(again) == set(whole)


def test_every_family_has_joules_of_its_fastest_variant_and_the_runner_up():
    made = family(variants=("slow", "fast"))

    def time_of(point):
        return linear(point) * (1.1 if point.variant == "slow" else 1.0)

    rows, _, _ = explore([made], time_of)
    points = joule_points([made], rows)
    assert points[0] == made.point("fast", 2048, 132)
    assert made.point("slow", 2048, 132) in points
    assert {p.num_sms for p in points if p.variant == "fast"} == {132, 100, 64}


def with_joules(point, watts):
    joules = 1e-6 * linear(point) * watts
    return row_of(point, linear(point), joules=joules, joules_source="measured", watts=watts)


def test_a_tenth_of_the_rows_have_joules_where_watts_vary_first():
    steady, varying = family(tokens=(2048, 512, 1024)), family(shape="n64_k64")
    rows, _, _ = explore([steady, varying], linear)
    bulk = {replace(p, shape=f"x{i}"): rows[p] for p in list(rows) for i in range(20)}

    def measure(point):
        watts = 700.0 if point.shape == steady.shape else 300.0 + point.num_sms
        return with_joules(point, watts)

    budget = Budget(clock=lambda: 0.0, start_s=0.0, seconds=1e9)
    measure_joules([steady, varying], rows, measure, budget)
    few = sum(row.joules_source == "measured" for row in rows.values())
    assert few == 10  # the basic ones: a tenth of so few rows is less
    rows |= dict(list(bulk.items())[: 120 - len(rows)])
    measure_joules([steady, varying], rows, measure, budget)
    more = [p for p, row in rows.items() if row.joules_source == "measured"]
    assert len(more) == 12
    assert len([p for p in more if p.shape == steady.shape]) == 5
    rows |= bulk
    measure_joules([steady, varying], rows, measure, budget)
    more = [p for p, row in rows.items() if row.joules_source == "measured"]
    assert 12 < len(more) <= 0.1 * len(rows)
    assert len([p for p in more if p.shape == steady.shape]) > 5


def test_the_last_stage_has_all_of_the_time():
    assert stage_ends(("compute", "joules", "pairs")) == (SOLO_UNTIL, JOULES_UNTIL)
    assert stage_ends(("joules",))[1] == 1.0
    assert stage_ends(("compute",))[0] == 1.0
    curves, joules = stage_ends(("compute", "joules"))
    assert SOLO_UNTIL < curves < joules == 1.0


def test_groups_without_joules_come_first():
    fast, others = family(variants=("slow", "fast"), edge=0), family(shape="n64_k64")

    def time_of(point):
        return linear(point) * (1.05 if point.variant == "slow" else 1.0)

    rows, _, _ = explore([fast, others], time_of)
    bulk = {replace(p, shape=f"x{i}"): rows[p] for p in list(rows) for i in range(20)}
    rows |= bulk
    for _ in range(2 * 5):  # what every family needs
        point = joule_points([fast, others], rows)[0]
        rows[point] = with_joules(point, 700.0)
    assert not any(p.variant == "slow" and p.num_sms < 132 for p in rows if rows[p].watts)
    points = joule_points([fast, others], rows)
    assert len(points) == len(set(points))
    assert not any(rows[p].watts for p in points)
    assert any(p.variant == "slow" for p in points[:4])
    assert len({p.tokens for p in points[:4]}) > 1


def test_joules_end_with_their_part_of_the_time():
    rows, _, _ = explore(FAMILIES, linear)
    now = [0.0]

    def measure(point):
        now[0] += SECONDS_PER_JOULE_POINT
        return with_joules(point, 700.0)

    measure_joules(FAMILIES, rows, measure, Budget(clock=lambda: now[0], start_s=0.0, seconds=4.0))
    assert 2.5 < now[0] <= JOULES_UNTIL * 4.0
    assert CHUNK > 4
