from __future__ import annotations

import json

import pytest

from nanoflow_tune.autotune.trace import sm_usage, trace_json, track
from nanoflow_tune.runtime.op_graph import OpGraph

from . import report_fakes as fakes


@pytest.fixture
def graph():
    return OpGraph.build(fakes.model("llama2-70b"), 2)


@pytest.fixture
def played(graph):
    schedule = fakes.overlapped(graph)
    events = fakes.events(schedule, graph)
    return track(schedule, graph, events, title="overlapped", source="predicted", period_us=1e5)


def test_bars_know_their_op_lane_and_nano_batch(played):
    second = [bar for bar in played.bars if bar.name == "kqv.1"]
    assert {bar.nano_batch for bar in second} == {1}
    assert {bar.lane for bar in second} == {"compute"}
    assert {bar.layer for bar in second} == set(range(6))


def test_window_is_clipped_and_starts_at_zero(played):
    window = played.window(2, 2)
    assert min(bar.start_us for bar in window.bars) == 0
    assert all(bar.duration_us > 0 for bar in window.bars)
    assert {bar.layer for bar in window.bars} == {2, 3}
    assert played.window(5, 2).bars  # the last layer has no next one


def test_trace_has_a_process_for_each_track_and_a_thread_for_each_lane(played):
    events = json.loads(trace_json([played, played]))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["memory", "compute", "network"] * 2
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == 2 * len(played.bars)
    assert {"layer", "tokens", "num_sms", "variant", "slowdown"} == set(complete[0]["args"])
    assert {event["pid"] for event in complete} == {1, 2}


def test_sms_in_use_return_to_zero(played):
    steps = sm_usage(played.bars, lambda bar: bar.lane, played.lanes)
    assert set(steps[-1][1].values()) == {0}
    assert [time_us for time_us, _ in steps] == sorted(time_us for time_us, _ in steps)
