from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest

from nanoflow_tune.autotune import (
    book_store,
    cli,
    job,
    output_folder,
    paper_mode,
    resume,
    tune,
    verification,
)
from nanoflow_tune.autotune.document import REQUIRED_KEYS
from nanoflow_tune.autotune.gpu_stage import NO_DEVICES
from nanoflow_tune.profiler.store import ProfileWriter
from nanoflow_tune.runtime.plan_io import load_plan
from nanoflow_tune.runtime.verify import VerificationError
from nanoflow_tune.search_spaces.loader import load_space

from .fakes import graph_of, linear_profile, reduce_profile

TINY = ["--model", "tiny-llama", "--profile", "roofline", "--buckets", "main"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    for module in (job, verification):
        monkeypatch.setattr(module, "find_devices", lambda: NO_DEVICES)


@pytest.fixture
def small_space(monkeypatch):
    def load(name):
        return replace(
            load_space(name),
            dense_batch_tokens=(256,),
            milp_time_limit_s=2.0,
            simulator_trials=4,
        )

    monkeypatch.setattr(job, "load_space", load)


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def test_main_job_writes_everything_and_ends_with_json(small_space, in_empty_folder, capsys):
    assert cli.main(TINY) == cli.DONE
    out, err = capsys.readouterr()
    values = last_json(out)
    assert tuple(values) == REQUIRED_KEYS
    assert values["source"] == "roofline"
    assert values["verified"] is True
    assert values["speedup"] >= 1.0
    folder = in_empty_folder / values["plan"].removesuffix("/plan.yaml")
    unmeasured = {"search.db", "roofline.png", "pairs.png"}  # not from the datasheet alone
    assert {path.name for path in folder.iterdir()} >= set(output_folder.FILES) - unmeasured
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert "profile" in err

    assert cli.main(["report", str(folder), "--json"]) == cli.DONE
    assert last_json(capsys.readouterr().out) == values

    assert cli.main(["verify", str(folder / "plan.yaml"), "--json"]) == cli.DONE
    assert last_json(capsys.readouterr().out)["verified"] is True


def test_the_job_writes_a_plan_book_and_says_from_where_overlap_pays(
    small_space, in_empty_folder, capsys
):
    job_of = ["search", *TINY, "--buckets", "512,128", "--output-dir", "here"]
    assert cli.main(job_of) == cli.DONE
    out = capsys.readouterr().out
    plan = load_plan(in_empty_folder / "here" / "plan.yaml")
    sizes = [bucket.dense_batch_tokens for bucket in plan.buckets]
    assert sizes[0] == 256  # the workload's own
    assert {128, 512} == set(sizes[1:])
    assert {"steady", "decode_only", "prefill_heavy"} == {bucket.mix for bucket in plan.buckets}
    even = plan.break_even[0]
    assert (even.mix, even.smallest_tokens, even.largest_tokens) == ("steady", 128, 512)
    values = last_json(out)
    assert values["break_even_tokens"] == even.tokens
    written = json.loads((in_empty_folder / "here" / "report.json").read_text())
    assert len(written["book"]["points"]) == len(plan.buckets)
    assert written["book"]["sentence"].split()[0] in out
    assert written["book"]["regret"]["worst_percent"] >= written["book"]["regret"]["median_percent"]
    assert "Plan book" in (in_empty_folder / "here" / "report.html").read_text()
    assert not [path for path in (in_empty_folder / "here").iterdir() if path.name[0] == "."]


def test_an_interrupted_job_keeps_the_points_of_its_book(
    small_space, in_empty_folder, monkeypatch, capsys
):
    job_of = [*TINY, "--buckets", "128,512", "--output-dir", "here"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tune, "verify", stop)
        assert cli.main(job_of) == cli.INTERRUPTED
    assert "what is finished of the search and of the plan book is kept" in capsys.readouterr().err
    left = {book_store.FILE, resume.SEARCH, resume.STUDY}
    assert {path.name for path in (in_empty_folder / "here").iterdir()} == left
    assert cli.main([*job_of, "--seed", "1", "--resume"]) == cli.BAD_INPUT
    assert "is of other inputs" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(tune, "search", None)  # it is not run again
        assert cli.main([*job_of, "--resume"]) == cli.DONE
    out, err = capsys.readouterr()
    assert "points are taken over from an interrupted run" in err
    assert "the finished search of an interrupted run is taken over" in err
    assert left.isdisjoint(path.name for path in (in_empty_folder / "here").iterdir())
    assert (in_empty_folder / "here" / "search.db").exists()
    assert cli.main([*job_of, "--resume"]) == cli.BAD_INPUT
    assert "holds no unfinished run" in capsys.readouterr().err
    assert last_json(out)["verified"] is True
    records = load_plan(in_empty_folder / "here" / "plan.yaml").buckets
    assert {bucket.mix for bucket in records[1:] if bucket.verification} == {
        "steady",
        "decode_only",
        "prefill_heavy",
    }


def test_a_plan_with_collectives_on_no_sms_is_written_read_and_verified_on_two_ranks(
    small_space, in_empty_folder, capsys
):
    graph = graph_of("tiny-llama", 2)
    made = reduce_profile(graph, nccl_us_per_row=0.9, copy_us_per_row=0.5)
    with ProfileWriter.solo(
        in_empty_folder / "made.csv", {"hardware": "h200", "dtype": "float32"}
    ) as writer:
        for row in made.rows:
            writer.append_unsynced(row)
    job_of = ["--model", "tiny-llama", "--num-gpus", "2", "--profile", "made.csv", "--json"]
    job_of += ["--buckets", "main"]
    assert cli.main([*job_of, "--output-dir", "here"]) == cli.DONE
    assert last_json(capsys.readouterr().out)["verified"] is True
    plan = load_plan(in_empty_folder / "here" / "plan.yaml")
    for candidate in (plan.buckets[0].sequential, plan.buckets[0].best_overlapped):
        free = [n for n in candidate.schedule.nano_ops if n.num_sms == 0]
        assert free
        assert {n.variant for n in free} == {"copy_engine"}
        assert all(n.op.endswith(("_all_reduce", "_all_gather")) for n in free)
    assert cli.main(["verify", "here/plan.yaml", "--json"]) == cli.DONE
    assert last_json(capsys.readouterr().out)["verified"] is True


def test_search_skips_verification_and_pictures(small_space, in_empty_folder, capsys):
    assert cli.main(["search", *TINY, "--json", "--output-dir", "here"]) == cli.DONE
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert last_json(out)["verified"] is None
    assert not (in_empty_folder / "here" / "timeline.png").exists()


def test_a_plan_for_experts_is_searched_and_verified(small_space, in_empty_folder, capsys):
    experts = ["--model", "mixtral-8x7b", "--profile", "roofline", "--buckets", "main"]
    assert cli.main(["search", *experts, "--json", "--output-dir", "here"]) == cli.DONE
    values = last_json(capsys.readouterr().out)
    assert (values["source"], values["verified"]) == ("roofline", None)
    # Of the FLOPs of the experts that a token goes to: no perfect machine needs more.
    assert 0 < values["percent_of_optimal"] < 100
    winner = load_plan(in_empty_folder / "here" / "plan.yaml").buckets[0].winner
    ops = {nano_op.op for nano_op in winner.schedule.nano_ops}
    assert {"router", "up_gate", "down", "combine"} <= ops
    assert cli.main(["verify", "here/plan.yaml"]) == cli.DONE
    assert last_json(capsys.readouterr().out)["verified"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama3-8b"], "did you mean 'llama3-8b'"),
        (["--model", "llama2-70b", "--num-gpus", "1"], "use --num-gpus 2"),
        (["--model", "llama3-8b", "--gpu", "a100-80"], "--profile roofline"),
        (["--model", "llama3-8b", "--profile", "nowhere.csv"], "'nowhere.csv' does not exist"),
        (["--model", "llama3-8b", "--workload", "often"], "often"),
        (["verify", "nowhere.yaml"], "nowhere.yaml"),
        (["report", "nowhere"], "report.json"),
        (["profile", "--model", "llama3-8b"], "needs 1 x NVIDIA H200"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, message, in_empty_folder, capsys):
    assert cli.main(arguments) == cli.BAD_INPUT
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "x", "--num-gpus", "0"],
        ["--no-such-flag"],
        ["--paper", "--gpu", "h200"],
        ["--paper", "models"],
        ["--model", "x", "--buckets", "100"],
        ["--model", "x", "--buckets", "many"],
        ["--model", "x", "--buckets", ""],
    ],
)
def test_usage_errors_exit_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == cli.BAD_INPUT


