"""Memory that really runs out, a rank killed inside NCCL, one that never comes to a collective.

What is checked: cause, values and remedy in the message, the exit code, that no process is left,
and that the GPUs have their memory back.

    python -m pytest tests/gpu/test_gpu_failures.py -q
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

sys.path.insert(0, str(Path(__file__).parent))  # spawned ranks import the same module
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

GIB = 1 << 30
SLACK = GIB // 2
"""Other work on the machine, and what the driver gives back late."""
MEMORY = r"but \d+\.\d\d of \d+\.\d\d GiB are free"


@contextmanager
def all_but(gib):
    """A filler that leaves this much of GPU 0."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(0)
    filler = torch.empty(free - gib * GIB, dtype=torch.uint8, device="cuda:0")
    try:
        yield
    finally:
        del filler
        torch.cuda.empty_cache()


@contextmanager
def given_back(num_gpus=1):
    """After the body the GPUs have as much free memory as before."""
    torch.cuda.empty_cache()
    gpus = range(num_gpus)
    before = [torch.cuda.mem_get_info(gpu)[0] for gpu in gpus]
    yield
    torch.cuda.empty_cache()
    deadline = time.monotonic() + 10
    while True:
        lost = [b - torch.cuda.mem_get_info(gpu)[0] for gpu, b in zip(gpus, before, strict=True)]
        if max(lost) < SLACK:
            return
        assert time.monotonic() < deadline, f"bytes that were not given back: {lost}"
        time.sleep(0.2)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def hardware():
    """The spec of this machine's GPU."""
    from nanoflow_tune.search_spaces.loader import known, load_hardware

    specs = map(load_hardware, known("hardware"))
    name = torch.cuda.get_device_name(0)
    found = next((spec for spec in specs if spec.device_name == name), None)
    return found or pytest.skip(f"no spec of {name}")


def model_and_plan(folder, **sizes):
    """A `config.json` of random weights, and a plan for it."""
    from engine_builders import bucket

    from nanoflow_tune.runtime.op_graph import OpGraph
    from nanoflow_tune.runtime.plan import Plan
    from nanoflow_tune.runtime.plan_io import dump_plan
    from nanoflow_tune.search_spaces.loader import content_hash, load_model

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    folder = folder / "drawn"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | sizes), "utf-8")
    model = load_model(folder)
    own = bucket(OpGraph.build(model), 512, 256, context=1024.0)
    own = replace(own, prefill_context_tokens=128.0)
    plan = Plan(
        model=model.name,
        hardware=hardware().name,
        workload="512-512",
        num_gpus=1,
        dtype=model.torch_dtype,
        kv_dtype=model.torch_dtype,
        page_size=16,
        inputs={"model": content_hash(model)},
        buckets=(own,),
    )
    dump_plan(plan, folder / "plan.yaml")
    return folder / "config.json", folder / "plan.yaml"


def refusal_of_start(options):
    """What an engine says that finds no memory; it and the error, which hold weights, are gone."""
    from nanoflow_tune.runtime.gpu_failures import OutOfMemoryError
    from nanoflow_tune.runtime.launch import RankContext
    from nanoflow_tune.runtime.serving_setup import prepare

    setting = prepare(options)
    engine = setting.engine(lambda: setting.make_runner(RankContext(0, 1, "cuda:0")))
    with pytest.raises(OutOfMemoryError) as caught:
        engine.start()
    engine.close()
    return str(caught.value)


def test_a_kv_cache_that_does_not_fit_is_told_before_the_first_request(tmp_path):
    from nanoflow_tune.runtime.serving_setup import ServingOptions

    config, plan = model_and_plan(tmp_path)
    options = ServingOptions(
        plan=plan, weights="random", model=str(config), cache_bytes=20 * GIB, max_model_len=2048
    )
    torch.ones(1, device="cuda:0")
    with given_back(), all_but(8):
        told = refusal_of_start(options)
        gc.collect()
    assert re.match(r"GPU 0 has no memory for the KV cache: (19\.9\d|20\.0\d) GiB were", told)
    assert re.search(MEMORY, told)
    assert told.endswith("; lower --kv-cache-gib, or end what else runs on the GPU")


