"""A plan is tuned with the kernels that an engine serves: none that plans on the host."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from nanoflow_tune.autotune import cli, job
from nanoflow_tune.autotune.cli_parser import build_parser
from nanoflow_tune.autotune.gpu_stage import NO_DEVICES
from nanoflow_tune.profiler.store import ProfileWriter
from nanoflow_tune.runtime.plan_io import load_plan
from nanoflow_tune.search_spaces.loader import load_space

from .fakes import graph_of, linear_profile

GUEST = "flashinfer_fa3"


@pytest.fixture
def guest_profile(tmp_path, monkeypatch):
    """In the working folder: FlashInfer's prefill takes half the time of Triton's."""
    monkeypatch.setattr(job, "find_devices", lambda: NO_DEVICES)
    monkeypatch.setattr(
        job,
        "load_space",
        lambda name: replace(
            load_space(name), dense_batch_tokens=(256,), milp_time_limit_s=2.0, simulator_trials=4
        ),
    )
    monkeypatch.chdir(tmp_path)
    rows = linear_profile(graph_of("llama3-8b")).rows
    guests = [
        replace(row, point=replace(row.point, variant=GUEST), median_us=0.5 * row.median_us)
        for row in rows
        if row.point.kind == "prefill_attention"
    ]
    assert guests
    path = tmp_path / "made.csv"
    with ProfileWriter.solo(path, {"hardware": "h200", "dtype": "bfloat16"}) as writer:
        for row in (*rows, *guests):
            writer.append_unsynced(row)
    return path


def variants_of(plan):
    return {
        nano_op.variant
        for bucket in plan.buckets
        for candidate in (bucket.winner, bucket.sequential, bucket.best_overlapped)
        for nano_op in candidate.schedule.nano_ops
    }


@pytest.mark.parametrize(("flags", "is_named"), [([], False), (["--host-planned"], True)])
def test_plans_name_them_where_it_is_asked_for_alone(guest_profile, flags, is_named, capsys):
    command = ["search", "--model", "llama3-8b", "--buckets", "main", "--output-dir", "out"]
    assert cli.main([*command, "--profile", "made.csv", *flags]) == cli.DONE
    capsys.readouterr()
    plan = load_plan(guest_profile.parent / "out" / "plan.yaml")
    assert (GUEST in variants_of(plan)) == is_named


def test_missing_libraries_are_left_out_even_where_host_planning_is_allowed(
    guest_profile, monkeypatch
):
    for allows, has_library in product((True, False), repeat=2):
        options = job.TuneOptions(model="llama3-8b", profile="made.csv", allows_host_planned=allows)
        on_gpu = replace(job.resolve(options, print), stage=SimpleNamespace())
        found = SimpleNamespace() if has_library else None
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda _, found=found: found)
            chosen = job.choose_profile(options, on_gpu)
        assert chosen.lacking == (() if allows and has_library else ("flashinfer",))
        assert ("all variants" in chosen.kernels) == (chosen.lacking == ())


def test_every_form_of_the_job_has_the_flag():
    for verb in ([], ["search"]):
        parsed = build_parser().parse_args([*verb, "--model", "llama3-8b", "--host-planned"])
        assert parsed.host_planned
