"""Power meter on a fake NVML: watts between updates of the counter, the mean of the clocks."""

from __future__ import annotations

import math
import sys
import time
from types import SimpleNamespace

import pytest

from nanoflow_tune.profiler import power


class FakeNvml:
    """A counter that advances every 20 ms at 500 W; clocks of 1200 and 1800 MHz in turn.

    Each reading of the counter takes 2 ms of its own time.
    """

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.now_s, self.readings, self.has_counter = 0.0, 0, True

    def nvmlInit(self):  # noqa: N802 - NVML's name
        pass

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if not self.has_counter:
            raise self.NVMLError("not supported")
        self.now_s += 0.002
        return 500 * 20 * math.floor(self.now_s / 0.02)

    def nvmlDeviceGetClockInfo(self, handle, which):  # noqa: N802
        self.readings += 1
        return 1200 if self.readings % 2 else 1800


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(power, "visible_gpus", lambda nvml: [SimpleNamespace()])
    monkeypatch.setattr(power, "time", SimpleNamespace(perf_counter=lambda: fake.now_s))
    return fake


def test_watts_are_the_slope_between_updates_and_the_clock_is_a_mean(nvml):
    meter = power.PowerMeter(0)
    with meter:
        while nvml.readings < 4:
            time.sleep(0.001)
        taken_s = nvml.now_s
    assert meter.watts == pytest.approx(500.0, rel=0.05)
    assert meter.joules == pytest.approx(meter.watts * taken_s, rel=0.2)
    assert 1200 < meter.mean_sm_clock_mhz < 1800


def test_without_a_counter_watts_are_not_a_number_and_the_clock_is_read_once(nvml):
    nvml.has_counter = False
    meter = power.PowerMeter(0)
    with meter:
        pass
    assert math.isnan(meter.watts)
    assert meter.mean_sm_clock_mhz == 1200


def test_fewer_than_two_updates_give_no_watts():
    assert math.isnan(power.slope([(1.0, 5.0)]))
    assert power.slope([(1.0, 5.0), (1.5, 6.0), (2.0, 9.0)]) == pytest.approx(4.0)
