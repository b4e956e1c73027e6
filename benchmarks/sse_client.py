"""A streamed completion as a client sees it, read as cheaply as it can be done exactly.

A client that parses every chunk is the limit long before a GPU is: at 12,000 tokens/s it has 80 us
for each. Here a chunk costs a few: HTTP's chunks are taken off, and the token ids in an event are
counted where they stand. Quotes inside JSON strings are escaped, so `"token_ids":[` can be nothing
else. One connection a request.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

_TOKEN_IDS = re.compile(rb'"token_ids": ?\[([^\]]*)\]')
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_EVENT_END = b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server takes completions."""

    url: str
    """http://HOST:PORT, without a slash at its end."""
    key: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def post(self, body: bytes) -> bytes:
        """A request for a completion, as it goes over the wire."""
        authorization = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        return (
            f"POST /v1/completions HTTP/1.1\r\nhost: {urlsplit(self.url).netloc}\r\n"
            f"{authorization}content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        ).encode() + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What came of one request; times on the clock of `time.perf_counter`."""

    sent_s: float
    first_token_s: float
    """nan without a token."""
    end_s: float
    num_tokens: int
    error: str = ""
    """Why it is not whole; empty for a reply that ended as it should."""


class StreamReader:
    """Takes the bytes of one reply as they come."""

    def __init__(self) -> None:
        """Start before the status line."""
        self.num_tokens = 0
        self.first_token_s = math.nan
        self.error = ""
        self.is_whole = False
        """The reply's last chunk has come."""
        self._status = 0
        self._is_chunked = False
        self._raw = b""
        self._body = b""
        """Of events: what has no end yet. Of an error: all."""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take what came at some time."""
        self._raw = self._raw + data if self._raw else data
        if not self._status and not self._read_head():
            return
        if self._is_chunked:
            self._read_chunks()
        else:
            self._body, self._raw = self._body + self._raw, b""
        if self._status == 200:
            self._count(now_s)

    def close(self) -> None:
        """The connection has ended: say what is missing."""
        if self._status not in (0, 200):
            self.error = f"{self._status}: {self._body.decode(errors='replace')[:300]}"
        elif not self.error and not self.is_whole:
            self.error = "the connection ended before the reply did"

    def _read_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            return False
        status = _STATUS.match(head)
        self._status = int(status[1]) if status else 599
        self._is_chunked = b"transfer-encoding: chunked" in head.lower()
        self._raw = rest
        return True

    def _read_chunks(self) -> None:
        raw, at, parts = self._raw, 0, [self._body]
        while (line_end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:line_end].partition(b";")[0], 16)
            start = line_end + 2
            if len(raw) < start + size + 2:
                break
            self.is_whole = self.is_whole or size == 0
            parts.append(raw[start : start + size])
            at = start + size + 2
        self._raw, self._body = raw[at:], b"".join(parts)

    def _count(self, now_s: float) -> None:
        end = self._body.rfind(_EVENT_END) + len(_EVENT_END)
        if end < len(_EVENT_END):
            return
        events, self._body = self._body[:end], self._body[end:]
        for ids in _TOKEN_IDS.findall(events):
            if ids:
                if not self.num_tokens:
                    self.first_token_s = now_s
                self.num_tokens += ids.count(b",") + 1
        if b'data: {"error"' in events:
            self.error = next(
                str(json.loads(event[6:])["error"])
                for event in events.split(_EVENT_END)
                if event.startswith(b'data: {"error"')
            )


class _Connection(asyncio.Protocol):
    """One reply's connection; `ended` is done when it is."""

    def __init__(self, reader: StreamReader, ended: asyncio.Future[float]) -> None:
        self._reader, self._ended = reader, ended
        self._last_s = math.nan

    def data_received(self, data: bytes) -> None:
        self._last_s = time.perf_counter()
        self._reader.feed(data, self._last_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._reader.close()
        if not self._ended.done():
            self._ended.set_result(self._last_s)


async def stream(endpoint: Endpoint, request: bytes) -> Streamed:
    """Send a request (`Endpoint.post`) and follow its reply to the end."""
    loop = asyncio.get_running_loop()
    reader, ended = StreamReader(), loop.create_future()
    sent_s = time.perf_counter()
    try:
        host, port = endpoint.address
        transport, _ = await loop.create_connection(lambda: _Connection(reader, ended), host, port)
        sent_s = time.perf_counter()
        transport.write(request)
        end_s = await ended
    except OSError as err:
        reader.error, end_s = f"{type(err).__name__}: {err}", time.perf_counter()
    return Streamed(
        sent_s=sent_s,
        first_token_s=reader.first_token_s,
        end_s=end_s,
        num_tokens=reader.num_tokens,
        error=reader.error,
    )
