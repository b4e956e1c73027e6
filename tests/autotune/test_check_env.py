from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nanoflow_tune.autotune import check_env, cli
from nanoflow_tune.autotune.check_env import judge, spec_of, summary
from nanoflow_tune.profiler import environment as environments
from nanoflow_tune.profiler.environment import LIBRARIES, Environment, GpuState
from nanoflow_tune.runtime.partition_layout import SmSplit

from .fakes import h200


def gpu(index=0, **changes):
    fields = {
        "index": index,
        "name": "NVIDIA H200",
        "memory_bytes": 150_754_820_096,
        "free_bytes": 150_000_000_000,
        "power_cap_w": 700.0,
        "default_power_cap_w": 700.0,
        "sm_clock_mhz": 345.0,
        "max_sm_clock_mhz": 1980.0,
        "watts": 75.0,
        "other_processes": 0,
        "has_energy_counter": True,
        "is_mig": False,
        "num_links": 18,
        "nvlink_peers": (1 - index,),
    }
    return GpuState(**{**fields, **changes})


def machine(**changes):
    fields = {
        "platform": "Linux x86_64",
        "python": "3.12.3",
        "has_driver": True,
        "driver_version": "580.159.04",
        "cuda_driver_version": "13.0",
        "nvrtc_version": "13.0",
        "gpus": (gpu(0), gpu(1)),
        "sm_split": SmSplit(granularity=8, num_groups=15, remainder=12),
        "num_sms": 132,
        "libraries": dict.fromkeys(LIBRARIES, "1.0") | {"torch": "2.11.0+cu130"},
    }
    return Environment(**{**fields, **changes})


def without(name):
    return {library: "1.0" for library in LIBRARIES if library != name} | {
        "torch": "2.11.0+cu130" if name != "torch" else None
    }


def states(environment, hardware=None):
    return {held.name: held for held in judge(environment, hardware or h200())}


def test_everything_works_on_a_whole_machine():
    found = states(machine())
    assert {held.state for held in found.values()} == {"works"}
    assert not any(held.remedy for held in found.values())
    assert "132 SMs in 15 groups of 8 and 12 left over" in found["SM partitions"].why
    assert summary(machine(), h200(), judge(machine(), h200())).startswith("2 x NVIDIA H200: plans")


@pytest.mark.parametrize(
    ("changes", "name", "state", "why", "remedy"),
    [
        ({"libraries": without("cuda-bindings")}, "measure", "missing", "partitions", "[gpu]"),
        ({"libraries": without("nvidia-ml-py")}, "measure", "missing", "nvidia-ml-py", "[gpu]"),
        ({"libraries": without("torch")}, "verify", "missing", "torch", "pip install"),
        ({"libraries": without("optuna")}, "predict", "missing", "optuna", "pip install"),
        ({"libraries": without("fastapi")}, "nanoflow-serve", "missing", "fastapi", "[serve]"),
        (
            {"libraries": without("flashinfer-python")},
            "FlashInfer kernels",
            "missing",
            "own attention",
            "flashinfer",
        ),
        (
            {"libraries": without("x") | {"torch": "2.13.0+cpu"}},
            "measure",
            "missing",
            "not a CUDA build",
            "CUDA build",
        ),
        (
            {"gpus": (), "notes": ("NVML said: no",)},
            "measure",
            "missing",
            "NVML said",
            "nvidia-smi",
        ),
        ({"gpus": (gpu(memory_bytes=80_000_000_000),)}, "measure", "missing", "80 GB", "--gpu"),
        ({"gpus": (gpu(is_mig=True),)}, "SM partitions", "missing", "MIG", "without MIG"),
        ({"sm_split": None}, "SM partitions", "missing", "", "driver"),
        ({"num_sms": 114}, "SM partitions", "limited", "132 SMs", "--gpu"),
        ({"gpus": (gpu(other_processes=2),)}, "quiet GPU", "limited", "2 other", "its own"),
        ({"gpus": (gpu(free_bytes=9_000_000_000),)}, "quiet GPU", "limited", "only 9", "its own"),
        ({"gpus": (gpu(power_cap_w=500.0),)}, "quiet GPU", "limited", "500 W", "calibrate"),
        (
            {"gpus": (gpu(has_energy_counter=False),)},
            "watts and joules",
            "limited",
            "no energy counter",
            "",
        ),
        ({"gpus": (gpu(),)}, "several GPUs", "missing", "one GPU", ""),
        (
            {"gpus": (gpu(0, nvlink_peers=()), gpu(1, nvlink_peers=()))},
            "several GPUs",
            "limited",
            "NVLink",
            "--num-gpus 1",
        ),
        (
            {"nvrtc_version": None, "notes": ("NVRTC does not load: x",)},
            "CUDA kernels",
            "missing",
            "NVRTC",
            "nvidia-cuda-nvrtc",
        ),
    ],
)
def test_each_lack_is_named_with_its_remedy(changes, name, state, why, remedy):
    held = states(machine(**changes))[name]
    assert held.state == state
    assert why in held.why
    assert remedy in held.remedy


def test_a_gpu_without_a_spec_is_said():
    unknown = machine(gpus=(gpu(name="NVIDIA X1"),))
    assert spec_of(unknown.gpus) is None
    measure = {held.name: held for held in judge(unknown, None)}["measure"]
    assert "no spec is shipped for NVIDIA X1" in measure.why
    assert spec_of(machine().gpus) == h200()


def test_unknown_figures_are_question_marks():
    held = states(machine(gpus=(gpu(power_cap_w=None, sm_clock_mhz=None),)))["quiet GPU"]
    assert "? of 1980 MHz, cap ? W" in held.why


def test_a_machine_without_a_gpu_is_told_so_and_exits_0(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environments, "DRIVER_FILE", tmp_path / "none")
    assert cli.main(["check-env"]) == cli.DONE
    out = capsys.readouterr().out
    values = json.loads(out.splitlines()[-1])
    assert values["summary"].startswith("No GPU and no NVIDIA driver here")
    assert values["hardware"] is None
    by_name = {held["name"]: held["state"] for held in values["capabilities"]}
    assert by_name["predict"] == by_name["verify"] == "works"
    assert by_name["measure"] == "missing"
    assert "No GPU and no NVIDIA driver here" in out.splitlines()[-3] + out.splitlines()[-2]

    assert cli.main(["check-env", "--json"]) == cli.DONE
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_split_is_asked_for_in_the_specs_granularity(monkeypatch):
    asked = []

    def read(granularity):
        asked.append(granularity)
        return machine(gpus=(gpu(name="NVIDIA A100-SXM4-80GB"),))

    monkeypatch.setattr(check_env, "read_environment", read)
    assert check_env.check_env()["hardware"] == "a100-80"
    assert asked == [8, 4]


def test_records_can_be_printed_as_json():
    values = json.dumps([held.name for held in judge(replace(machine(), gpus=()), None)])
    assert "measure" in values


def test_extras_survive_the_table(capsys):
    capability = check_env.Capability(
        name="x", state="missing", why="", remedy="pip install 'nanoflow-tune[gpu]'"
    )
    cli._stdout().print(check_env.table({"capabilities": [check_env.asdict(capability)]}))
    assert "[gpu]" in capsys.readouterr().out
