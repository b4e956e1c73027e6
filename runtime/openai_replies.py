"""Writes choices as the OpenAI API does: completions and chat, whole and as stream chunks.

Without a tokenizer texts are empty and each choice carries its `token_ids`; tokens are then named
`token_id:N` where log-probabilities name them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .choice import ChoiceDelta, TokenRecord

TokenBytes = Callable[[int], bytes]
Json = dict[str, Any]


@dataclass(slots=True)
class WholeChoice:
    """All deltas of one choice together."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    records: list[TokenRecord] = field(default_factory=list[TokenRecord])
    finish_reason: str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.records += delta.records
        self.finish_reason = delta.finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHeader:
    """What every reply and chunk of one request repeats."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    token_bytes: TokenBytes | None
    """None: no tokenizer."""
    has_logprobs: bool
    has_token_ids: bool
    has_usage_chunk: bool

    def fields(self, kind: str) -> Json:
        """The outer fields of a reply of some kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class ReplyFormat(Protocol):
    """One endpoint's way of writing choices."""

    header: ReplyHeader

    def opening(self, num_choices: int) -> bytes:
        """Events before any token."""
        ...

    def chunks(self, delta: ChoiceDelta) -> bytes:
        """Events that tell of a delta."""
        ...

    def usage_chunk(self, usage: Json) -> bytes:
        """The last chunk of a stream whose client asked for token counts."""
        ...

    def reply(self, choices: Sequence[WholeChoice], usage: Json) -> Json:
        """The whole reply."""
        ...


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def sse_event(content: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + _compact(content).encode() + b"\n\n"


class _Chunk:
    """What all chunks of a stream have in common, written once.

    A stream has a chunk for each token, and writing the whole object for each would cost more than
    all else that a token takes.
    """

    def __init__(self, header: ReplyHeader, kind: str) -> None:
        self._head = f'data: {_compact(header.fields(kind))[:-1]},"choices":['
        self._tail = "]{}}}\n\n".format(',"usage":null' if header.has_usage_chunk else "")

    def event(self, choice: str) -> bytes:
        """The event with one choice, given in JSON."""
        return f"{self._head}{choice}{self._tail}".encode()


class CompletionFormat:
    """`/v1/completions`."""

    _KIND = "text_completion"

    def __init__(self, header: ReplyHeader) -> None:
        """Write under this header."""
        self.header = header
        self._chunk = _Chunk(header, self._KIND)

    def opening(self, num_choices: int) -> bytes:
        """Nothing: the first chunk brings the first text."""
        return b""

    def chunks(self, delta: ChoiceDelta) -> bytes:
        """One chunk, with the fields of a whole reply's choice."""
        logprobs = _compact(self._logprobs(delta.records)) if self.header.has_logprobs else "null"
        return self._chunk.event(
            f'{{"index":{delta.index},"text":{json.dumps(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{_word(delta.finish_reason)}{_ids_json(self.header, delta)}}}'
        )

    def usage_chunk(self, usage: Json) -> bytes:
        """No choices, only counts."""
        return sse_event(self.header.fields(self._KIND) | {"choices": [], "usage": usage})

    def reply(self, choices: Sequence[WholeChoice], usage: Json) -> Json:
        """The whole reply."""
        written = [self._choice(choice) for choice in choices]
        return self.header.fields(self._KIND) | {"choices": written, "usage": usage}

    def _choice(self, part: WholeChoice) -> Json:
        return {
            "index": part.index,
            "text": part.text,
            "logprobs": self._logprobs(part.records) if self.header.has_logprobs else None,
            "finish_reason": part.finish_reason,
        } | _token_ids(self.header, part)

    def _logprobs(self, records: Sequence[TokenRecord]) -> Json:
        name = _completion_token_name(self.header.token_bytes)
        return {
            "tokens": [name(record.token_id) for record in records],
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [
                {name(token_id): logprob for token_id, logprob in record.top_logprobs}
                for record in records
            ],
            "text_offset": [record.text_offset for record in records],
        }


class ChatFormat:
    """`/v1/chat/completions`."""

    _KIND, _CHUNK = "chat.completion", "chat.completion.chunk"

    def __init__(self, header: ReplyHeader) -> None:
        """Write under this header."""
        self.header = header
        self._chunk = _Chunk(header, self._CHUNK)

    def opening(self, num_choices: int) -> bytes:
        """One chunk a choice that says who speaks."""
        role = _compact({"role": "assistant", "content": ""})
        return b"".join(self._one(index, role) for index in range(num_choices))

    def chunks(self, delta: ChoiceDelta) -> bytes:
        """The text, then the end."""
        events = b""
        ids = _ids_json(self.header, delta)
        if delta.text or delta.records or (ids and delta.token_ids):
            content = f'{{"content":{json.dumps(delta.text)}}}'
            has_logprobs = self.header.has_logprobs
            logprobs = _compact(self._logprobs(delta.records)) if has_logprobs else "null"
            events = self._one(delta.index, content, logprobs, more=ids)
        if delta.finish_reason is not None:
            events += self._one(delta.index, "{}", reason=_word(delta.finish_reason))
        return events

    def usage_chunk(self, usage: Json) -> bytes:
        """No choices, only counts."""
        return sse_event(self.header.fields(self._CHUNK) | {"choices": [], "usage": usage})

    def reply(self, choices: Sequence[WholeChoice], usage: Json) -> Json:
        """The whole reply."""
        written = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.records),
                "finish_reason": choice.finish_reason,
            }
            | _token_ids(self.header, choice)
            for choice in choices
        ]
        return self.header.fields(self._KIND) | {"choices": written, "usage": usage}

    def _one(
        self, index: int, delta: str, logprobs: str = "null", reason: str = "null", more: str = ""
    ) -> bytes:
        return self._chunk.event(
            f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{reason}{more}}}'
        )

    def _logprobs(self, records: Sequence[TokenRecord]) -> Json | None:
        if not self.header.has_logprobs:
            return None
        return {"content": [self._record(record) for record in records], "refusal": None}

    def _record(self, record: TokenRecord) -> Json:
        return self._token(record.token_id, record.logprob) | {
            "top_logprobs": [self._token(*alternative) for alternative in record.top_logprobs]
        }

    def _token(self, token_id: int, logprob: float | None) -> Json:
        if self.header.token_bytes is None:
            return {"token": f"token_id:{token_id}", "logprob": logprob, "bytes": None}
        token = self.header.token_bytes(token_id)
        text = token.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(token)}


def _compact(content: Json | None) -> str:
    return json.dumps(content, separators=(",", ":"))


def _word(reason: str | None) -> str:
    return "null" if reason is None else f'"{reason}"'


def _ids_json(header: ReplyHeader, delta: ChoiceDelta) -> str:
    """The last field of a choice, where there is one."""
    if not header.has_token_ids:
        return ""
    return f',"token_ids":[{",".join(map(str, delta.token_ids))}]'


def _token_ids(header: ReplyHeader, part: WholeChoice) -> Json:
    return {"token_ids": list(part.token_ids)} if header.has_token_ids else {}


def _completion_token_name(token_bytes: TokenBytes | None) -> Callable[[int], str]:
    """Names of tokens as strings; those that are no whole characters are named by their bytes."""

    def name(token_id: int) -> str:
        if token_bytes is None:
            return f"token_id:{token_id}"
        token = token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    return name
