from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan_io import make_plan

from nanoflow_tune.runtime.plan_match import LiveGpus, PlanMismatchError, match_plan
from nanoflow_tune.search_spaces.loader import content_hash, load_hardware, load_model

LLAMA, H200 = load_model("llama3-8b"), load_hardware("h200")
LIVE = LiveGpus(name=H200.device_name, count=2, num_sms=H200.num_sms)


def _plan(model=LLAMA, num_gpus=1):
    hashes = {"model": content_hash(model), "hardware": content_hash(H200)}
    return replace(
        make_plan(),
        model=model.name,
        hardware="h200",
        num_gpus=num_gpus,
        dtype=model.torch_dtype,
        inputs=hashes,
    )


def _match(plan=None, model=LLAMA, num_gpus=1, gpus=LIVE, hardware=H200):
    return match_plan(plan or _plan(), model, hardware, num_gpus, gpus)


def test_the_very_model_on_the_very_gpu_is_exact_whatever_its_folder_is_called():
    assert _match().is_exact
    assert _match(model=replace(LLAMA, name="Meta-Llama-3-8B")).is_exact
    assert _match().remarks == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 2}, r"for 1 GPU\(s\), but 2 were asked for"),
        ({"model": load_model("llama2-70b")}, "another model .*hidden_size 8192, not 4096"),
        ({"model": replace(LLAMA, torch_dtype="float32")}, "for bfloat16 weights"),
        ({"model": replace(LLAMA, num_hidden_layers=31)}, "num_hidden_layers 31, not 32"),
        ({"gpus": replace(LIVE, count=0)}, "this machine has 0"),
        ({"gpus": replace(LIVE, name="NVIDIA A100", num_sms=108)}, "NVIDIA A100 with 108"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(arguments, message):
    with pytest.raises(PlanMismatchError, match=message):
        _match(**arguments)


@pytest.mark.parametrize(
    ("arguments", "remark"),
    [
        ({"model": replace(LLAMA, vocab_size=128264)}, "vocab_size 128264, not 128256"),
        ({"gpus": replace(LIVE, name="NVIDIA H100 80GB HBM3")}, "NVIDIA H100 80GB HBM3, not"),
        ({"hardware": replace(H200, power_cap_w=500.0)}, "spec of h200 has changed"),
        ({"plan": replace(_plan(), inputs={"model": "0"})}, "spec of llama3-8b has changed"),
    ],
)
def test_what_is_close_runs_sequentially_and_says_so(arguments, remark):
    match = _match(**arguments)
    assert not match.is_exact
    assert len(match.remarks) == 1
    assert remark in match.remarks[0]


def test_a_plan_for_a_model_of_ones_own_is_known_by_its_hash_alone():
    own = replace(LLAMA, name="own", num_hidden_layers=3)
    assert _match(plan=_plan(own), model=replace(own, name="folder")).is_exact
    with pytest.raises(PlanMismatchError, match="made for 'own'"):
        _match(plan=_plan(own), model=replace(own, vocab_size=9))


def test_on_the_cpu_the_gpu_does_not_matter_but_the_degree_does():
    match = _match(gpus=None)
    assert match.is_exact
    assert "on the CPU" in match.remarks[0]
    with pytest.raises(PlanMismatchError, match="but 2 were asked for"):
        _match(num_gpus=2, gpus=None)
