"""Fake kernels: a family, exact times by formula, and a measuring loop on a fake clock."""

from __future__ import annotations

from math import ceil

from nanoflow_tune.profiler.campaign import Budget, measure_curves
from nanoflow_tune.profiler.grid import Family, legal_shares
from nanoflow_tune.profiler.profile import Row
from nanoflow_tune.profiler.refinement import predicted_s

SHARES = legal_shares(132, 8)


def family(**changes):
    values = {
        "kind": "gemm",
        "shape": "n8192_k4096",
        "kv_len": 0,
        "variants": ("a",),
        "tokens": (2048, 512, 1024),
        "shares": (132, 100, 64),
        "edge": 16,
        "lattice": tuple(share for share in SHARES if share >= 16),
        "weight": 1.0,
    }
    return Family(**{**values, **changes})


def linear(point):
    """Perfect scaling with SMs, time linear in rows."""
    return 5e4 * (point.tokens + 100) / point.num_sms / 100


def staircase(tile_rows=128, tile_columns=256):
    """Whole waves of tiles of an 8192 wide output."""

    def us(point):
        tiles = ceil(point.tokens / tile_rows) * ceil(8192 / tile_columns)
        return 10.0 * ceil(tiles / point.num_sms)

    return us


def row_of(point, us, **changes):
    values = {
        "point": point,
        "median_us": us,
        "p10_us": us,
        "p90_us": us,
        "n": 5,
        "joules": 0.0,
        "joules_source": "missing",
        "sm_clock_mhz": 1500.0,
        "watts": 0.0,
    }
    return Row(**{**values, **changes})


def explore(families, time_of, seconds=1e9, rows=None):
    """Rows, clock at the end and whether all is known, after measuring on a fake clock."""
    now = [0.0]
    rows = {} if rows is None else rows

    def measure(point):
        row = row_of(point, time_of(point))
        now[0] += predicted_s(point)
        return row

    budget = Budget(clock=lambda: now[0], start_s=0.0, seconds=seconds)
    is_whole = measure_curves(families, rows, measure, budget)
    return rows, now[0], is_whole
