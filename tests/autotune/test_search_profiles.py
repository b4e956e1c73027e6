"""Thin, odd and contradictory profiles; a search without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from nanoflow_tune.autotune.cli import BAD_INPUT, main
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.profile_faults import ContradictoryProfileError, profile_warnings
from nanoflow_tune.autotune.search import search
from nanoflow_tune.profiler.profile import Profile
from nanoflow_tune.profiler.store import shipped_profile

from .fakes import MIX, graph_of, h200, linear_profile, quick_space

GRAPH = graph_of("llama3-8b")
PROFILE = linear_profile(GRAPH)
SPACE = quick_space(milp_time_limit_s=1.0, simulator_trials=4)


def without(profile: Profile, *kinds: str) -> Profile:
    return replace(profile, rows=tuple(r for r in profile.rows if r.point.kind not in kinds))


def slower(profile: Profile, factor: float, num_sms: int) -> Profile:
    """One kernel's row on this share made slower."""
    rows = list(profile.rows)
    place = next(
        i for i, r in enumerate(rows) if r.point.kind == "gemm" and r.point.num_sms == num_sms
    )
    rows[place] = replace(rows[place], median_us=factor * rows[place].median_us)
    return replace(profile, rows=tuple(rows))


def test_a_whole_profile_gives_no_warning():
    assert profile_warnings(PROFILE, GRAPH) == []


@pytest.mark.parametrize(("model", "tp_degree"), [("llama3-8b", 1), ("llama2-70b", 2)])
def test_the_shipped_profiles_are_accepted(model: str, tp_degree: int):
    profile = shipped_profile("h200")
    assert profile is not None
    warnings = profile_warnings(profile, graph_of(model, tp_degree))
    assert not any("no rows" in text for text in warnings if "up_gate" not in text)


def test_missing_ops_are_named():
    (warning,) = profile_warnings(without(PROFILE, "norm", "rope_append"), GRAPH)
    assert "attn_norm, rope_append, ffn_norm" in warning
    assert "datasheet" in warning


def test_a_profile_without_gemms_is_refused():
    with pytest.raises(ContradictoryProfileError, match="rows of GEMMs"):
        profile_warnings(without(PROFILE, "gemm", "gemm_silu"), GRAPH)


def test_one_sm_share_is_said():
    thin = replace(PROFILE, rows=tuple(r for r in PROFILE.rows if r.point.num_sms == 132))
    warnings = profile_warnings(thin, GRAPH)
    assert any("gemm on 132 SMs only" in text for text in warnings)
    assert any("decode_attention on 132 SMs only" in text for text in warnings)


def test_rows_that_contradict_each_other_are_refused_by_name():
    row = next(r for r in PROFILE.rows if r.point.kind == "gemm")
    double = replace(PROFILE, rows=(*PROFILE.rows, replace(row, median_us=3.5 * row.median_us)))
    with pytest.raises(ContradictoryProfileError, match=f"{row.point.variant} .* delete the wrong"):
        profile_warnings(double, GRAPH)
    with pytest.raises(ContradictoryProfileError):
        search(GRAPH, CostModel(double, h200()), h200(), SPACE, MIX, seed=0)
    close = replace(PROFILE, rows=(*PROFILE.rows, replace(row, median_us=2.5 * row.median_us)))
    assert profile_warnings(close, GRAPH) == []


def test_a_kernel_that_slows_down_with_more_sms_is_named():
    (warning,) = profile_warnings(slower(PROFILE, 4.0, 132), GRAPH)
    assert "falls by more than 30%" in warning
    assert "on 132 SMs" in warning


def test_a_thin_profile_is_searched_and_its_warnings_are_stages():
    thin = without(PROFILE, "rope_append")
    found = search(GRAPH, CostModel(thin, h200()), h200(), SPACE, MIX, seed=0, most_batches=1)
    assert any("no rows for rope_append" in text for text in found.stages)


def test_a_saved_profile_is_searched_without_torch(tmp_path: object):
    """The whole command line with a short search, in a process where importing torch fails."""
    call = f"""
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
from dataclasses import replace
from nanoflow_tune.autotune import job
from nanoflow_tune.autotune.cli import main
space = replace(job.load_space("quick"), milp_time_limit_s=2.0, simulator_trials=4)
job.load_space = lambda name: space
from nanoflow_tune.profiler.store import shipped_profile
import nanoflow_tune.results, pathlib
folder = pathlib.Path(nanoflow_tune.results.__file__).parent / "profiles" / "h200"
code = main(["search", "--model", "llama3-8b", "--profile", str(folder / "llama3-8b-tp1.csv"),
             "--buckets", "512", "--output-dir", {str(tmp_path)!r} + "/out"])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def saved_again(path: Path, column: str, value: Callable[[str], str]) -> None:
    """The shipped profile, with its first GEMM's row once more, changed in one column."""
    shipped = Path(str(files("nanoflow_tune.results") / "profiles" / "h200" / "llama3-8b-tp1.csv"))
    text = shipped.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    row = dict(
        zip(
            lines[0].split(","),
            next(x for x in lines if x.startswith("gemm,")).split(","),
            strict=True,
        )
    )
    path.write_text(text + ",".join({**row, column: value(row[column])}.values()) + "\n")


def test_a_file_whose_rows_contradict_each_other_is_refused_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Not the later row taken, as between files."""
    monkeypatch.chdir(tmp_path)
    job = ["search", "--model", "llama3-8b", "--profile", "made.csv", "--output-dir", "out"]
    saved_again(Path("made.csv"), "median_us", lambda us: str(3.5 * float(us)))
    assert main(job) == BAD_INPUT
    assert "made.csv: rows of one point must agree within 3 times" in capsys.readouterr().err
    saved_again(Path("made.csv"), "num_sms", lambda _: "200")
    assert main(job) == BAD_INPUT
    assert "made.csv has one on 200 SMs and h200 has 132" in capsys.readouterr().err
    assert not Path("out").exists()
