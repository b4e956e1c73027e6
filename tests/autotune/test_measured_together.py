"""Schedules that find no memory are lost alone, in the race and in the hardware loop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nanoflow_tune.autotune.hardware_loop import refine_on_hardware
from nanoflow_tune.autotune.measured_together import measure_race, measure_what_fits
from nanoflow_tune.runtime.gpu_failures import OutOfMemoryError
from nanoflow_tune.runtime.plan import Schedule, Timing

from .test_hardware_loop import TRUE, Hardware, family, first_trial, raced


class SmallGpu(Hardware):
    """Some schedules find no memory, and neither do those measured in the same run."""

    def __init__(self, too_large) -> None:
        super().__init__(TRUE)
        self.too_large = too_large

    def __call__(self, schedules: Sequence[Schedule]) -> list[Timing]:
        for schedule in schedules:
            if self.too_large(schedule):
                raise OutOfMemoryError(f"GPU 0 has no memory for {schedule.name!r}; end others")
        return super().__call__(schedules)


@pytest.fixture(scope="module")
def known():
    return raced(Hardware(TRUE))


def test_the_race_goes_on_without_those_that_do_not_fit(known):
    schedules = [candidate.schedule for candidate in known]
    lost = schedules[1]
    gpu, said = SmallGpu(lambda schedule: schedule is lost), []
    timings = measure_race(gpu, schedules, said.append)
    assert [timing is None for timing in timings] == [s is lost for s in schedules]
    assert len(said) == 1
    assert "GPU 0 has no memory" in said[0]
    expected = [gpu.us(s) for s in schedules if s is not lost]
    assert [t.period_us for t in timings if t] == pytest.approx(expected)


def test_where_not_even_the_base_fits_nothing_is_measured(known):
    schedules = [candidate.schedule for candidate in known]
    with pytest.raises(OutOfMemoryError, match="end others"):
        measure_race(SmallGpu(lambda _: True), schedules, print)
    with pytest.raises(OutOfMemoryError):
        measure_race(SmallGpu(lambda _: True), schedules[:1], print)
    assert measure_what_fits(Hardware(TRUE), schedules, [], print) == []


def test_a_trial_without_memory_is_lost_and_the_search_goes_on(known):
    fits = {(c.schedule.nano_batches, c.schedule.nano_ops) for c in known}
    met: list[object] = []

    def too_large(schedule: Schedule) -> bool:
        """The first trial that is new."""
        key = schedule.nano_batches, schedule.nano_ops
        if key not in fits:
            met.append(key)
        return bool(met) and key == met[0]

    gpu, said = SmallGpu(too_large), []
    found = refine_on_hardware(
        family(),
        trials=6,
        seed=0,
        measure=gpu,
        enqueue=first_trial(),
        known=known,
        tell=said.append,
    )
    assert found
    assert not any(too_large(candidate.schedule) for candidate in found)
    lost = [text for text in said if "is left out" in text]
    assert len(lost) == 1
