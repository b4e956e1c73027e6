"""Times between the rows of an irregular grid, as an adaptive profile leaves it."""

from __future__ import annotations

import pytest

from nanoflow_tune.autotune.kernel_grid import KernelGrid
from nanoflow_tune.profiler.profile import Point, Row


def row(tokens, num_sms, us, kv_len=0):
    point = Point(
        kind="gemm", shape="n64_k64", variant="v", tokens=tokens, kv_len=kv_len, num_sms=num_sms
    )
    return Row(
        point=point,
        median_us=us,
        p10_us=us,
        p90_us=us,
        n=5,
        joules=0.0,
        joules_source="missing",
        sm_clock_mhz=0.0,
        watts=0.0,
    )


def roofline_us(tokens, kv_len, num_sms):
    return max(1, kv_len) * tokens / num_sms


def us(tokens, num_sms):
    """Not proportional to rows: a roofline ratio between numbers of rows would be wrong."""
    return 100 * (tokens + 512) / num_sms


def grid(places):
    return KernelGrid([row(t, s, us(t, s)) for t, s in places], roofline_us)


COARSE = [(tokens, share) for tokens in (512, 1024, 2048) for share in (64, 100, 132)]


def test_a_share_measured_at_other_rows_only_is_interpolated_within_its_own_rows():
    made = grid([*COARSE, (2048, 116), (2048, 84)])
    time = made.time(512, 0, 116)
    assert not time.is_measured
    assert time.us == pytest.approx(us(512, 116), rel=1e-3)
    assert made.time(1536, 0, 84).us == pytest.approx(us(1536, 84), rel=1e-3)
    assert made.time(2048, 0, 116).is_measured


def test_rows_measured_on_all_sms_only_count_there_and_not_on_other_shares():
    made = KernelGrid(
        [*(row(t, s, us(t, s)) for t, s in COARSE), row(1536, 132, 3 * us(1536, 132))], roofline_us
    )
    assert made.time(1536, 0, 132).us == pytest.approx(3 * us(1536, 132))
    assert made.time(1536, 0, 100).us == pytest.approx(us(1536, 100), rel=1e-3)


def test_outside_of_all_shares_and_rows_the_utilisation_of_the_nearest_is_kept():
    made = grid(COARSE)
    assert made.time(1024, 0, 32).us == pytest.approx(2 * us(1024, 64))
    assert made.time(4096, 0, 132).us == pytest.approx(2 * us(2048, 132))
    assert made.time(128, 0, 132).us == pytest.approx(us(512, 132) / 4)


def test_time_per_key_is_interpolated_over_the_logarithm_of_keys():
    made = KernelGrid([row(8, 16, 512.0, 512), row(8, 16, 4096.0, 2048)], roofline_us)
    assert made.time(8, 1024, 16).us == pytest.approx(1.5 * 1024)
    assert made.time(8, 4096, 16).us == pytest.approx(2 * 4096.0)
