"""The official client against the real HTTP application; the model is an echo (`fake_engine`)."""

from __future__ import annotations

import json

import openai
import pytest
from fake_engine import LOGPROB
from live_server import MODEL, live_server
from tiny_tokenizer import byte_level

TOKENIZER = byte_level()
PROMPT = "the capital of France is Paris"
COUNTING = "one two three four five six seven eight nine ten"
LENGTH = len(TOKENIZER.encode(PROMPT).ids)


@pytest.fixture(scope="module")
def server():
    with live_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def _turned(ids, by):
    return TOKENIZER.decode([ids[(i + by) % len(ids)] for i in range(len(ids))])


def test_a_completion_echoes_and_counts(client):
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (PROMPT, "stop", None)
    assert reply.usage.prompt_tokens == LENGTH
    assert reply.usage.completion_tokens == LENGTH + 1  # with the end token
    assert reply.usage.total_tokens == 2 * LENGTH + 1
    assert reply.id.startswith("cmpl-")
    assert reply._request_id == reply.id


def test_the_default_number_of_tokens_is_that_of_openai(client):
    reply = client.completions.create(model=MODEL, prompt="one two three four five six seven " * 2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 16


def test_a_chat_follows_the_template(client):
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
            },
        ],
    )
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    # The echo gives the rendered conversation back; special tokens have no text.
    assert choice.message.content == "system\nbe briefuser\nhiassistant\n"
    assert choice.finish_reason == "stop"


def test_a_streamed_completion_is_the_whole_one_in_pieces(client):
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT + " \u20ac", max_tokens=100, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + " \u20ac"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_starts_with_the_role_and_ends_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "user\nhiassistant\n"
    counts = chunks[-1].usage
    assert counts.total_tokens == counts.prompt_tokens + counts.completion_tokens
    assert counts.completion_tokens == counts.prompt_tokens  # less <|end|>, plus the end token
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text_and_the_engines_work(stream):
    with live_server(holds_at=LENGTH) as server:
        reply = server.client().completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=200,
            stop=["zzz", "rance i"],
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        replies = list(reply) if stream else [reply]
        assert "".join(part.choices[0].text for part in replies) == "the capital of F"
        assert replies[-1].choices[0].finish_reason == "stop"
        assert server.engine.wait_until_cancelled(f"{replies[0].id}-0")


def test_logprobs_of_a_completion(client):
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.token_logprobs == [LOGPROB] * 4
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == LOGPROB


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_have_bytes(client, stream):
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "\u20ac"}],
        logprobs=True,
        top_logprobs=1,
        stream=stream,
    )
    parts = list(reply) if stream else [reply]
    records = [r for part in parts for r in _contents(part.choices[0].logprobs)]
    content = "".join(
        (part.choices[0].delta if stream else part.choices[0].message).content or ""
        for part in parts
    )
    text = b"".join(bytes(r.bytes) for r in records if not r.token.startswith("<|")).decode()
    assert text == content
    assert "\u20ac" in text
    assert all(len(r.top_logprobs) == 1 and r.logprob == LOGPROB for r in records)


def _contents(logprobs):
    return [] if logprobs is None else logprobs.content


def test_choices_differ_by_seed_and_repeat_with_it(client):
    def texts(n, seed):
        reply = client.completions.create(
            model=MODEL, prompt=COUNTING, n=n, seed=seed, max_tokens=50
        )
        assert [choice.index for choice in reply.choices] == list(range(n))
        return [choice.text for choice in reply.choices]

    assert texts(3, 7) == texts(3, 7)
    assert texts(1, 7) == texts(3, 7)[:1] == [_turned(TOKENIZER.encode(COUNTING).ids, 7)]
    assert len(set(texts(3, 7))) > 1


def test_several_prompts_give_n_choices_each_in_order(client):
    reply = client.completions.create(model=MODEL, prompt=["one", "two"], n=2, seed=0, max_tokens=9)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [reply.choices[i].text for i in (0, 2)] == ["one", "two"]


def test_streams_of_several_choices_are_told_apart_by_index(client):
    texts = ["", ""]
    for chunk in client.completions.create(model=MODEL, prompt=["one", "two"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["one", "two"]


def test_token_ids_are_taken_and_given_on_request(client):
    ids = TOKENIZER.encode("one two").ids
    reply = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=len(ids), extra_body={"return_token_ids": True}
    )
    assert reply.choices[0].text == "one two"
    assert reply.choices[0].token_ids == ids


def test_sampling_parameters_reach_the_engine(server, client):
    client.completions.create(
        model=MODEL,
        prompt="one",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=-5,
        extra_body={"top_k": 7, "stop_token_ids": [9], "ignore_eos": True},
    )
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.max_tokens, sampling.stop_token_ids, sampling.ignore_eos) == (3, (9,), True)
    assert sampling.seed == 2**63 - 5
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    request = server.engine.submitted[-1]
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)
    assert request.sampling.seed is None


def test_models_health_and_metrics(server, client):
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == (MODEL, 256)
    assert client.models.retrieve(MODEL).id == MODEL
    plain = server.plain()
    assert plain.get("/health").json() == {"status": "ok"}
    client.completions.create(model=MODEL, prompt="one", max_tokens=5)
    page = plain.get("/metrics").text
    assert "nanoflow_kv_pages 100.0" in page
    assert 'nanoflow_plan_in_use{plan="sequential"} 1.0' in page
    assert 'nanoflow_requests_finished_total{reason="stop"}' in page
    assert "nanoflow_time_to_first_token_seconds_count" in page
    openmetrics = plain.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


def test_the_stream_is_server_sent_events(server):
    body = {"model": MODEL, "prompt": "one", "stream": True}
    with server.plain().stream("POST", "/v1/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "text_completion"


def test_without_a_tokenizer_ids_go_in_and_come_out():
    with live_server(has_tokenizer=False) as server:
        client = server.client()
        reply = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=9, logprobs=1)
        (choice,) = reply.choices
        assert (choice.text, choice.token_ids[:3], choice.finish_reason) == ("", [5, 6, 7], "stop")
        assert choice.logprobs.tokens == ["token_id:5", "token_id:6", "token_id:7"]
        chunks = list(client.completions.create(model=MODEL, prompt=[5, 6], stream=True))
        assert [i for chunk in chunks for i in chunk.choices[0].token_ids][:2] == [5, 6]
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.completions.create(model=MODEL, prompt="text")
        with pytest.raises(openai.BadRequestError, match="stop_token_ids"):
            client.completions.create(model=MODEL, prompt=[5], stop="x")
        with pytest.raises(openai.BadRequestError, match="cannot chat"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