def test_a_verification_without_memory_exits_with_5_and_names_what_it_needs(tmp_path):
    config, plan = model_and_plan(tmp_path, vocab_size=400_000)  # 6.6 GB for two matrices
    torch.ones(1, device="cuda:0")
    command = [sys.executable, "-m", "nanoflow_tune.autotune", "verify", str(plan)]
    with given_back(), all_but(4):
        ran = subprocess.run(
            [*command, "--model", str(config.parent)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ran.returncode == 5, ran.stderr
    (said,) = [line for line in ran.stderr.splitlines() if "nanoflow-tune: error:" in line]
    assert "GPU 0 has no memory for verifying schedule" in said
    assert re.search(MEMORY, said)
    assert "CUDA_VISIBLE_DEVICES=" in said
    assert "Traceback" not in ran.stderr


def test_a_schedule_without_memory_is_lost_and_the_next_one_measured():
    from nanoflow_tune.autotune.measuring_stage import MeasuringStage
    from nanoflow_tune.profiler.rank_jobs import IterationCase
    from nanoflow_tune.runtime.gpu_failures import OutOfMemoryError
    from nanoflow_tune.runtime.op_graph import OpGraph, RowMix

    from .test_verify_on_device import overlapped, small_model

    model = replace(small_model(), max_position_embeddings=32768)
    mix = RowMix(
        decode_tokens=256,
        prefill_tokens=256,
        decode_context_tokens=8000.0,  # 8.4 GB of keys and values
        prefill_context_tokens=100.5,
    )
    case = IterationCase(model=model, hardware=hardware(), tp_degree=1, mix=mix)
    schedule = overlapped(OpGraph.build(model), case.hardware.num_sms, "cublas")
    stage = MeasuringStage(case, torch.cuda.get_device_name(0), "", "test", print)
    torch.ones(1, device="cuda:0")
    with given_back(), closing(stage):
        with all_but(5), pytest.raises(OutOfMemoryError, match="the KV cache of the batch"):
            stage.measure([schedule], rounds=1, turn_s=0.05)
        (timing,) = stage.measure([schedule], rounds=1, turn_s=0.05)
        assert timing.period_us > 0


@needs_two_gpus
@pytest.mark.parametrize("fault", ["killed", "away", "out of memory"])
def test_one_rank_ends_all_and_the_first_cause_is_told(fault):
    import failure_ranks as on_rank

    from nanoflow_tune.runtime.gpu_failures import GpuFailureError, OutOfMemoryError
    from nanoflow_tune.runtime.launch import LostRankError, RankGroup

    kinds = {
        "killed": (on_rank.kill_inside_all_reduces, LostRankError),
        "away": (on_rank.stay_away, LostRankError),
        "out of memory": (on_rank.run_out, OutOfMemoryError),
    }
    function, kind = kinds[fault]
    for gpu in range(2):
        torch.ones(1, device=f"cuda:{gpu}")
    with given_back(2), RankGroup(2, device="cuda", timeout_s=120.0) as ranks:
        processes = ranks.call(on_rank.process_id)
        assert ranks.call(on_rank.sum_up, 3) == [1.0, 1.0]
        ranks.timeout_s = 3.0 if fault == "away" else 60.0
        began_s = time.monotonic()
        with pytest.raises(GpuFailureError) as caught:
            ranks.call(function, 1)
        took_s = time.monotonic() - began_s
        told = str(caught.value)
        assert isinstance(caught.value, kind), told
        assert took_s < 20
        assert not any(map(is_alive, processes))
    if fault == "killed":
        assert told.startswith("rank 1: the process died by SIGKILL, so all ranks were ended")
    elif fault == "away":
        assert told.startswith("no answer from rank 0, 1 within 3 s")
        assert "from sum_up (failure_ranks.py:" in told or "rank 0 was in sum_up" in told
        assert re.search(r"rank 1 was in stay_away \(failure_ranks\.py:\d+\)", told)
    else:
        assert re.match(r"GPU 1 has no memory for `run_out`: 1024\.00 GiB were asked for", told)
        assert re.search(MEMORY, told)
