"""Events wake their run once a step; a run that is behind gets all at once; chunks are JSON."""

from __future__ import annotations

import asyncio
import json

import pytest

from nanoflow_tune.runtime.choice import Choice, ChoiceDelta, TokenRecord
from nanoflow_tune.runtime.generation_run import Arrivals, EventBridge, GenerationRun
from nanoflow_tune.runtime.metrics import ServerMetrics
from nanoflow_tune.runtime.openai_replies import (
    ChatFormat,
    CompletionFormat,
    ReplyHeader,
    WholeChoice,
)
from nanoflow_tune.runtime.reply_stream import events
from nanoflow_tune.runtime.sequence import (
    EngineStats,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)


class HandEngine:
    """Hands out what a test tells it to."""

    def __init__(self):
        self.listeners, self.cancelled = {}, []

    def submit(self, request, on_event):
        self.listeners[request.request_id] = on_event

    def cancel(self, request_id):
        self.cancelled.append(request_id)

    def tokens(self, name, *ids):
        for token_id in ids:
            self.listeners[name](TokenEvent(request_id=name, token_id=token_id))

    def end(self, name, reason="length"):
        event = FinishEvent(
            request_id=name, reason=reason, num_prompt_tokens=1, num_generated_tokens=0
        )
        self.listeners[name](event)


class Loop:
    """Keeps what is to be called instead of calling it."""

    def __init__(self):
        self.soon, self.later = [], []

    def call_soon_threadsafe(self, call):
        self.soon.append(call)

    def call_later(self, _, call):
        self.later.append(call)


def _header(**options):
    defaults = {
        "id": "cmpl-1",
        "created": 7,
        "model": 'a "model"',
        "system_fingerprint": "fp",
        "token_bytes": None,
        "has_logprobs": False,
        "has_token_ids": True,
        "has_usage_chunk": False,
    }
    return ReplyHeader(**(defaults | options))


def _run(engine, *names):
    choices = []
    for index, name in enumerate(names):
        sampling = SamplingParams(max_tokens=9)
        request = GenerationRequest(
            request_id=name, prompt_token_ids=(1,), sampling=sampling, arrival_s=0.0
        )
        choices.append(Choice(index, request, end_token_ids=(), decode=None))
    bridge = EventBridge(asyncio.get_running_loop())
    return GenerationRun(engine, bridge, ServerMetrics(EngineStats), choices)


async def _settle():
    for _ in range(3):
        await asyncio.sleep(0)


def _chunks(sent):
    return [json.loads(e[6:]) for e in sent.split(b"\n\n") if e.startswith(b"data: {")]


def test_a_step_wakes_the_loop_once_and_many_tokens_are_gathered_first():
    loop, arrivals = Loop(), [Arrivals() for _ in range(40)]
    bridge = EventBridge(loop)
    listeners = [bridge.listener(one, 0) for one in arrivals]
    event = TokenEvent(request_id="r", token_id=1)

    def step():
        for listener in listeners:
            listener(event)

    step()
    assert (len(loop.soon), len(loop.later)) == (1, 0)
    loop.soon.pop()()  # few before: they are delivered at once
    step()
    loop.soon.pop()()
    assert len(loop.later) == 1
    step()  # while they are gathered, nobody wakes the loop again
    assert not loop.soon
    loop.later.pop()()
    for one in arrivals:
        assert asyncio.run(one.take()) == [(0, event)] * 3
    listeners[0](event)
    loop.soon.pop()()
    loop.later.pop()()
    listeners[0](event)
    loop.soon.pop()()
    assert not loop.later  # a stream alone never waits
    assert asyncio.run(arrivals[0].take()) == [(0, event)] * 2


def test_a_taker_that_left_is_not_waited_for():
    async def run():
        arrivals = Arrivals()
        taker = asyncio.ensure_future(arrivals.take())
        await _settle()
        taker.cancel()
        arrivals.add(0, "a")
        with pytest.raises(asyncio.CancelledError):
            await taker
        assert await arrivals.take() == [(0, "a")]

    asyncio.run(run())


def test_a_stream_that_keeps_up_gets_each_token_and_one_behind_all_at_once():
    async def run():
        engine = HandEngine()
        sent = events(_run(engine, "r"), CompletionFormat(_header()), 1)
        engine.tokens("r", 3)
        assert [c["choices"][0]["token_ids"] for c in _chunks(await anext(sent))] == [[3]]
        engine.tokens("r", 4)
        await _settle()
        engine.tokens("r", 5, 6)
        await _settle()
        assert [c["choices"][0]["token_ids"] for c in _chunks(await anext(sent))] == [[4, 5, 6]]
        engine.tokens("r", 7)
        engine.end("r")
        last = await anext(sent)
        (chunk,) = _chunks(last)
        assert chunk["choices"][0]["token_ids"] == [7]
        assert chunk["choices"][0]["finish_reason"] == "length"
        assert last.endswith(b"data: [DONE]\n\n")  # with the last token, not in a write of its own
        assert [rest async for rest in sent] == []

    asyncio.run(run())


def test_choices_that_move_together_share_a_write_and_an_error_ends_all():
    async def run():
        engine = HandEngine()
        sent = events(_run(engine, "a", "b"), ChatFormat(_header()), 1)
        assert len(_chunks(await anext(sent))) == 2  # who speaks, for both
        engine.tokens("a", 3)
        engine.tokens("b", 4)
        first, second = (c["choices"][0] for c in _chunks(await anext(sent)))
        assert (first["index"], first["token_ids"]) == (0, [3])
        assert (second["index"], second["token_ids"]) == (1, [4])
        engine.tokens("a", 5)
        engine.end("b", "error")
        chunk, failure = _chunks(await anext(sent))
        assert chunk["choices"][0]["token_ids"] == [5]
        assert failure["error"]["type"] == "server_error"
        assert [rest async for rest in sent] == []

    asyncio.run(run())


TEXTS = ["", "plain", 'quotes " and \\ and \n and "token_ids":[1]', "\u20ac \U0001f600"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("has_logprobs", [False, True])
@pytest.mark.parametrize("has_usage", [False, True])
def test_chunks_have_the_fields_of_a_whole_reply(text, has_logprobs, has_usage):
    header = _header(has_logprobs=has_logprobs, has_usage_chunk=has_usage)
    record = TokenRecord(token_id=3, text_offset=0, logprob=-0.5, top_logprobs=((3, -0.5),))
    records = (record,) * has_logprobs
    delta = ChoiceDelta(index=2, text=text, token_ids=(3, 4), records=records, finish_reason="stop")
    whole = WholeChoice(2)
    whole.add(delta)
    completion = CompletionFormat(header)
    (chunk,) = _chunks(completion.chunks(delta))
    expected = completion.reply([whole], {}) | {"usage": None}
    assert chunk == {k: v for k, v in expected.items() if k != "usage" or has_usage}
    chat = ChatFormat(header)
    content, end = (c["choices"][0] for c in _chunks(chat.chunks(delta)))
    (said,) = chat.reply([whole], {})["choices"]
    assert content["delta"] == {"content": said["message"]["content"]}
    assert (content["logprobs"], content["token_ids"]) == (said["logprobs"], said["token_ids"])
    assert content["finish_reason"] is None
    assert (end["delta"], end["finish_reason"], end["index"]) == ({}, "stop", 2)
