"""`nanoflow-serve` as a process whose device fails while it serves.

Requests get an answer, probes see it, the process ends by itself with exit code 5 and one message,
and no rank is left.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from engine_builders import plan_of

from nanoflow_tune.runtime.plan_io import dump_plan
from nanoflow_tune.search_spaces.loader import content_hash, load_model

SCRIPT = Path(__file__).with_name("failing_server.py")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


class Server:
    """A server that will fail, and what it says."""

    def __init__(self, folder, fault, *flags, num_gpus=1, rank=0):
        folder = folder / "drawn"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
        model = load_model(folder)
        plan = replace(plan_of(model, num_gpus), inputs={"model": content_hash(model)})
        dump_plan(plan, folder / "plan.yaml")
        command = [sys.executable, SCRIPT, fault, rank, 5, "--plan", folder / "plan.yaml"]
        command += ["--weights", "random", "--model", folder / "config.json", "--port", 0]
        command += ["--device", "cpu", "--kv-cache-gib", 0.01, *flags]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.url = ""
        for line in self.process.stdout:
            if found := re.search(r"serving \S+ at (http://\S+)", line):
                self.url = found[1]
                break

    def ask(self):
        body = {"model": "drawn", "prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def ranks(self):
        """Process ids of the children."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in file.read_text().split()]

    def end(self):
        """Exit code and all that was said; it must end by itself."""
        said = self.process.communicate(timeout=60)[0]
        return self.process.returncode, said


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*arguments, **options):
        servers.append(Server(tmp_path, *arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def test_memory_that_runs_out_in_a_step_ends_requests_and_server(serve):
    server = serve("memory")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    reply = server.ask()
    assert reply.status_code == 500
    assert "the engine failed: out of memory" in reply.json()["error"]["message"]
    probe = httpx.get(f"{server.url}/health")
    assert (probe.status_code, probe.json()) == (
        503,
        {"status": "failed", "reason": "out of memory"},
    )
    assert server.ask().status_code == 503
    code, said = server.end()
    assert code == 5, said
    (line,) = [line for line in said.splitlines() if line.startswith("nanoflow-serve: ended: ")]
    assert "no memory for a step: 20.00 MiB were asked for" in line
    assert "--kv-cache-gib" in line
    assert "Traceback" not in said


def test_a_step_that_hangs_ends_requests_and_server(serve):
    server = serve("hang", "--step-timeout", 1)
    reply = server.ask()
    assert reply.status_code == 500
    assert "the GPU does not answer" in reply.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").json()["reason"] == "the GPU does not answer"
    code, said = server.end()
    assert code == 5, said
    assert "a step must end within 1 s" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("fault", ["kill", "memory"])
def test_a_rank_that_fails_ends_the_server_and_is_named(serve, fault):
    server = serve(fault, num_gpus=2, rank=1)
    ranks = server.ranks()
    assert len(ranks) >= 2
    reply = server.ask()
    assert reply.status_code == 500
    assert "a collective among the GPUs failed" in reply.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 503
    code, said = server.end()
    assert code == 5, said
    (line,) = [line for line in said.splitlines() if line.startswith("nanoflow-serve: ended: ")]
    told = {
        "kill": "rank 1: the process died by SIGKILL, so all ranks were ended",
        "memory": "no memory for a step: 20.00 MiB were asked for",
    }
    assert told[fault] in line
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
