"""What an interrupted run leaves: measurements are answered from the file, in any state of it."""

from __future__ import annotations

import pytest

from nanoflow_tune.autotune.resume import MEASURED, KeptRun, check_resumable, kept_run
from nanoflow_tune.runtime.plan import Timing

from .fakes import graph_of
from .report_fakes import overlapped, sequential


class Gpu:
    """Counts what it is asked to measure."""

    def __init__(self):
        self.asked = []

    def __call__(self, schedules):
        self.asked.append(len(schedules))
        return [
            Timing(period_us=100.0 + place, source="measured") for place in range(len(schedules))
        ]


@pytest.fixture
def schedules():
    graph = graph_of("tiny-llama", 1)
    return [sequential(graph), overlapped(graph), sequential(graph, 1024)]


def test_a_run_that_was_killed_measures_only_what_is_missing(tmp_path, schedules):
    gpu = Gpu()
    first = KeptRun(tmp_path, "key").measuring(gpu)
    timings = first(schedules[:2])
    again = KeptRun(tmp_path, "key")
    assert again.num_measured == 2
    measure = again.measuring(gpu)
    assert list(measure(schedules[:2])) == list(timings)
    measure(schedules[2:])
    assert gpu.asked == [2, 1]
    assert KeptRun(tmp_path, "key").num_measured == 3


def test_other_inputs_are_measured_anew(tmp_path, schedules):
    gpu = Gpu()
    KeptRun(tmp_path, "key").measuring(gpu)(schedules)
    other = KeptRun(tmp_path, "other")
    assert other.num_measured == 0
    other.measuring(gpu)(schedules)
    assert gpu.asked == [3, 3]
    assert KeptRun(tmp_path, "key").num_measured == 0


def test_a_file_cut_off_at_any_byte_is_gone_on_with(tmp_path, schedules):
    gpu = Gpu()
    kept = KeptRun(tmp_path, "key").measuring(gpu)
    kept(schedules[:1])
    kept(schedules[1:])
    path = tmp_path / MEASURED
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        measure = KeptRun(tmp_path, "key").measuring(gpu)
        measure(schedules[:1])
        measure(schedules[1:])
        assert KeptRun(tmp_path, "key").num_measured == 3


def test_measurements_survive_a_failure_and_go_with_success(tmp_path, schedules):
    def fails():
        with kept_run(tmp_path, "key") as kept:
            kept.measuring(Gpu())(schedules)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert KeptRun(tmp_path, "key").num_measured == 3
    check_resumable(tmp_path, points=0, kept=KeptRun(tmp_path, "key"))
    with kept_run(tmp_path, "key"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="holds no unfinished run"):
        check_resumable(tmp_path, points=0, kept=KeptRun(tmp_path, "key"))
