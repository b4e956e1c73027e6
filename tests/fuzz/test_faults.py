"""Full disks, refused paths, kills, second runs and Ctrl-C: old results whole, the next run works.

The long form (`--hypothesis-profile=long`) also kills and starves real jobs.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from command_line import empty_folder, run
from mutations import IS_LONG

from nanoflow_tune.autotune import cli
from nanoflow_tune.autotune.output_folder import DOCUMENT, FILES, claim, held, staging
from nanoflow_tune.profiler.profile import Point, Row
from nanoflow_tune.profiler.store import ProfileError, ProfileWriter, read_rows

JOB = ("-m", "nanoflow_tune.autotune", "--model", "tiny-llama", "--buckets", "main")
only_long = pytest.mark.skipif(not IS_LONG, reason="minutes; run with --hypothesis-profile=long")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and go on."""


def write_job(folder, text, names=FILES):
    with held(folder), staging(folder) as aside:
        for name in names:
            (aside / name).write_text(text)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("steps", range(40))
def test_a_job_killed_while_its_files_move_is_completed_by_the_next(tmp_path, monkeypatch, steps):
    """The kill comes before file operation number `steps` after the job's files are written."""
    fewer = tuple(name for name in FILES if not name.endswith(".png"))
    write_job(tmp_path, "old")
    left = [steps]

    def dying(real):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        try:
            with held(tmp_path), staging(tmp_path) as aside:
                for name in fewer:
                    (aside / name).write_text("new")
                for name in ("rename", "replace", "unlink", "rmdir"):
                    patch.setattr(Path, name, dying(getattr(Path, name)))
                    patch.setattr(os, name, dying(getattr(os, name)))
        except Killed:
            pass
    seen = contents(tmp_path)
    if DOCUMENT in seen:  # whatever a reader finds complete is of one job
        assert len({seen[name] for name in FILES if name in seen}) == 1
    with held(tmp_path):
        assert claim_is_free(tmp_path)
        after = contents(tmp_path)
    after.pop(".lock")
    assert after in (dict.fromkeys(FILES, "old"), dict.fromkeys(fewer, "new"))
    assert {path.name for path in tmp_path.iterdir()} == set(after)


def claim_is_free(folder):
    """The rules of `claim` meet a finished job, never a torn one."""
    present = [name for name in FILES if (folder / name).exists()]
    return DOCUMENT in present


def test_two_runs_in_one_folder_are_told_apart(tmp_path):
    folder = tmp_path / "out"
    with held(folder):
        with pytest.raises(ValueError, match=f"process {os.getpid()} is writing"), held(folder):
            raise AssertionError("both hold it")
        code, _, err = run(("--model", "tiny-llama", "--output-dir", folder))
        assert code == cli.BAD_INPUT
        assert "one run at a time writes to an output folder" in err
    assert not folder.exists()


def test_the_lock_of_a_killed_run_is_free_again_and_its_leftovers_go(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from nanoflow_tune.autotune.output_folder import held, staging\n"
        f"with held(Path({str(tmp_path)!r})), staging(Path({str(tmp_path)!r})) as aside:\n"
        "    (aside / 'plan.yaml').write_text('half'); print('here', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout
    assert child.stdout.readline() == b"here\n"
    with pytest.raises(ValueError, match=f"process {child.pid} is writing"), held(tmp_path):
        pass
    child.kill()
    child.wait()
    assert list(tmp_path.glob(".unfinished-*"))
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["/proc/nanoflow", "/dev/null", "/dev/null/x", "a" * 300])
def test_a_folder_that_cannot_be_written_is_refused_by_name(target):
    with empty_folder() as folder:
        code, _, err = run(("--model", "tiny-llama", "--buckets", "main", "--output-dir", target))
        assert code == cli.BAD_INPUT
        assert target.split("/x")[0] in err
        assert list(folder.iterdir()) == []


def test_files_in_the_place_of_folders_and_folders_in_the_place_of_files_are_refused():
    with empty_folder():
        Path("file").write_text("mine")
        Path("folder.yaml").mkdir()
        Path("folder.json").mkdir()
        for arguments in (
            ("--model", "tiny-llama", "--output-dir", "file"),
            ("--model", "tiny-llama", "--output-dir", "file/below"),
            ("--model", "folder.yaml", "--dry-run"),
            ("--model", "folder.json", "--dry-run"),
            ("export", "--to", "schema", "--output", "folder.yaml"),
            ("export", "--to", "schema", "--output", "file/below"),
            ("report", "file"),
            ("verify", "folder.yaml"),
        ):
            assert run(arguments)[0] == cli.BAD_INPUT, arguments
        assert Path("file").read_text() == "mine"


