"""Times of kernels side by side, from the ends of their replays."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from nanoflow_tune.profiler.timing import Samples, steps_while_all_ran  # noqa: E402


def test_only_replays_that_ended_while_all_ran_count():
    slow_then_fast = [2.0, 4.0, 6.0, 6.5, 7.0, 7.5]
    other = [3.0, 6.0]
    assert steps_while_all_ran([slow_then_fast, other], [1, 3]) == pytest.approx((2000.0, 1000.0))


def test_a_kernel_that_ends_nothing_beside_the_others_is_refused():
    with pytest.raises(ValueError, match="ended 1 replays"):
        steps_while_all_ran([[10.0, 20.0], [1.0, 10.0]], [1, 1])


def test_percentiles_are_interpolated():
    samples = Samples(times_us=(4.0, 1.0, 3.0, 2.0), sm_clock_mhz=1500.0)
    assert samples.percentile(0.5) == samples.median_us == 2.5
    assert samples.percentile(0.0) == 1.0
    assert samples.percentile(1.0) == 4.0
