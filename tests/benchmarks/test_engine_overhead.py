"""The overhead of the engine: requests that hold a mix, the steps that are timed, the figure."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.page_pool import PagePool
from nanoflow_tune.runtime.scheduler import Scheduler
from nanoflow_tune.runtime.scheduler_records import SchedulerLimits
from nanoflow_tune.runtime.sequence import GenerationRequest, SamplingParams


@pytest.fixture
def overhead(load):
    return load("engine_overhead")


def test_the_requests_bring_the_wanted_mix_and_hold_it(overhead):
    rows, decodes, steps = 64, 32, 8
    bucket = SimpleNamespace(dense_batch_tokens=rows, decode_tokens=decodes)
    lengths = overhead.ramp_lengths(SimpleNamespace(buckets=(bucket,)), prompt=48, steps=steps)
    limits = SchedulerLimits(max_model_len=4096, max_running=64, max_waiting=10_000)
    scheduler = Scheduler(limits, PagePool(4000, 16))
    for index, (prompt, answer) in enumerate(lengths):
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
        tokens = tuple(range(prompt))
        request = GenerationRequest(
            request_id=str(index), prompt_token_ids=tokens, sampling=sampling
        )
        scheduler.add(request, lambda _: None)
    found = []
    while len(found) < 3 * steps + 12:
        step = scheduler.schedule(rows)
        scheduler.update(step, [1] * len(step.predicting), None)
        if found or len(step.decodes) >= decodes:
            assert step.num_rows == rows
            found.append(len(step.decodes))
    assert abs(np.array(found) - decodes).max() <= 5


def fake_runner():
    return SimpleNamespace(
        launch=lambda inputs: inputs,
        collect=lambda launched: launched,
        close=lambda: None,
    )


def test_the_profiler_runs_between_the_steps_that_are_timed(overhead):
    log, steps = [], 5
    profiler = SimpleNamespace(start=lambda: log.append("start"), stop=lambda: log.append("stop"))
    watched = overhead.Watched(fake_runner(), 8, steps, profiler)
    in_flight = None
    for number in itertools.count():
        decodes = np.zeros(min(number, 8), dtype=np.int32)
        step = SimpleNamespace(decode_slots_R=decodes, num_rows=16)
        launched = watched.launch(step)
        log.append(number)
        if in_flight is not None:
            watched.collect(in_flight)
        in_flight = launched
        if watched.done.is_set():
            break
    assert watched.is_complete
    start, stop = log.index("start"), log.index("stop")
    assert start == 8 + overhead.SETTLING + steps
    assert stop - start - 1 == steps + overhead.SKIPPED + 2
    assert len(watched.plain_step_s) == 2 * (steps - 1)
    assert len(watched.rows) == len(watched.ends_s)


def test_a_run_on_the_cpu_times_its_steps(overhead, capsys):
    overhead.main(["--tiny", "--steps", "3"])
    assert "without the profiler: " in capsys.readouterr().out


def test_what_was_recorded_is_told_beside_what_was_not(overhead, load):
    trace = load("kernel_trace")
    activities = []
    for at in range(0, 600, 100):
        activities += [
            trace.Activity(at + 1.0, at + 91.0, "kernel", "gemm", 7),
            trace.Activity(at + 95.0, at + 100.0, "copy", "Memcpy DtoH (Device -> Pinned)", 7),
        ]
    watched = SimpleNamespace(plain_step_s=[96e-6, 96e-6])
    said = overhead.describe(trace.times(activities), watched)
    assert "recorded: 0.100 ms (0.100 to 0.100, 3 steps), of which kernels 0.090 ms" in said
    assert "outside of kernels 10.000 %, of kernels and copies 5.000 %" in said
    assert "profiler 6.250 %" in said
    assert "10.00  gemm -> gemm [Memcpy DtoH (Device -> Pinned)]" in said
    assert "0.090     1.0  gemm" in said


def test_the_figure_is_of_all_recorded_steps(overhead):
    steps = tuple(SimpleNamespace(overhead_percent=percent) for percent in (1.5, 1.0))
    found = SimpleNamespace(overhead_percent=1.25, steps=steps)
    origin = {"command": "x", "commit": "c", "gpu": "g", "date": "d"}
    row = overhead.figure(found, "a case", origin)
    assert (row.value, row.unit, row.reach, row.spread) == (1.25, "%", "<= 2", "1.000-1.500")
    assert row.is_reached


def test_plans_for_more_than_one_gpu_are_refused(overhead, monkeypatch, capsys):
    graph_plan = overhead.tiny_plan(OpGraph.build(overhead.tiny_model()), 64)
    monkeypatch.setattr(
        overhead,
        "load_plan",
        lambda _: SimpleNamespace(model="tiny-llama", num_gpus=2, buckets=graph_plan.buckets),
    )
    with pytest.raises(SystemExit):
        overhead.main(["--plan", "x.yaml"])
    assert "one GPU" in capsys.readouterr().err