def test_paper_mode_sets_predictions_beside_the_papers_figures(
    in_empty_folder, monkeypatch, capsys
):
    def run(workload, *, seed, on_progress):
        assert (workload, seed) == ("512/512", 3)
        return paper_mode.PaperResult(
            workload="512-512",
            decode_tokens=1024,
            sequential_us=220_000.0,
            figure_6_us=205_000.0,
            search_us=210_000.0,
            search_plan="overlapped_milp",
            shares_us=200_000.0,
            measured=paper_mode.MEASURED[512.0, 512.0],
        )

    monkeypatch.setattr(paper_mode, "run_paper", run)
    assert cli.main(["--paper", "--seed", "3"]) == cli.DONE
    out = capsys.readouterr().out
    assert "our shares on figure 6, predicted" in out
    assert "1,280" in out  # 2048 rows / 200 ms / 8 GPUs
    assert "1,286" in out
    assert last_json(out)["found_over_figure_6"] == pytest.approx(200 / 205, abs=1e-4)
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (VerificationError("layer 1 differs"), cli.NOT_VERIFIED, "layer 1 differs"),
        (KeyError("oops"), cli.CRASH, "traceback is in"),
    ],
)
def test_a_job_that_fails_leaves_nothing_behind(
    error, code, message, small_space, in_empty_folder, monkeypatch, capsys
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tune, "verify", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(in_empty_folder))
    assert cli.main([*TINY, "--output-dir", "here"]) == code
    assert message in capsys.readouterr().err
    assert not (in_empty_folder / "here").exists()