def limited(size):
    """In a child: files end at `size` bytes, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("mine")
    arguments = ("-m", "nanoflow_tune.autotune", "export", "--to", "schema", "--output", path)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, preexec_fn=limited(1000)
    )
    assert done.returncode == cli.BAD_INPUT, done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_with_spaces_and_letters_of_other_alphabets():
    with empty_folder() as folder:
        place = Path("mod\u00e8le \u6a21\u578b") / "a b"
        place.mkdir(parents=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 100,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
        }
        (place / "config.json").write_text(json.dumps(config))
        out = folder / "sortie \u00e9t\u00e9"
        code, line, _ = run(("--model", place, "--output-dir", out, "--dry-run", "--json"))
        assert code == cli.DONE
        assert json.loads(line)["output_dir"] == str(out)
        code, _, _ = run(("export", "--to", "schema", "--output", out / "sch\u00e9ma.json"))
        assert code == cli.DONE
        assert json.loads((out / "sch\u00e9ma.json").read_text())


def a_row(tokens):
    point = Point(kind="norm", shape="d64", variant="torch", tokens=tokens, kv_len=0, num_sms=8)
    figures = {"median_us": 1.0, "p10_us": 1.0, "p90_us": 1.0, "joules": 0.0, "watts": 0.0}
    return Row(point=point, n=3, joules_source="missing", sm_clock_mhz=0.0, **figures)


def test_a_profile_cut_off_anywhere_is_gone_on_with(tmp_path):
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    header = {"hardware": "h200", "dtype": "bfloat16"}
    rows = [a_row(8 * n) for n in range(1, 4)]
    with ProfileWriter.solo(whole, header) as writer:
        for row in rows:
            writer.append(row)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        cut.write_bytes(content[:size])
        with ProfileWriter.solo(cut, header):
            pass
        found_header, found = read_rows(cut)
        assert found_header == header
        assert found == rows[: len(found)]
        assert len(found) == max(0, content[:size].count(b"\n") - 3)


def test_two_profile_runs_do_not_append_to_one_file(tmp_path):
    path = tmp_path / "p.csv"
    with (
        ProfileWriter.solo(path, {"hardware": "h200"}),
        pytest.raises(ProfileError, match="one run at a time"),
    ):
        ProfileWriter.solo(path, {"hardware": "h200"})


def start(folder, *more, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *JOB, "--output-dir", str(folder), *more], **pipes, **options
    )


def test_ctrl_c_says_how_to_go_on_and_leaves_nothing_half_done(tmp_path):
    # A job that a shell put into the background would ignore it.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = start(tmp_path / "out", preexec_fn=heed)
    assert child.stderr
    for line in child.stderr:
        if line.startswith("search"):
            break
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=120)[1]
    assert child.returncode == cli.INTERRUPTED, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@only_long
def test_jobs_killed_at_random_moments(tmp_path):
    """Each kill leaves the finished result of before, or nothing; the last run needs no help."""
    folder, rng = tmp_path / "out", random.Random(0)
    for attempt in range(8):
        child = start(folder)
        time.sleep(rng.uniform(0.2, 15.0))
        child.kill()
        child.communicate()
        if (folder / DOCUMENT).exists():
            claimed = json.loads((folder / DOCUMENT).read_text())
            assert claimed["model"] == "tiny-llama", attempt
    child = start(folder)
    err = child.communicate()[1]
    assert child.returncode == cli.DONE, err
    assert {path.name for path in folder.iterdir()} == {n for n in FILES if (folder / n).exists()}


@only_long
@pytest.mark.parametrize("size", [0, 5_000, 50_000, 150_000])
def test_jobs_on_a_full_disk(tmp_path, size):
    child = start(tmp_path / "out", preexec_fn=limited(size))
    err = child.communicate()[1]
    assert child.returncode == cli.BAD_INPUT, err[-2000:]
    assert "Traceback" not in err
    assert not (tmp_path / "out" / DOCUMENT).exists()
    assert claim(tmp_path / "out", {}, is_measured=False) == ""


@only_long
def test_two_jobs_at_once(tmp_path):
    children = [start(tmp_path / "out") for _ in range(2)]
    ends = sorted((child.communicate()[1], child.returncode) for child in children)
    assert sorted(code for _, code in ends) == [cli.DONE, cli.BAD_INPUT], ends


@pytest.mark.parametrize("arguments", [["models"], ["export", "--to", "schema"]])
def test_a_reader_that_leaves_early_is_no_crash(arguments):
    """As in `nanoflow-tune models | head -1`."""
    code = "import sys; from nanoflow_tune.autotune.cli import main; sys.exit(main())"
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert ran.returncode == 141
    assert b"crashed" not in ran.stderr
    assert b"Traceback" not in ran.stderr
    assert b"Exception ignored" not in ran.stderr
