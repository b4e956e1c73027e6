"""From a run of choices to what goes over the wire: one JSON body, or server-sent events.

Either ends early when the client goes away, and then the engine's work for it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .generation_run import GenerationRun
from .http_guard import ApiError
from .openai_replies import ReplyFormat, WholeChoice, sse_event, usage

ResultT = TypeVar("ResultT")


class EventStream(StreamingResponse):
    """Server-sent events; calls `on_end` when they end or the client goes away."""

    def __init__(
        self, content: AsyncIterator[bytes], on_end: Callable[[], None], headers: dict[str, str]
    ) -> None:
        """Send some events under some headers."""
        no_cache = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers | no_cache, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def events(
    run: GenerationRun, form: ReplyFormat, num_prompt_tokens: int
) -> AsyncIterator[bytes]:
    """The events of a streamed reply.

    Args:
        run: of the request.
        form: how to write.
        num_prompt_tokens: of all prompts.
    """
    if opening := form.opening(len(run.choices)):
        yield opening
    written = b""
    async for deltas in run.turns():
        written = b""
        for delta in deltas:
            if delta.finish_reason in ("error", "cancelled"):
                failure = _failure(delta.finish_reason, delta.message).body()
                yield written + sse_event(failure)
                return
            written += form.chunks(delta)
        if not run.is_finished:
            yield written
    # The last turn goes out together with what ends the stream.
    if form.header.has_usage_chunk:
        written += form.usage_chunk(usage(num_prompt_tokens, num_generated(run)))
    yield written + b"data: [DONE]\n\n"


async def collect(run: GenerationRun) -> list[WholeChoice]:
    """All choices once they have ended.

    Raises:
        ApiError: the engine failed, or is closing.
    """
    whole = {choice.index: WholeChoice(choice.index) for choice in run.choices}
    async for deltas in run.turns():
        for delta in deltas:
            if delta.finish_reason in ("error", "cancelled"):
                raise _failure(delta.finish_reason, delta.message)
            whole[delta.index].add(delta)
    return list(whole.values())


async def unless_gone(work: Coroutine[Any, Any, ResultT], http: Request) -> ResultT | None:
    """The result of some work; None, and the work ended, when the client has gone away."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


def _failure(reason: str, message: str) -> ApiError:
    if reason == "cancelled":
        return ApiError(503, "the server is shutting down and has ended this request")
    return ApiError(500, message or "the engine could not finish this request")


def num_generated(run: GenerationRun) -> int:
    """Tokens generated for all choices so far."""
    return sum(choice.num_generated_tokens for choice in run.choices)
