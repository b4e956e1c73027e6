"""Whether a profile fits a card: spread rows, ratios by kind, a verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from nanoflow_tune.profiler.calibration import compare, spread_rows
from nanoflow_tune.profiler.store import shipped_profile

from .curves import family, row_of


def rows_of(kind, count, us=10.0):
    made = family(kind=kind, tokens=tuple(range(128, 128 * (count + 1), 128)))
    return [row_of(made.point("a", tokens, 132), us) for tokens in made.tokens]


def scaled(rows, factors):
    return [replace(r, median_us=r.median_us * factors.get(r.point.kind, 1.0)) for r in rows]


def test_every_kind_gives_rows_and_collectives_and_failures_none():
    rows = [*rows_of("gemm", 500), *rows_of("norm", 3), *rows_of("all_reduce", 9)]
    rows += [replace(row, error="failed") for row in rows_of("rope_append", 3)]
    chosen = spread_rows(rows, 40)
    assert Counter(row.point.kind for row in chosen) == {"gemm": 37, "norm": 3}
    tokens = [row.point.tokens for row in chosen if row.point.kind == "gemm"]
    assert min(tokens) < 2048
    assert max(tokens) > 128 * 480


def test_the_shipped_profile_gives_forty_rows_of_many_shares():
    chosen = spread_rows(shipped_profile("h200").rows)
    assert 30 <= len(chosen) <= 40
    assert len({row.point.num_sms for row in chosen}) >= 5


def test_a_profile_fits_within_five_percent_and_ten_of_each_kind():
    rows = [*rows_of("gemm", 10), *rows_of("norm", 4)]
    assert compare(rows, scaled(rows, {"norm": 1.08})).fits
    result = compare(rows, scaled(rows, {"norm": 1.2}))
    assert not result.fits
    assert result.median == 1.0
    assert result.scale_by_kind == pytest.approx({"gemm": 1.0, "norm": 1.2})
    assert not compare(rows, scaled(rows, {"gemm": 0.9})).fits


def test_the_worst_row_may_be_faster_or_slower():
    rows = rows_of("gemm", 3)
    measured = [replace(rows[0], median_us=13.0), rows[1], replace(rows[2], median_us=5.0)]
    assert compare(rows, measured).worst == (rows[2].point, 0.5)


def test_rows_that_fail_here_mean_that_it_does_not_fit():
    rows = rows_of("gemm", 2)
    result = compare(rows, [rows[0], replace(rows[1], error="no such variant")])
    assert not result.fits
    assert result.failed == {rows[1].point: "no such variant"}
    with pytest.raises(ValueError, match="no row of the profile could be measured again: no such"):
        compare(rows[1:], [replace(rows[1], error="no such variant")])
