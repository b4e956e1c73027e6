"""The light reader counts tokens as a JSON parser does, however the bytes are cut."""

from __future__ import annotations

import asyncio
import json
import math
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TRICKY = 'a "token_ids":[1,2,3] in a text, and data: {"error"'


@pytest.fixture
def sse_client(load):
    return load("sse_client")


def _event(**choice):
    return b"data: " + json.dumps({"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def _chunked(*parts):
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return HEAD + framed + b"0\r\n\r\n"


EVENTS = [
    _event(text="", token_ids=[]),
    _event(text=TRICKY, token_ids=[7]),
    _event(text="x", token_ids=[8, 9, 10]),
    b": a comment\n\n" + _event(text="y", token_ids=[11, 12]),
    b"data: [DONE]\n\n",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it holds no state
@given(
    cuts=st.lists(st.integers(0, 700), max_size=12),
    chunk_cuts=st.lists(st.integers(1, 400), max_size=6),
)
def test_tokens_are_counted_wherever_the_bytes_are_cut(sse_client, cuts, chunk_cuts):
    whole = b"".join(EVENTS)
    places = sorted({0, *(cut for cut in chunk_cuts if cut < len(whole)), len(whole)})
    wire = _chunked(*(whole[a:b] for a, b in pairwise(places)))
    reader, ends = (
        sse_client.StreamReader(),
        sorted({*(cut for cut in cuts if cut < len(wire)), len(wire)}),
    )
    start, first = 0, math.nan
    for end in ends:
        reader.feed(wire[start:end], float(end))
        if reader.num_tokens and math.isnan(first):
            first = float(end)
        start = end
    reader.close()
    assert (reader.num_tokens, reader.error, reader.is_whole) == (6, "", True)
    assert reader.first_token_s == first


def test_a_reply_that_is_not_whole_says_so(sse_client):
    cut = sse_client.StreamReader()
    cut.feed(_chunked(*EVENTS)[:-5], 1.0)
    cut.close()
    assert cut.num_tokens == 6
    assert "before the reply did" in cut.error
    nothing = sse_client.StreamReader()
    nothing.close()
    assert "before the reply did" in nothing.error


def test_errors_are_told_whether_they_come_at_once_or_in_the_stream(sse_client):
    refused = sse_client.StreamReader()
    body = b'{"error":{"message":"the queue is full"}}'
    refused.feed(b"HTTP/1.1 429 x\r\ncontent-length: %d\r\n\r\n" % len(body) + body, 1.0)
    refused.close()
    assert refused.error.startswith("429: ")
    assert "the queue is full" in refused.error
    failed = sse_client.StreamReader()
    failed.feed(_chunked(EVENTS[1], b'data: {"error":{"message":"a rank died"}}\n\n'), 1.0)
    failed.close()
    assert "a rank died" in failed.error


def test_a_request_is_sent_with_its_key_and_the_reply_followed_to_its_end(sse_client):
    seen = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append((head, await reader.readexactly(2)))
        writer.write(_chunked(*EVENTS))
        writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        endpoint = sse_client.Endpoint(url=f"http://127.0.0.1:{port}", key="k")
        found = await sse_client.stream(endpoint, endpoint.post(b"{}"))
        server.close()
        return found, await sse_client.stream(endpoint, endpoint.post(b"{}"))

    found, unheard = asyncio.run(run())
    assert (found.num_tokens, found.error) == (6, "")
    assert found.sent_s <= found.first_token_s <= found.end_s
    assert "ConnectionRefusedError" in unheard.error
    ((head, body),) = seen
    assert b"authorization: Bearer k\r\n" in head
    assert b"content-length: 2\r\n" in head
    assert body == b"{}"
