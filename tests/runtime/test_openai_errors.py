"""What is refused, and how: OpenAI's error bodies, limits, back-pressure, disconnects, shutdown."""

from __future__ import annotations

import json
import signal
import socket
import threading

import httpx
import openai
import pytest
from live_server import MODEL, live_server

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": MODEL, "prompt": "one"}


@pytest.fixture(scope="module")
def server():
    with live_server() as server:
        yield server


@pytest.fixture(scope="module")
def plain(server):
    return server.plain()


REFUSED = {
    "echo": (TEXT | {"echo": True}, None, "`echo` is not supported"),
    "penalty": (CHAT | {"presence_penalty": 1}, None, "`presence_penalty` is not supported"),
    "tools": (CHAT | {"tools": [{"type": "function"}]}, None, "`tools` is not supported"),
    "json": (CHAT | {"response_format": {"type": "json_object"}}, None, "`response_format` is not"),
    "unknown": (TEXT | {"max_token": 3}, "max_token", "does not know this parameter"),
    "temperature": (TEXT | {"temperature": 3}, "temperature", "less than or equal to 2"),
    "top_p": (TEXT | {"top_p": 0}, "top_p", "greater than 0"),
    "max_tokens": (TEXT | {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "n": (TEXT | {"n": 1000}, "n", "less than or equal to 128"),
    "n prompts": (TEXT | {"n": 100, "prompt": ["a", "b"]}, "n", "at most 128"),
    "logprobs": (TEXT | {"logprobs": 6}, "logprobs", "less than or equal to 5"),
    "top_logprobs": (CHAT | {"top_logprobs": 2}, None, "goes with `logprobs: true`"),
    "limits": (CHAT | {"max_tokens": 2, "max_completion_tokens": 3}, None, "must agree"),
    "best_of": (TEXT | {"best_of": 3}, None, "`best_of` other than `n`"),
    "stop": (TEXT | {"stop": ""}, "stop", "at least 1 character"),
    "stream_options": (TEXT | {"stream_options": {"include_usage": True}}, None, "`stream: true`"),
    "no prompt": ({"model": MODEL}, "prompt", "Field required"),
    "empty prompt": (TEXT | {"prompt": []}, "prompt", "prompt"),
    "token id": (TEXT | {"prompt": [1, 10**6]}, "prompt", "must be below"),
    "negative id": (TEXT | {"prompt": [-1]}, "prompt", "`prompt.0`: Input should be greater"),
    "no messages": (CHAT | {"messages": []}, "messages", "at least 1 item"),
    "image": (
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        "`messages.0.content.0.type`: Input should be 'text'",
    ),
    "role": (CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools"),
}


@pytest.mark.parametrize(("body", "param", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_requests_are_named(server, plain, body, param, message):
    before = len(server.engine.submitted)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    reply = plain.post(path, json=body)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(server.engine.submitted) == before


def test_what_changes_nothing_is_taken(plain):
    harmless = {
        "user": "me",
        "echo": False,
        "presence_penalty": 0,
        "logit_bias": {},
        "suffix": None,
    }
    assert plain.post("/v1/completions", json=TEXT | harmless | {"best_of": 1}).status_code == 200
    harmless = {"tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    assert plain.post("/v1/chat/completions", json=CHAT | harmless).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"[1]", b'"x"', b"", b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(plain, content):
    headers = {"content-type": "application/json"}
    reply = plain.post("/v1/completions", content=content, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_bodies_of_web_forms_are_refused(plain):
    """A page of another site may send text/plain to a local server without asking."""
    reply = plain.post(
        "/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"}
    )
    assert reply.status_code == 400
    assert "application/json" in reply.json()["error"]["message"]


def test_other_models_paths_and_methods_are_not_found(server, plain):
    client = server.client()
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="gpt", prompt="x")
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert plain.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert plain.get("/v1/completions").status_code == 405


def test_too_many_tokens_are_413(server):
    client = server.client()
    with pytest.raises(openai.APIStatusError, match="at most 256 tokens together") as refused:
        client.completions.create(model=MODEL, prompt="x", max_tokens=256)
    assert refused.value.status_code == 413
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * 999}]
        )
    assert refused.value.status_code == 413


def _in_pieces(size):
    for _ in range(size // 1024):
        yield b" " * 1024


def test_a_body_that_is_too_large_is_413_whether_its_length_is_told_or_not():
    with live_server(max_body_bytes=10_000) as server:
        headers = {"content-type": "application/json"}
        for content in (b" " * 20_000, _in_pieces(20_000)):
            reply = server.plain().post("/v1/completions", content=content, headers=headers)
            assert reply.status_code == 413
            assert reply.json()["error"]["code"] == "request_too_large"
        assert server.plain().post("/v1/completions", json=TEXT).status_code == 200


def test_the_api_key_guards_v1_alone():
    with live_server(api_key="secret") as server:
        plain = server.plain()
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            reply = plain.post("/v1/completions", content=b"{", headers=headers)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        assert plain.get("/health").status_code == plain.get("/metrics").status_code == 200
        with pytest.raises(openai.AuthenticationError) as refused:
            server.client(api_key="wrong").models.list()
        assert refused.value.code == "invalid_api_key"
        assert server.client(api_key="secret").completions.create(**TEXT).choices[0].text == "one"


def test_a_full_queue_is_429_with_retry_after_and_takes_back_what_was_submitted():
    with live_server(max_requests=2, holds_at=0) as server:
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            server.client().completions.create(model=MODEL, prompt="one", n=3)
        assert refused.value.response.headers["retry-after"] == "3"
        assert refused.value.code == "queue_full"
        assert refused.value.type == "rate_limit_error"
        for request in server.engine.submitted:
            assert server.engine.wait_until_cancelled(request.request_id)
        assert 'rejected_total{status="429"} 1.0' in server.plain().get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_told(stream):
    with live_server(fails_with="the device is gone") as server:
        with pytest.raises(openai.APIError, match="the device is gone") as failed:
            list(server.client().completions.create(**TEXT, stream=stream))
        if not stream:
            assert failed.value.status_code == 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_requests(stream):
    with live_server(holds_at=1) as server:
        body = json.dumps(TEXT | {"n": 2, "stream": stream, "max_tokens": 50}).encode()
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            if stream:
                assert connection.recv(10).startswith(b"HTTP/1.1 2")
            while len(server.engine.submitted) < 2:
                threading.Event().wait(0.01)
        for request in server.engine.submitted:
            assert server.engine.wait_until_cancelled(request.request_id)
        page = server.plain().get("/metrics").text
        assert 'nanoflow_requests_finished_total{reason="cancelled"} 2.0' in page


def test_a_stream_that_is_left_early_cancels_its_request():
    with live_server(holds_at=2) as server:
        text = "one two three four"
        create = server.client().completions.create
        with create(model=MODEL, prompt=text, stream=True) as stream:
            first = next(iter(stream))
        assert server.engine.wait_until_cancelled(f"{first.id}-0")


def test_shutdown_lets_running_requests_finish_and_takes_no_new_ones():
    with live_server() as server:
        server.engine.may_go_on.clear()
        stream = server.client().completions.create(**TEXT, max_tokens=5, stream=True)
        kept = server.plain()
        kept.get("/health")
        server.http.handle_exit(signal.SIGTERM, None)
        server.engine.may_go_on.set()
        assert "".join(chunk.choices[0].text for chunk in stream) == "one"
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert server.engine.is_closed
        with pytest.raises(httpx.TransportError):
            server.plain().get("/health")


def test_a_closing_server_says_so():
    with live_server() as server:
        server.api.is_closing = True
        with pytest.raises(openai.InternalServerError) as refused:
            server.client().completions.create(**TEXT)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "10"
        assert server.plain().get("/health").status_code == 503


def test_health_is_lost_with_the_engine():
    with live_server() as server:
        server.engine.failure = RuntimeError("the device is gone")
        reply = server.plain().get("/health")
        assert (reply.status_code, reply.json()) == (
            503,
            {"status": "failed", "reason": "the engine crashed"},
        )


def test_shutdown_ends_what_does_not_finish_within_the_limit_and_tells_the_client():
    with live_server(holds_at=1, shutdown_timeout_s=0.2) as server:
        stream = server.client().completions.create(model=MODEL, prompt="one two", stream=True)
        next(iter(stream))
        for _ in range(2):  # a signal may come twice
            server.http.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down and has ended this request"):
            list(stream)
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert not server.http.force_exit
