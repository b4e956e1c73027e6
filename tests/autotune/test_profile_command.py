"""The verb `profile`: which models at which degrees, and what it says without a GPU."""

from __future__ import annotations

import pytest

from nanoflow_tune.autotune.cli import BAD_INPUT, main
from nanoflow_tune.autotune.profile_command import shards_of
from nanoflow_tune.search_spaces.loader import load_hardware

H200 = load_hardware("h200")


def names(found):
    return [(shard.model.name, shard.tp_degree) for shard in found]


def test_models_take_their_own_degrees_then_tp_then_the_ranks_then_what_fits():
    asked = ("llama2-70b@2+1", "llama3-8b")
    own = [("llama2-70b", 2), ("llama2-70b", 1)]
    assert names(shards_of(asked, (4,), None, H200)) == [*own, ("llama3-8b", 4)]
    assert names(shards_of(asked, (), 2, H200)) == [*own, ("llama3-8b", 2)]
    assert names(shards_of(asked, (), None, H200)) == [*own, ("llama3-8b", 1)]
    assert names(shards_of(("llama3-8b@1", "llama3-8b"), (1,), None, H200)) == [("llama3-8b", 1)]


@pytest.mark.parametrize(
    ("asked", "says"),
    [(("llama3-8b@x",), "must read NAME@1"), (("llama3-8b@3",), "must be one of 1, 2, 4, 8")],
)
def test_bad_degrees_are_refused(asked, says):
    with pytest.raises(ValueError, match=says):
        shards_of(asked, (), None, H200)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--models"),
        (["--models", "llama3-8b@1,llama2-70b@2"], "needs 1 x NVIDIA H200"),
        (["--model", "llama2-70b"], "needs 2 x NVIDIA H200"),
        (["--calibrate"], "needs 1 x NVIDIA H200"),
        (["--errors", "--profile", "nowhere"], "nowhere"),
    ],
)
def test_without_a_gpu_or_a_model_it_says_what_is_missing(arguments, says, capsys):
    assert main(["profile", *arguments]) == BAD_INPUT
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--parts", "gemm"], ["--minutes", "0"], ["--tp", "0"]])
def test_flags_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--model", "llama3-8b", *arguments])
    assert stop.value.code == BAD_INPUT
    assert "must be" in capsys.readouterr().err


def test_calibration_measures_variants_that_this_machine_has(monkeypatch, capsys, ranks_that):
    """FlashInfer is not installed, and its rows do not make a profile unfit."""
    from nanoflow_tune.autotune import profile_command
    from nanoflow_tune.profiler import rank_jobs
    from nanoflow_tune.profiler.store import shipped_profile

    profile = shipped_profile("h200")
    assert profile is not None
    times = {row.point: row for row in profile.rows}
    here = {
        kind: tuple({p.variant for p in times if p.kind == kind and "flash" not in p.variant})
        for kind in {point.kind for point in times}
    }
    asked = []

    def call(function, *arguments):
        if function is rank_jobs.variants_here:
            return [here]
        asked.extend(arguments[1])
        return [[times[point] for point in arguments[1]]]

    monkeypatch.setattr(profile_command, "RankGroup", ranks_that(call))
    monkeypatch.setattr(profile_command, "_check_devices", lambda *_: None)
    assert main(["profile", "--calibrate", "--gpu", "h200"]) == 0
    assert asked
    assert not any(point.variant.startswith("flashinfer") for point in asked)
    assert {point.kind for point in asked} >= {"gemm", "decode_attention", "prefill_attention"}
    assert '"fits":true' in capsys.readouterr().out
