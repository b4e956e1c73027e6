from __future__ import annotations

import json

import pytest

from nanoflow_tune.autotune import cli, job
from nanoflow_tune.autotune.cli_parser import build_parser
from nanoflow_tune.autotune.gpu_stage import NO_DEVICES, Devices
from nanoflow_tune.search_spaces.loader import known


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(job, "find_devices", lambda: NO_DEVICES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(no_gpu, capsys):
    assert cli.main(["--model", "llama2-70b", "--dry-run"]) == cli.DONE
    out = capsys.readouterr().out
    values = json.loads(out.splitlines()[-1])
    assert values["num_gpus"] == 2
    assert values["will_be"] == "predicted"
    assert "shipped h200 profile" in values["profile"]
    book = "plan book of other batches"
    assert values["steps"] == ["search", book, "verify on 2 CPU rank(s)", "figures and report"]
    assert values["output_dir"].endswith("llama2-70b-h200-512-512-tp2")
    assert "output dir" in out
    assert list(no_gpu.iterdir()) == []


def test_a_dry_run_on_a_gpu_touches_no_gpu_and_names_where_rows_go(no_gpu, monkeypatch, capsys):
    devices = Devices(name="NVIDIA H200", count=1, memory_bytes=150_754_820_096)
    monkeypatch.setattr(job, "find_devices", lambda: devices)
    only_main = ["search", "--model", "llama3-8b", "--dry-run", "--json", "--buckets", "main"]
    assert cli.main(only_main) == cli.DONE
    values = json.loads(capsys.readouterr().out)
    assert values["will_be"] == "measured"
    assert values["steps"] == ["profile what is missing", "search", "measure the finalists"]
    assert "llama3-8b-tp1.csv" in values["profile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "llama3-8b", "--gpu", "b200"], "none is shipped"),
        (["--model", "llama3-8b", "--profile", "nowhere.csv"], "does not exist"),
    ],
)
def test_a_dry_run_refuses_what_the_job_would(arguments, message, no_gpu, capsys):
    assert cli.main([*arguments, "--dry-run"]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "kind"),
    [("--list-models", "models"), ("--list-gpus", "hardware"), ("--list-workloads", "workloads")],
)
def test_lists_are_for_the_shell_one_name_a_line(flag, kind, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([flag])
    assert ended.value.code == 0
    assert tuple(capsys.readouterr().out.split()) == known(kind)


@pytest.mark.parametrize("verb", [[], ["search"], ["report"], ["export"], ["check-env"]])
def test_help_of_these_verbs_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*verb, "--help"])
    assert ended.value.code == 0
    assert "examples:\n  nanoflow-tune" in capsys.readouterr().out