def test_models_lists_specs_and_how_many_gpus_they_need(capsys):
    assert cli.main(["models"]) == cli.DONE
    out = capsys.readouterr().out
    assert "llama2-70b" in out
    assert "llama3-8b" in last_json(out)["models"]


def test_a_folder_of_another_job_is_not_overwritten(tmp_path):
    identity = {"model": "a", "hardware": "h200", "workload": "w", "num_gpus": 1}
    assert output_folder.claim(tmp_path / "new", identity, is_measured=False) == ""
    document = {**identity, "source": "measured"}
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert "replaces" in output_folder.claim(tmp_path, identity, is_measured=True)
    with pytest.raises(ValueError, match="not replaced by a predicted one"):
        output_folder.claim(tmp_path, identity, is_measured=False)
    with pytest.raises(ValueError, match="holds model 'a' and this job has 'b'"):
        output_folder.claim(tmp_path, {**identity, "model": "b"}, is_measured=True)


def test_the_command_line_imports_no_torch():
    modules = "cli, emit, job, report, html, figures, trace, capacity, verification, tune"
    code = (
        f"from nanoflow_tune.autotune import {modules}; import sys; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_profile_of_another_width_is_refused_or_left_out(small_space, in_empty_folder, capsys):
    made = linear_profile(graph_of("tiny-llama"))
    header = {"hardware": "h200", "dtype": "bfloat16"}
    with ProfileWriter.solo(in_empty_folder / "wide.csv", header) as writer:
        for row in made.rows:
            writer.append_unsynced(row)
    job_of = ["search", "--model", "tiny-llama", "--buckets", "main"]
    assert cli.main([*job_of, "--profile", "wide.csv"]) == 2
    assert "of bfloat16, but tiny-llama is float32" in capsys.readouterr().err
    assert cli.main([*job_of, "--json"]) == 0
    source = last_json(capsys.readouterr().out)["source"]
    assert source == "roofline", "rows of two bytes must not price a model of four"


def test_json_is_all_that_a_process_writes_to_standard_output(in_empty_folder):
    """A process, as libraries write to file descriptors too; its search is a short one."""
    call = """
import sys
from dataclasses import replace
from nanoflow_tune.autotune import cli, job
space = replace(job.load_space("quick"), milp_time_limit_s=2.0, simulator_trials=4)
job.load_space = lambda name: space
sys.exit(cli.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", call, "search", *TINY, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["model"] == "tiny-llama"
