"""Text from tokens as they come: whole characters only, and nothing of a stop string.

`IncrementalText` turns token ids into text that never ends inside a UTF-8 sequence, `StopMatcher`
holds back what may be the start of a stop string. Neither knows a tokenizer or a model: what they
give depends on the tokens alone, not on how many come at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no UTF-8, so also where a sequence is not complete yet."""
CONTEXT_TOKENS = 4
"""Of the prompt, before the first generated token: decoders strip the space of a first word."""
_MAX_WINDOW = 64
"""Tokens decoded anew for each new one, at most; only text without a whole character gets here."""


class IncrementalText:
    """Decodes one sequence piece by piece.

    Each new token is decoded together with the few before it, since its text may depend on them.
    Replacement characters at the end are held back: the next token may complete them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        """Start after a prompt.

        Args:
            decode: text of some tokens, special ones left out.
            context: the prompt, or its end; its text is never given out.
        """
        self._decode = decode
        self._window = list(context[-CONTEXT_TOKENS:])
        self._given = len(decode(self._window)) if self._window else 0
        self._clean = len(self._window)
        """Up to here the window's text was whole; the next window starts there."""

    def push(self, token_id: int) -> str:
        """Text that is certain now; may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        if len(self._window) > _MAX_WINDOW:
            whole = text
        given, self._given = text[self._given : len(whole)], max(self._given, len(whole))
        if len(whole) == len(text):
            self._move_on()
        return given

    def flush(self) -> str:
        """What was held back: the sequence has ended, so it stays broken."""
        return self._decode(self._window)[self._given :]

    def _move_on(self) -> None:
        rest = self._window[self._clean :]
        base = self._decode(rest)
        if base or len(self._window) > _MAX_WINDOW:
            # Not to a window without text: a first word after it would lose its space.
            self._window, self._given = rest, len(base)
        self._clean = len(self._window)


class StopMatcher:
    """Finds the first stop string to be completed, wherever the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Take the stop strings.

        Raises:
            ValueError: an empty one.
        """
        if not all(stops):
            raise ValueError("a stop string must not be empty, but got ''; leave it out")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was met."""

    def push(self, text: str) -> str:
        """Text that belongs to no stop string; after a match, no more."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = next((n for n in self._candidates(text) if self._may_start(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back: the text has ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _candidates(self, text: str) -> range:
        return range(min(self._longest - 1, len(text)), 0, -1)

    def _may_start(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
