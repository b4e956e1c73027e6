"""The whole job with a stand-in for the GPU: measurements reach trace, figures and report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nanoflow_tune.autotune import cli, job, tune
from nanoflow_tune.autotune.gpu_stage import Devices
from nanoflow_tune.autotune.report_sections import error_by_op
from nanoflow_tune.profiler.rank_jobs import OpTime
from nanoflow_tune.runtime.plan import Timing
from nanoflow_tune.search_spaces.loader import load_space

from .fakes import graph_of, linear_profile
from .report_fakes import events

H200 = Devices(name="NVIDIA H200", count=1, memory_bytes=150_754_820_096)


class FakeStage:
    """Every nano-op takes 10 % longer than `report_fakes.events` says."""

    def __init__(self, graph):
        self.graph, self.num_measured = graph, 0

    def profile(self, path, *, take_shipped=True):
        return linear_profile(self.graph)

    def measure(self, schedules, *, rounds=2, turn_s=0.6):
        self.num_measured += len(schedules)
        return [
            Timing(
                period_us=1000.0 + 10 * len(schedule.nano_ops),
                source="measured",
                p10_us=990.0,
                p90_us=1200.0,
                joules=0.5,
                watts=600.0,
                sm_clock_mhz=1600.0,
            )
            for schedule in schedules
        ]

    def timelines(self, schedules):
        return [
            [
                OpTime(
                    index=event.index,
                    layer=event.layer,
                    start_us=1.1 * event.start_us,
                    end_us=1.1 * event.end_us,
                )
                for event in events(schedule, self.graph, self.graph.num_layers)
            ]
            for schedule in schedules
        ]

    def verify(self, plan, model, seed):
        return plan

    def close(self):
        pass


@pytest.fixture
def stage(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = FakeStage(graph_of("llama3-8b"))
    monkeypatch.setattr(job, "find_devices", lambda: H200)
    monkeypatch.setattr(job, "find_stage", lambda *_, **__: found)
    small = replace(
        load_space("quick"),
        dense_batch_tokens=(512,),
        max_nano_batches=2,
        milp_time_limit_s=1.0,
        simulator_trials=4,
        hardware_trials=2,
    )
    monkeypatch.setattr(job, "load_space", lambda _: small)
    return found


def test_what_was_measured_is_shown_beside_what_was_planned(stage, tmp_path, capsys):
    command = ["--model", "llama3-8b", "--buckets", "main", "--output-dir", "here"]
    assert cli.main(command) == cli.DONE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["source"] == "measured"
    trace = json.loads((tmp_path / "here" / "trace.json").read_text())
    tracks = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    named = [name for name in tracks if name.startswith("sequential")]
    assert [name.rpartition(", ")[2] for name in named] == ["predicted", "measured"]
    assert "slowdown" not in trace["traceEvents"][-2]["args"] or len(tracks) > 4
    values = json.loads((tmp_path / "here" / "report.json").read_text())
    for rows in values["ops"].values():
        assert all(row["measured_us"] > 0 for row in rows if row["beside_us"] > 0)
    page = (tmp_path / "here" / "report.html").read_text()
    for heading in ("Prediction error by op", "Audit: partitions", "Search history", "measured us"):
        assert heading in page
    numbers = [number for number, _, _ in values["history"]]
    assert numbers == sorted(numbers)
    assert stage.num_measured > 2


def test_a_killed_measuring_job_does_not_measure_again_what_it_has(stage, monkeypatch, capsys):
    command = ["--model", "llama3-8b", "--buckets", "main", "--output-dir", "here"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tune, "_settled", stop)
        assert cli.main(command) == cli.INTERRUPTED
    measured = stage.num_measured
    assert measured > 2
    assert cli.main([*command, "--resume"]) == cli.DONE
    assert "measured schedules of an interrupted run are taken over" in capsys.readouterr().err
    assert stage.num_measured <= measured + 3  # the finalists, once more


def test_errors_are_of_all_nano_ops_of_an_op_and_only_of_measured_ones():
    rows = [
        {"op": "kqv", "beside_us": 10.0, "measured_us": 12.0},
        {"op": "kqv", "beside_us": 11.0, "measured_us": 12.0},
        {"op": "down", "beside_us": 5.0, "measured_us": 0.0},
        {"op": "norm", "beside_us": 1.0},
    ]
    assert error_by_op(rows)[0] == ("kqv", 21.0, 24.0)
    assert error_by_op(rows)[1][1:] == (21.0, 24.0)
    assert error_by_op(rows[2:]) == []
