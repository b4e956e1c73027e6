"""A whole profile run on a fake GPU: files, shared shapes, resuming, co-runs."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from nanoflow_tune.profiler import profile_run, rank_jobs
from nanoflow_tune.profiler.profile import PairRow, TripleRow
from nanoflow_tune.profiler.rank_jobs import ProfileJob, ProfileRun
from nanoflow_tune.profiler.store import load_profile, read_pairs, read_rows, read_triples
from nanoflow_tune.runtime.launch import RankContext
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

from .curves import linear, row_of
from .test_grid import VARIANTS

H200 = load_hardware("h200")


class FakeSweep:
    """Measures by formula; counts what it was asked."""

    measured: list = []  # noqa: RUF012 - shared on purpose, cleared by the fixture
    lost_at = lost_in_compile = None

    def __init__(self, hardware, meter, kv_pool_bytes, groups):
        self.hardware = hardware
        self.timer = SimpleNamespace(heat=lambda ms: None)

    def compile(self, points):
        for point in points:
            if point.shape == self.lost_in_compile:
                type(self).lost_at = 1
                return point
        return None

    def compile_ahead(self, points):
        return len(points)

    def measure(self, point, with_joules):
        self.measured.append((point, with_joules))
        if self.lost_at is not None and len(self.measured) == self.lost_at:
            return replace(row_of(point, 0.0), error="illegal address")
        extra = {"joules": 1.0, "joules_source": "measured", "watts": 700.0} if with_joules else {}
        return row_of(point, linear(point), **extra)

    def measure_collective(self, point):
        self.measured.append((point, False))
        return row_of(point, 50.0)

    def measure_collective_joules(self, point, agree):
        self.measured.append((point, True))
        return row_of(point, 50.0, joules=0.02, joules_source="measured", watts=400.0)

    def measure_together(self, points, agree):
        names = "abc"[: len(points)]
        values = {f"slowdown_{name}": 1.1 for name in names} | dict(zip(names, points, strict=True))
        kind = PairRow if len(points) == 2 else TripleRow
        return kind(watts=700.0, sm_clock_mhz=1500.0, n=9, **values)

    def has_lost_context(self):
        return self.lost_at is not None

    def static_watts(self):
        return 117.0

    def sustained_gemm(self, points):
        return {"sustained_gemm": f"one of {len(points)}"}

    def header(self, commit, command, static_w, sustained):
        fixed = {"hardware": "h200", "dtype": "bfloat16", "static_w": str(static_w)}
        return {**fixed, "commit": commit, "command": command, **sustained}


@pytest.fixture
def measured(monkeypatch):
    from nanoflow_tune.runtime import kernels

    monkeypatch.setattr(profile_run, "Sweep", FakeSweep)
    monkeypatch.setattr(profile_run, "PowerMeter", lambda rank: None)
    monkeypatch.setattr(profile_run, "gpu_variants", lambda: VARIANTS)
    monkeypatch.setattr(rank_jobs, "gpu_variants", lambda: VARIANTS)
    monkeypatch.setattr(kernels, "load", lambda group: None)
    monkeypatch.setattr(profile_run.torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(profile_run.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(FakeSweep, "lost_at", None)
    FakeSweep.measured.clear()
    return FakeSweep.measured


CTX = RankContext(rank=0, world_size=1, device="cpu")


def order(folder, names=("llama3-8b", "llama2-70b"), **changes):
    jobs = tuple(
        ProfileJob(
            model=load_model(name),
            hardware=H200,
            tp_degree=1,
            path=folder / f"{name}-tp1.csv",
            known=(),
            commit="abc",
            command="profile",
        )
        for name in names
    )
    return ProfileRun(jobs=jobs, minutes=1000.0, **changes)


def test_each_shape_goes_to_the_file_of_the_first_model_that_has_it(measured, tmp_path):
    profile_run.run(CTX, order(tmp_path, ("llama3-8b", "llama3-70b", "llama3-8b")))
    points = [
        {row.point for row in read_rows(path)[1]} for path in sorted(tmp_path.glob("*tp1.csv"))
    ]
    assert len(points) == 2
    assert not points[0] & points[1]
    assert {p.shape for p in points[0] | points[1] if p.kind == "norm"} == {"d8192", "d4096"}
    header, rows = read_rows(tmp_path / "llama3-8b-tp1.csv")
    assert header["commit"] == "abc"
    assert header["sustained_gemm"] == "one of 2"
    assert len(rows) == len({row.point for row in rows})
    assert any(row.joules_source == "measured" for row in rows)


def test_a_run_of_experts_measures_every_op_of_their_layer(measured, tmp_path):
    profile_run.run(CTX, order(tmp_path, ("mixtral-8x7b",)))
    points = {row.point for row in read_rows(tmp_path / "mixtral-8x7b-tp1.csv")[1]}
    graph = OpGraph.build(load_model("mixtral-8x7b"))
    assert {(p.kind, p.shape) for p in points} >= {(op.kind, op.shape) for op in graph.layer}
    pairs = read_pairs(tmp_path / "mixtral-8x7b-tp1.pairs.csv")[1]
    assert {pair.a.kind for pair in pairs} >= {"grouped_gemm_silu", "gemm", "prefill_attention"}


def test_co_runs_and_triples_lie_beside_the_models_file_and_are_part_of_the_profile(
    measured, tmp_path
):
    profile_run.run(CTX, order(tmp_path))
    assert len(read_pairs(tmp_path / "llama2-70b-tp1.pairs.csv")[1]) >= 15
    assert len(read_triples(tmp_path / "llama3-8b-tp1.triples.csv")[1]) == 3
    profile = load_profile(sorted(tmp_path.glob("*tp1.csv")))
    assert len(profile.pairs) >= 30
    assert len(profile.triples) == 6


def test_a_second_run_measures_nothing_and_the_parts_can_be_chosen(measured, tmp_path):
    profile_run.run(CTX, order(tmp_path, parts=("compute",)))
    assert measured
    assert not any(with_joules for _, with_joules in measured)
    assert not list(tmp_path.glob("*.pairs.csv"))
    assert rank_jobs.num_missing(CTX, order(tmp_path)) == 0
    measured.clear()
    profile_run.run(CTX, order(tmp_path, parts=("compute",)))
    assert not measured
    profile_run.run(CTX, order(tmp_path, parts=("joules", "pairs")))
    assert all(with_joules for _, with_joules in measured)
    pairs = (tmp_path / "llama3-8b-tp1.pairs.csv").read_text()
    profile_run.run(CTX, order(tmp_path))
    assert (tmp_path / "llama3-8b-tp1.pairs.csv").read_text() == pairs


def test_joules_of_a_later_run_are_named_in_the_header_and_replace_nothing_else(measured, tmp_path):
    profile_run.run(CTX, order(tmp_path, ("llama3-8b",), parts=("compute",)))
    (path,) = tmp_path.glob("*tp1.csv")
    header, before = read_rows(path)
    assert "added" not in header
    later = order(tmp_path, ("llama3-8b",), parts=("joules",))
    later = replace(later, jobs=(replace(later.jobs[0], commit="def", command="more joules"),))
    measured.clear()
    profile_run.run(CTX, later)
    header, rows = read_rows(path)
    assert header["commit"] == "abc"
    assert header["added"].startswith(f"{len(measured)} rows")
    assert "commit def: more joules" in header["added"]
    assert {row.point for row in rows} == {row.point for row in before}
    joules = {row.point for row in rows if row.joules_source == "measured"}
    assert joules == {point for point, _ in measured}
    assert all(row in before for row in rows if row.point not in joules)


def test_collectives_have_joules_of_each_variant_once(measured, tmp_path, monkeypatch):
    import torch.distributed as dist

    from nanoflow_tune.profiler.grid import collective_joule_points
    from nanoflow_tune.runtime import device

    monkeypatch.setattr(device, "lane_groups", lambda ctx, schedules: {"network": None})
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, src: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    run = order(tmp_path, ("llama2-70b",), parts=("collectives", "joules"))
    run = replace(run, jobs=(replace(run.jobs[0], tp_degree=2),))
    profile_run.run(RankContext(rank=0, world_size=2, device="cpu"), run)
    graph = OpGraph.build(load_model("llama2-70b"), 2)
    expected = collective_joule_points(graph, H200.num_sms, VARIANTS)
    network = [point for point, is_with in measured if is_with and point.kind.startswith("all_")]
    assert network == expected
    assert len({(p.kind, p.variant) for p in expected}) == len(expected)
    assert {p.num_sms for p in expected} <= {0, H200.num_sms}
    measured.clear()
    profile_run.run(RankContext(rank=0, world_size=2, device="cpu"), run)
    assert not measured


def test_a_kernel_that_takes_the_context_is_a_row_and_ends_the_run(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeSweep, "lost_at", 5)
    with pytest.raises(RuntimeError, match="took the CUDA context with it"):
        profile_run.run(CTX, order(tmp_path))
    rows = [row for path in tmp_path.glob("*tp1.csv") for row in read_rows(path)[1]]
    assert [row.error for row in rows if row.error] == ["illegal address"]
    monkeypatch.setattr(FakeSweep, "lost_at", None)
    bad = measured[4][0]
    measured.clear()
    profile_run.run(CTX, order(tmp_path))
    assert bad not in [point for point, _ in measured]


def test_so_does_one_that_takes_it_while_compiling(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeSweep, "lost_in_compile", "n28672_k4096")
    with pytest.raises(RuntimeError, match="took the CUDA context with it"):
        profile_run.run(CTX, order(tmp_path))
    (row,) = read_rows(tmp_path / "llama3-8b-tp1.csv")[1]
    assert (row.point.shape, row.error) == ("n28672_k4096", "took the CUDA context with it")


def test_a_terminal_shows_stages_and_time_left_and_fewer_lines(measured, tmp_path, monkeypatch):
    monkeypatch.delenv("NANOFLOW_NO_BARS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(profile_run, "stderr_console", lambda: screen)
    profile_run.run(CTX, order(tmp_path, ("llama3-8b",)))
    text = screen.file.getvalue()
    assert "profile   curves" in text
    assert "profile   co-runs" in text
    assert "at most 1000:00 left" in text
    assert "every curve is known" in text
    assert "more points are worth it" not in text


def test_lines_where_there_is_no_terminal(measured, tmp_path, monkeypatch):
    lines = Console(file=io.StringIO(), force_terminal=False, width=120)
    monkeypatch.setattr(profile_run, "stderr_console", lambda: lines)
    profile_run.run(CTX, order(tmp_path, ("llama3-8b",)))
    text = lines.file.getvalue()
    assert "more points are worth it" in text
    assert "left" not in text


def test_a_run_needs_a_job_and_time(tmp_path):
    with pytest.raises(ValueError, match="more than 0 minutes"):
        replace(order(tmp_path), minutes=0.0)
