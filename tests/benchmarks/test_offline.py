"""The offline benchmark: its lengths, its books, its figures, and a run on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.sequence import EngineStats
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_workload

ORIGIN = {"command": "python x.py", "commit": "abc", "gpu": "a GPU", "date": "2026-01-01"}


@pytest.fixture
def offline(load):
    return load("offline")


def run_of(offline, name, elapsed_s, num_gpus=1, joules=math.nan):
    return offline.ServingRun(
        name=name,
        elapsed_s=elapsed_s,
        num_tokens=1000,
        num_gpus=num_gpus,
        joules=joules,
        watts=joules / elapsed_s,
        sm_clock_mhz=math.nan,
        stats=EngineStats(),
    )


def test_a_trace_gives_the_lengths_that_fit(offline, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,10,5\nx,90,20\nx,3,0\nx,7,8\n")
    assert offline.trace_lengths(trace, 100, 9) == [(10, 5), (7, 8)]
    assert offline.trace_lengths(trace, 100, 1) == [(10, 5)]
    trace.write_text("TIMESTAMP,ContextTokens\nx,10\n")
    with pytest.raises(ValueError, match="GeneratedTokens"):
        offline.trace_lengths(trace, 100, 9)


def test_workloads_have_their_moments(offline):
    assert set(offline.workload_lengths(load_workload("512/512"), 20, 4096, 0)) == {(512, 512)}
    lengths = offline.workload_lengths(load_workload("lmsys"), 20_000, 100_000, 0)
    assert sum(p for p, _ in lengths) / 20_000 == pytest.approx(102, rel=0.05)
    assert sum(d for _, d in lengths) / 20_000 == pytest.approx(222, rel=0.05)


def test_the_books_of_the_ablation_are_what_they_are_called(offline):
    graph = OpGraph.build(offline.tiny_model())
    plan = offline.tiny_plan(graph, 64)
    names = {}
    for name in offline.BOOKS:
        book = offline.contender(name, graph, plan, load_hardware("h200")).book
        names[name] = book.choose(32, 32, 32.0).choice.schedule
    assert names["sequential"].name == "sequential"
    assert names["overlapped"].name == names["winner"].name == "overlapped"
    split = names["nano_only"]
    assert split.nano_batches == names["overlapped"].nano_batches
    assert split.lanes == ("compute",)
    assert {nano_op.num_sms for nano_op in split.nano_ops} == {132}


def test_schedules_that_lose_run_in_their_own_books_alone(offline):
    graph = OpGraph.build(offline.tiny_model())
    plan = offline.tiny_plan(graph, 64)

    def losing(bucket):
        slow = replace(bucket.best_overlapped.predicted, period_us=1500.0)
        slower = replace(bucket.best_overlapped, predicted=slow)
        return replace(bucket, winner=slower, best_overlapped=slower)

    plan = replace(plan, buckets=tuple(losing(bucket) for bucket in plan.buckets))
    ran = {
        name: offline.contender(name, graph, plan, load_hardware("h200"))
        .book.choose(30, 34, 40.0)
        .choice.schedule.name
        for name in ("nano_only", "overlapped", "winner")
    }
    assert ran == {"nano_only": "nano_only", "overlapped": "overlapped", "winner": "sequential"}


def test_percent_of_optimal_is_two_flops_for_each_parameter_and_token(offline):
    run = run_of(offline, "winner", 2.0, num_gpus=2)
    assert offline.percent_of_optimal(run, 10**9, 1e12) == pytest.approx(50.0)


def test_figures_are_written_for_the_models_of_the_table(offline):
    case = SimpleNamespace(model=load_model("llama3-8b"), tp_degree=1, lengths=((512, 512),) * 4)
    runs = [
        run_of(offline, name, seconds)
        for name, seconds in (
            ("sequential", 2.0),
            ("winner", 1.6),
            ("sequential", 2.0),
            ("winner", 2.5),
        )
    ]
    rows = {(r.id, r.case): r for r in offline.figure_rows(runs, case, "512/512", 7e14, ORIGIN)}
    e2e = rows["e2e_8b", "512/512, 4 requests, winner"]
    assert (e2e.value, e2e.spread, e2e.reach) == (pytest.approx(1.025), "0.800-1.250", ">= 0.99")
    assert rows["tok_8b", "512/512, 4 requests, winner"].reach == ">= 28000"
    assert rows["tok_8b", "512/512, 4 requests, sequential"].reach == ""
    assert rows["opt_8b", "512/512, 4 requests, winner"].reach == ""  # asked of 1024/512
    other = SimpleNamespace(model=load_model("tiny-llama"), tp_degree=1, lengths=case.lengths)
    assert offline.figure_rows(runs, other, "512/512", 7e14, ORIGIN) == []


def test_a_run_on_the_cpu_serves_every_book(offline, capsys):
    command = "--tiny --workload 40/12 --requests 12 --books sequential,winner"
    offline.main(command.split())
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["book"] for row in table] == ["sequential", "winner"]
    assert all(row["tokens_per_s_per_gpu"] > 0 and row["watts"] is None for row in table)


def test_several_workloads_are_served_one_after_the_other(offline, capsys):
    command = "--tiny --workload 40/12,8/20 --requests 12,9 --books winner --rounds 2"
    offline.main(command.split())
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["workload"] for row in table] == ["40/12"] * 2 + ["8/20"] * 2
    with pytest.raises(SystemExit):
        offline.main(["--tiny", "--workload", "40/12,8/20", "--requests", "1,2,3"])
    assert "one for each workload" in capsys.readouterr().err


def test_steps_without_graphs_are_said_with_their_reason_once_for_each_book(offline):
    stats = EngineStats(
        steps_total=9, eager_steps_total=7, eager_why="bucket 0: flashinfer plans on the host"
    )
    quiet = run_of(offline, "sequential", 1.0)
    loud = replace(run_of(offline, "winner", 1.0), stats=stats)
    (warning,) = offline.eager_warnings([quiet, loud, quiet, loud])
    assert "winner ran 7 of 9 steps without CUDA graphs" in warning
    assert stats.eager_why in warning
    replaced = replace(stats, replaced_kernels=("a -> b: why", "c -> d: why"))
    row = offline.table_row(replace(loud, stats=replaced), {}, 1)
    assert row["eager_why"] == stats.eager_why
    assert row["replaced_kernels"] == "a -> b: why; c -> d: why"
