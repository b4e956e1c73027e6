"""Arrivals: Poisson with the workload's own lengths, or a trace's pattern at another pace."""

from __future__ import annotations

import numpy as np
import pytest

from nanoflow_tune.autotune.ablation import trace_lengths, workload_lengths
from nanoflow_tune.autotune.arrivals import poisson_arrivals, trace_arrivals
from nanoflow_tune.search_spaces.loader import load_workload

SHAREGPT = load_workload("sharegpt")


def trace_of(tmp_path, rows, head="TIMESTAMP,ContextTokens,GeneratedTokens"):
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_poisson_arrivals_belong_to_the_lengths_of_the_same_seed():
    arrivals = poisson_arrivals(SHAREGPT, 4000, 4096, 3, 20.0)
    assert len(arrivals) == len(workload_lengths(SHAREGPT, 4000, 4096, 3))
    assert arrivals[0] == 0
    assert np.diff(arrivals).mean() == pytest.approx(1 / 20, rel=0.05)
    twice = poisson_arrivals(SHAREGPT, 4000, 4096, 3, 40.0)
    assert twice == pytest.approx(np.array(arrivals) / 2)


@pytest.mark.parametrize(
    "times",
    [
        ["5.5", "6.5", "9.5"],
        ["2023-11-16 18:17:03.5000000", "2023-11-16 18:17:04.5000000", "2023-11-16T18:17:07.5"],
    ],
)
def test_a_trace_keeps_its_pattern_at_the_rate_asked_for(tmp_path, times):
    long = f"{times[1]},9000,1"  # left out, as of the lengths
    rows = [f"{times[0]},10,5", long, *(f"{time},7,8" for time in times[1:])]
    path = trace_of(tmp_path, rows)
    assert trace_arrivals(path, 100, 9, 0.5) == pytest.approx((0, 1, 4))
    assert trace_arrivals(path, 100, 9, 5.0) == pytest.approx((0, 0.1, 0.4))
    assert len(trace_lengths(path, 100, 9)) == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["soon,1,1", "2,1,1"], "request 1: --rate replays a trace by its column TIMESTAMP"),
        (["nan,1,1", "2,1,1"], "but got 'nan'"),
        (["2,1,1", "1,1,1"], "must ascend"),
        (["2,1,1", "2,1,1"], "two requests at different times"),
    ],
)
def test_timestamps_that_say_nothing_are_refused(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        trace_arrivals(trace_of(tmp_path, rows), 100, 9, 1.0)


def test_a_trace_without_timestamps_can_only_be_sent_at_once(tmp_path):
    path = trace_of(tmp_path, ["1,1", "2,2"], head="ContextTokens,GeneratedTokens")
    assert trace_lengths(path, 100, 9) == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="TIMESTAMP"):
        trace_arrivals(path, 100, 9, 1.0)
