"""Client processes send one schedule: each request once, the same prompts for any number."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow_tune.profiler.traffic import PlannedRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
TRAFFIC = [
    PlannedRequest(at_s=0.01 * place, prompt_tokens=3 + place, decode_tokens=1 + place)
    for place in range(7)
]


@pytest.fixture
def fleet(load):
    return load("client_fleet")


def _prompts(server):
    """Of the run's own requests, by length; warm-ups are longer than all of them."""
    submitted = [request.prompt_token_ids for request in server.engine.submitted]
    return sorted((ids for ids in submitted if len(ids) < 16), key=len)


def test_any_number_of_processes_sends_the_same(fleet):
    from live_server import MODEL, live_server

    found = []
    for processes in (1, 3):
        with live_server(max_model_len=64) as server:
            endpoint = fleet.Endpoint(url=server.url)
            results = fleet.send_all(endpoint, MODEL, TRAFFIC, 5, processes)
        lengths = [(r.prompt_tokens, r.decode_tokens, r.due_s) for r in results]
        assert lengths == [(p.prompt_tokens, p.decode_tokens, p.at_s) for p in TRAFFIC]
        for served in results:
            assert served.due_s <= served.sent_s <= served.first_token_s <= served.end_s
        assert len(server.engine.submitted) == len(TRAFFIC) + processes * fleet.NUM_WARM_UPS
        found.append(_prompts(server))
    assert found[0] == found[1]
    assert len(set(found[0])) == len(TRAFFIC)


def test_a_server_that_refuses_the_warm_up_is_no_run(fleet):
    from live_server import MODEL, live_server

    with live_server(max_model_len=64, fails_with="out of memory") as server:
        endpoint = fleet.Endpoint(url=server.url)
        with pytest.raises(ValueError, match=r"warm-up.*out of memory"):
            fleet.send_all(endpoint, MODEL, TRAFFIC, 5, 2)


def test_a_request_must_get_exactly_its_tokens(fleet):
    reply = fleet.Streamed(sent_s=11.0, first_token_s=12.0, end_s=13.0, num_tokens=3)
    planned = PlannedRequest(at_s=0.5, prompt_tokens=4, decode_tokens=3)
    served = fleet.outcome(planned, reply, 10.0)
    assert (served.due_s, served.sent_s, served.end_s) == (0.5, 1.0, 3.0)
    assert fleet.outcome(planned, replace(reply, num_tokens=2), 10.0) == "2 tokens came, not 3"
    assert fleet.outcome(planned, replace(reply, error="500: x"), 10.0) == "500: x"
    assert 1 <= fleet.default_processes() <= fleet.MOST_PROCESSES
