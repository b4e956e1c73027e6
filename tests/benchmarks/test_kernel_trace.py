"""Traces: unions over streams, steps between copies of tokens, gaps and what is around them."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def trace(load):
    return load("kernel_trace")


def event(cat, name, ts, dur, stream=7):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


def step(at, gap=2.0):
    """100 us: upload, two kernels side by side, a gap, a kernel, the copy of the tokens."""
    return [
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", at, 3.0),
        event("kernel", "gemm", at + 4, 50.0, 7),
        event("kernel", "attention", at + 10, 60.0, 13),
        event("kernel", "down", at + 70 + gap, 26.0 - gap, 7),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", at + 97, 3.0),
    ]


def write(tmp_path, events):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_time_outside_of_kernels_is_of_the_union_over_streams(trace, tmp_path):
    events = [e for i in range(6) for e in step(1000 + 100 * i)]
    events += [{"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9}]
    events += [{"ph": "M", "name": "process_name"}]
    found = trace.times(trace.read_trace(write(tmp_path, events)))
    assert len(found.steps) == 3
    for one in found.steps:
        assert one.wall_us == pytest.approx(100.0)
        assert one.kernel_us == pytest.approx(66.0 + 24.0)
        assert one.busy_us == pytest.approx(90.0 + 6.0)
        assert one.overhead_percent == pytest.approx(10.0)
    assert found.overhead_percent == pytest.approx(10.0)
    assert found.idle_percent == pytest.approx(4.0)
    kernels = [(kernel.name, kernel.count, kernel.total_us) for kernel in found.kernels]
    assert kernels == [("attention", 3, 180.0), ("gemm", 3, 150.0), ("down", 3, 72.0)]


def test_gaps_are_named_by_the_kernels_around_them(trace, tmp_path):
    events = [e for i in range(5) for e in step(100 * i, gap=11.0 if i == 3 else 2.0)]
    gaps = trace.times(trace.read_trace(write(tmp_path, events))).gaps
    longest, between = gaps[:2]
    assert (longest.before, longest.after) == ("attention", "down")
    assert longest.length_us == pytest.approx(11.0)
    assert longest.copies == ()
    assert (between.before, between.after) == ("down", "gemm")
    assert between.length_us == pytest.approx(8.0)
    assert between.copies == ("Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)")


def test_a_kernel_that_goes_on_into_the_next_step_counts_in_both(trace, tmp_path):
    events = [e for i in range(5) for e in step(100 * i)]
    events.append(event("kernel", "long", 350.0, 100.0, 20))
    steps = trace.times(trace.read_trace(write(tmp_path, events))).steps
    assert steps[0].kernel_us == pytest.approx(46.0 + 50.0)  # [304, 350) and the long one
    assert steps[1].kernel_us == pytest.approx(50.0 + 20.0 + 24.0)


def test_traces_without_steps_or_kernels_are_refused(trace, tmp_path):
    with pytest.raises(ValueError, match="record more steps"):
        trace.times(trace.read_trace(write(tmp_path, step(0) + step(100) + step(200))))
    with pytest.raises(ValueError, match="no kernel"):
        trace.read_trace(write(tmp_path, [{"ph": "M", "name": "x"}]))
    (tmp_path / "trace.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="no Chrome trace"):
        trace.read_trace(tmp_path / "trace.json")
