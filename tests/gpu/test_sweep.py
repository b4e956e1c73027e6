"""The profiler on a device: one point, joules, two and three side by side, a chunk of a run.

Nothing is said about times: only that rows come back whole and that partitions hold them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.profiler.profile import PairRow, Point, TripleRow
from nanoflow_tune.search_spaces.loader import load_hardware

pytestmark = pytest.mark.gpu
GEMM = Point(kind="gemm", shape="n4096_k4096", variant="cublas", tokens=512, kv_len=0, num_sms=132)
DECODE = Point(
    kind="decode_attention",
    shape="q32_kv8_d128",
    variant="triton",
    tokens=128,
    kv_len=512,
    num_sms=16,
)
NORM = Point(kind="norm", shape="d4096", variant="triton", tokens=1024, kv_len=0, num_sms=16)


@pytest.fixture(scope="module")
def sweep():
    from nanoflow_tune.profiler.power import PowerMeter
    from nanoflow_tune.profiler.sweep import Sweep
    from nanoflow_tune.runtime import kernels

    kernels.load("cuda")
    return Sweep(load_hardware("h200"), PowerMeter(0), 1e9)


@pytest.mark.parametrize("point", [GEMM, replace(GEMM, num_sms=100), DECODE, NORM])
def test_a_point_becomes_a_row_with_samples_and_joules(sweep, point):
    assert sweep.compile([point]) is None
    row = sweep.measure(point, with_joules=True)
    assert not row.error
    assert row.n >= 3
    assert row.p10_us <= row.median_us <= row.p90_us
    assert row.joules_source == "measured"
    assert row.watts > 0


def test_what_fails_is_a_row_and_the_next_point_runs(sweep):
    bad = sweep.measure(replace(GEMM, variant="no_such_kernel"), with_joules=False)
    assert "no_such_kernel" in bad.error
    assert not sweep.has_lost_context()
    assert not sweep.measure(GEMM, with_joules=False).error


def test_two_and_three_run_side_by_side(sweep):
    pair = sweep.measure_together((replace(GEMM, num_sms=116), DECODE))
    assert isinstance(pair, PairRow)
    triple = sweep.measure_together((replace(GEMM, num_sms=100), DECODE, NORM))
    assert isinstance(triple, TripleRow)
    for slowdown in (pair.slowdown_a, pair.slowdown_b, triple.slowdown_a, triple.slowdown_c):
        assert slowdown > 0
