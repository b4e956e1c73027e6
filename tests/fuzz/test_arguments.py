"""Command lines of known flags with unlikely values; jobs are only planned (`--dry-run`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import empty_folder, run
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import tries

from nanoflow_tune.autotune import cli

JOB_FLAGS = (
    *("--model", "--gpu", "--num-gpus", "--workload", "--profile", "--output-dir", "--effort"),
    *("--seed", "--buckets"),
)
VALUES = st.sampled_from(
    (
        *("", " ", "-", "--", "-1", "0", "1", "2", "3", "1e9", "9" * 5000, "nan", "inf", "0x10"),
        *("tiny-llama", "llama3-8b", "h200", "h100", "512/512", "0/0", "1e3/2", "9e999/1"),
        *("99999999999999999999999/1", "1/0", "auto", "shipped", "roofline", "quick", "full"),
        *("main", "512,1024", "512,,", "7", ",", "a,b", ".", "..", "/", "/dev/null", "/dev/zero"),
        *("/proc/self/mem", "~", "*", "$(id)", "`id`", ";", "a" * 300, "a/" * 200, "\u00e9 \u4e2d"),
        *("x.yaml", "x.json", "x.csv", "\ud800", "\udcff.yaml", "[/bold]", "%s", "{}", "\n"),
    )
)
FLAGS = st.lists(st.tuples(st.sampled_from(JOB_FLAGS), VALUES), max_size=4)
TOOLS = st.sampled_from(
    (
        *(("models", "--gpu"), ("verify",), ("report",), ("report", "x"), ("check-env",)),
        *(("export", "--to"), ("export", "--to", "vllm"), ("export", "--to", "sglang")),
        *(("export", "--to", "schema", "--output"), ("profile", "--model"), ("profile", "--tp")),
        *(("profile", "--models"), ("profile", "--minutes"), ("profile", "--parts"), ("paper",)),
        *(("verify", "x.yaml", "--seed"), ("nosuch",), ("--paper", "--seed", "-1", "--workload")),
    )
)


@tries(150, 6000)
@given(FLAGS, st.sampled_from(((), ("search",))))
@example([("--model", "tiny-llama"), ("--output-dir", "/proc/x")], ())
@example([("--model", "tiny-llama"), ("--output-dir", "a" * 300)], ())
def test_flags_of_a_job(flags, verb):
    with empty_folder() as folder:
        flat = [part for pair in flags for part in pair]
        run((*verb, *(("--model", "tiny-llama") if not flags else ()), *flat, "--dry-run"))
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "zero.yaml", "--dry-run"),
        ("--model", "zero.json", "--dry-run"),
        ("--model", "tiny-llama", "--gpu", "zero.yaml", "--dry-run"),
        ("--model", "tiny-llama", "--profile", "/dev/zero", "--dry-run"),
        ("verify", "/dev/zero"),
        ("report", "job"),
    ],
)
def test_files_without_end_are_refused(arguments):
    with empty_folder():
        Path("job").mkdir()
        for name in ("zero.yaml", "zero.json", "job/report.json"):
            Path(name).symlink_to("/dev/zero")
        code, _, err = run(arguments)
        assert code == cli.BAD_INPUT
        assert "more than 32 MiB" in err


@tries(60, 2000)
@given(TOOLS, VALUES)
def test_flags_of_the_other_verbs(start, value):
    if start[:3] == ("export", "--to", "schema") and value.startswith(("/", ".", "~", "a/")):
        return  # would write there, as it is told to
    with empty_folder():
        run((*start, value))
