"""One answer in the making: events of an engine request become text, log-probabilities, an end.

Streaming and whole replies go through the same `Choice`, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .sequence import Event, FinishReason, GenerationRequest, TokenEvent
from .text_stream import IncrementalText, StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """What is reported of one token that has part in the text."""

    token_id: int
    text_offset: int
    """Characters of this choice's text before the token's own."""
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(slots=True, kw_only=True)  # frozen ones take three times as long to make
class ChoiceDelta:
    """What some events added to a choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """All new tokens, the one that ended the request included."""
    records: tuple[TokenRecord, ...]
    """Of the tokens with log-probabilities whose text is out; those of an end token or a stop
    string are never."""
    finish_reason: FinishReason | None
    message: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether a client would learn nothing from it."""
        return not (self.text or self.token_ids or self.records or self.finish_reason)


class Choice:
    """State of one answer: index, request, what it has come to so far."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        *,
        end_token_ids: Iterable[int],
        decode: Callable[[Sequence[int]], str] | None,
        stops: Sequence[str] = (),
    ) -> None:
        """Start empty.

        Args:
            index: place in the reply.
            request: what the engine was asked.
            end_token_ids: the model's end-of-sequence tokens.
            decode: text of some tokens; None without a tokenizer: the text stays empty.
            stops: stop strings.
        """
        self.index = index
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.message = ""
        self.num_generated_tokens = 0
        self.is_engine_done = False
        """The engine has said its last word: there is nothing to cancel."""
        ends = {*end_token_ids, *request.sampling.stop_token_ids}
        self._ends = frozenset[int]() if request.sampling.ignore_eos else frozenset(ends)
        self._text = None if decode is None else IncrementalText(decode, request.prompt_token_ids)
        self._stop = StopMatcher(stops)
        self._num_decoded = 0
        self._num_given = 0
        self._pending: list[TokenRecord] = []

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def needs_cancel(self) -> bool:
        """A stop string ended it, and the engine does not know yet."""
        return self.is_finished and not self.is_engine_done

    def push(self, events: Iterable[Event]) -> ChoiceDelta:
        """Take some events in order; those after the end are dropped."""
        text, token_ids = "", list[int]()
        for event in events:
            if isinstance(event, TokenEvent):
                if self.finish_reason is None:
                    token_ids.append(event.token_id)
                    text += self._token(event)
                continue
            self.is_engine_done = True
            if not self.is_finished:
                text += self._rest()
                self._finish("stop" if self._stop.matched is not None else event.reason)
                self.message = event.message
        self._num_given += len(text)
        return ChoiceDelta(
            index=self.index,
            text=text,
            token_ids=tuple(token_ids),
            records=self._release(),
            finish_reason=self.finish_reason,
            message=self.message,
        )

    def _token(self, event: TokenEvent) -> str:
        self.num_generated_tokens += 1
        if event.token_id in self._ends:
            return ""
        if event.logprob is not None:  # somebody asked, so somebody will read it
            record = TokenRecord(
                token_id=event.token_id,
                text_offset=self._num_decoded,
                logprob=event.logprob,
                top_logprobs=event.top_logprobs,
            )
            self._pending.append(record)
        if self._text is None:
            return ""
        new = self._text.push(event.token_id)
        self._num_decoded += len(new)
        given = self._stop.push(new)
        if self._stop.matched is not None:
            self._finish("stop")
        return given

    def _rest(self) -> str:
        """What decoder and stop matcher held back, now that the engine has ended the request."""
        if self._text is None:
            return ""
        return self._stop.push(self._text.flush()) + self._stop.flush()

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason

    def _release(self) -> tuple[TokenRecord, ...]:
        if not self._pending:
            return ()
        is_cut = self._stop.matched is not None
        if self._text is None or (self.is_finished and not is_cut):
            out = len(self._pending)
        else:
            out = sum(record.text_offset < self._num_given for record in self._pending)
        released, self._pending = self._pending[:out], self._pending[out:]
        return tuple(released)
