"""Medians over the runs of a timeline; the events themselves need a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from nanoflow_tune.profiler.op_timeline import medians
from nanoflow_tune.runtime.schedule import Instance


def test_times_are_medians_over_runs_from_the_first_start():
    instances = [
        Instance(index=0, layer=0, waits_for=()),
        Instance(index=1, layer=0, waits_for=(0,)),
    ]
    runs = [
        [(0.0, 10.0), (12.0, 20.0)],
        [(5.0, 15.0), (17.0, 25.0)],  # late as a whole
        [(0.0, 40.0), (42.0, 51.0)],  # something else ran
    ]
    first, second = medians(instances, runs)
    assert (first.index, first.layer, first.start_us, first.end_us) == (0, 0, 0.0, 10.0)
    assert (second.start_us, second.end_us) == (12.0, 20.0)
