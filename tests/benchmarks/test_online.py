"""Traffic has its workload's moments; latencies and the figure by hand; a run against a server."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanoflow_tune.profiler.traffic import plan_traffic
from nanoflow_tune.search_spaces.loader import load_workload

from .conftest import BENCHMARKS

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
SHAREGPT = load_workload("sharegpt")


def _plan(workload=SHAREGPT, **options):
    defaults = {"num_requests": 20000, "rate_per_s": 4.0, "max_tokens": 10**9, "seed": 1}
    return plan_traffic(workload, **(defaults | options))


def test_traffic_has_the_moments_of_its_workload_and_poisson_arrivals():
    requests = _plan()
    prompts = np.array([request.prompt_tokens for request in requests])
    answers = np.array([request.decode_tokens for request in requests])
    assert prompts.mean() == pytest.approx(246, rel=0.05)
    assert prompts.std() == pytest.approx(547, rel=0.15)
    assert answers.mean() == pytest.approx(322, rel=0.03)
    assert answers.std() == pytest.approx(244, rel=0.06)
    gaps = np.diff([request.at_s for request in requests])
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    assert np.corrcoef(prompts, answers)[0, 1] == pytest.approx(0, abs=0.03)


def test_traffic_repeats_with_its_seed_and_stays_within_the_context():
    assert _plan(num_requests=50) == _plan(num_requests=50)
    assert _plan(num_requests=50) != _plan(num_requests=50, seed=2)
    for request in _plan(max_tokens=300):
        assert request.prompt_tokens + request.decode_tokens <= 300
        assert min(request.prompt_tokens, request.decode_tokens) >= 1
    constant = _plan(load_workload("512/64"), num_requests=9)
    assert {(r.prompt_tokens, r.decode_tokens) for r in constant} == {(512, 64)}
    prefill = _plan(load_workload("512-0"), num_requests=9)
    assert {(r.prompt_tokens, r.decode_tokens) for r in prefill} == {(512, 1)}
    assert {r.at_s for r in _plan(num_requests=9, rate_per_s=math.inf)} == {0.0}
    with pytest.raises(ValueError, match="positive rate"):
        _plan(rate_per_s=0.0)


def _served(online, due, first, end, tokens):
    return online.Served(
        due_s=due, sent_s=due, first_token_s=first, end_s=end, prompt_tokens=5, decode_tokens=tokens
    )


def test_latencies_by_hand(load):
    online = load("online")
    served = (_served(online, 1, 2, 6, 5), _served(online, 0, 3, 3, 1))
    outcome = online.Outcome(served=served, failed=())
    found = online.summarise(outcome.served)
    assert found["ttft"]["mean"] == pytest.approx(2000)
    assert found["tpot"]["p99"] == pytest.approx(1000)
    assert found["normalised"]["p50"] == pytest.approx((1000 + 3000) / 2)
    assert outcome.tokens_per_s == pytest.approx((10 + 6) / 6)


def test_the_figure_is_p99_over_mean_and_only_of_whole_runs(load):
    online = load("online")
    served = tuple(_served(online, 0, 0.01, 0.1, 1) for _ in range(98))
    slow = tuple(_served(online, 0, 0.1, 0.3, 1) for _ in range(2))
    outcome = online.Outcome(served=(*served, *slow), failed=())
    values = [100.0] * 98 + [300.0] * 2
    row = online.figure(outcome, "c", "a GPU")
    assert row.value == pytest.approx(np.percentile(values, 99) / np.mean(values))
    assert (row.id, row.unit, row.reach) == ("online_p99", "x", "<= 2")
    with pytest.raises(ValueError, match="1 were not"):
        online.figure(online.Outcome(served=served, failed=("429",)), "c", "g")
    with pytest.raises(ValueError, match="within 200 ms/token"):
        online.figure(
            online.Outcome(served=(_served(online, 0, 1, 9, 9),) * 4, failed=()), "c", "g"
        )


def test_a_client_that_sent_late_has_measured_itself(load):
    online = load("online")
    on_time = _served(online, 1.0, 1.1, 1.2, 4)
    late = online.Served(
        due_s=1.0,
        sent_s=1.0 + 1.01 * online.LATE_S,
        first_token_s=1.1,
        end_s=1.2,
        prompt_tokens=5,
        decode_tokens=4,
    )
    few = online.Outcome(served=(on_time,) * 99 + (late,), failed=())
    assert online.figure(few, "c", "g").value == pytest.approx(1)
    assert "100 served, 0 failed, 1 sent late" in online.table(few, 2.0)
    more = online.Outcome(served=(on_time,) * 98 + (late,) * 2, failed=())
    with pytest.raises(ValueError, match=r"at most 1 %.*50 ms late, but 2 of 100.*--processes"):
        online.figure(more, "c", "g")


def test_other_machines_are_never_asked(load):
    online = load("online")
    assert online.loopback("http://127.0.0.1:8000/") == "http://127.0.0.1:8000"
    assert online.loopback("http://[::1]:1") == "http://[::1]:1"
    for url in ("http://example.com", "http://10.0.0.1:8000", "127.0.0.1:8000"):
        with pytest.raises(online.argparse.ArgumentTypeError, match="only servers on this machine"):
            online.loopback(url)


def test_a_run_against_a_server_prints_latencies_and_stores_the_figure(tmp_path):
    from live_server import live_server

    with live_server(max_model_len=64) as server:
        command = [sys.executable, str(BENCHMARKS / "online.py"), "--url", server.url]
        command += ["--requests", "12", "--load", "0.5", "--out", "figures.csv"]
        command += ["--processes", "2"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    assert "12 served, 0 failed" in found.stdout
    warm_ups = 2 * 2  # before the run that finds the peak, and before the other one
    assert len(server.engine.submitted) == 2 * (12 + warm_ups)
    assert "normalised" in found.stdout
    assert 'online_p99,"sharegpt moments, 50 % of peak"' in (tmp_path / "figures.csv").read_text()
