"""The HTTP application: OpenAI's completions and chat on an engine, `/health` and `/metrics`.

    body -> openai_schema -> Choices -> GenerationRun (engine) -> openai_replies -> JSON or events

A client that goes away cancels what the engine does for it. Errors have OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .chat_text import ChatText
from .choice import Choice
from .generation_run import EventBridge, GenerationRun, ServingEngine
from .gpu_failures import GpuFailureError
from .http_guard import ApiError, Guard, on_api_error, on_crash, on_http_error, on_invalid_body
from .metrics import ServerMetrics
from .openai_replies import ChatFormat, CompletionFormat, Json, ReplyFormat, ReplyHeader, usage
from .openai_schema import MAX_CHOICES, ChatBody, CompletionBody, GenerationBody
from .reply_stream import EventStream, collect, events, num_generated, unless_gone
from .sequence import GenerationRequest, RequestRejected

_RETRY_WHEN_CLOSING_S = 10.0
_MAX_SEED = 2**63
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions:
    """What an operator decides about the API."""

    model_name: str
    """The name that clients ask for."""
    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    system_fingerprint: str = ""
    """Names the plan: with it, a seed gives the same tokens again."""


class OpenAiApi:
    """The routes, bound to an engine and a tokenizer."""

    def __init__(self, engine: ServingEngine, text: ChatText | None, options: ApiOptions) -> None:
        """Serve an engine that has been started.

        Args:
            engine: closed when the application shuts down.
            text: None without a tokenizer: prompts are token ids then, and so are answers.
            options: what the operator decided.
        """
        self.metrics = ServerMetrics(lambda: engine.stats)
        self.is_closing = False
        """No request is taken any more."""
        self._engine = engine
        self._text = text
        self._options = options
        self._created_s = int(time.time())
        self._bridge: EventBridge | None = None
        # One thread: tokenizing a long prompt must not hold up the streams of others.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(
            title="nanoflow-serve",
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            lifespan=self._lifespan,
        )
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model_id:path}", self.model, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics_page, methods=["GET"])
        app.add_exception_handler(ApiError, on_api_error)
        app.add_exception_handler(RequestValidationError, on_invalid_body)
        app.add_exception_handler(HTTPException, on_http_error)
        app.add_exception_handler(Exception, on_crash)
        app.add_middleware(
            Guard, api_key=self._options.api_key, max_body_bytes=self._options.max_body_bytes
        )
        return app

    @property
    def has_failed(self) -> bool:
        """Whether the engine will never answer again."""
        return self._engine.failure is not None

    def begin_closing(self, timeout_s: float) -> None:
        """Take no more requests and let the engine end; returns at once, may be called twice.

        Args:
            timeout_s: how long running requests may go on before they are cancelled.
        """
        if not self.is_closing:
            self.is_closing = True
            closing = threading.Thread(target=self._engine.close, args=(timeout_s,), daemon=True)
            closing.start()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None, None]:
        self._bridge = EventBridge(asyncio.get_running_loop())
        yield
        self.is_closing = True
        await asyncio.to_thread(self._engine.close, 0.0)  # whoever was waiting has gone by now
        self._tokenizing.shutdown(wait=False)

    async def completions(self, body: CompletionBody, http: Request) -> Response:
        """`POST /v1/completions`."""
        self._check_open(body)
        prompts = [await self._prompt(prompt) for prompt in body.prompts]
        header = self._header(f"cmpl-{uuid.uuid4().hex}", body)
        return await self._answer(body, prompts, CompletionFormat(header), http)

    async def chat_completions(self, body: ChatBody, http: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self._check_open(body)
        text = self._text
        if text is None:
            raise ApiError(
                400,
                "this server has no tokenizer, so it cannot chat: use /v1/completions with token "
                "ids, or serve a folder with `tokenizer.json`",
            )
        messages = [message.as_template_input() for message in body.messages]
        prompt = await self._in_thread(lambda: text.encode_chat(messages), "messages")
        header = self._header(f"chatcmpl-{uuid.uuid4().hex}", body)
        return await self._answer(body, [prompt], ChatFormat(header), http)

    async def models(self) -> Json:
        """`GET /v1/models`."""
        return {"object": "list", "data": [self._model_card()]}

    async def model(self, model_id: str) -> Json:
        """`GET /v1/models/NAME`."""
        self._check_model(model_id)
        return self._model_card()

    async def health(self) -> Response:
        """`GET /health`: 200 while requests are taken; what failed, in a few words."""
        failure = self._engine.failure
        if failure is not None:
            reason = failure.cause if isinstance(failure, GpuFailureError) else "the engine crashed"
            return JSONResponse({"status": "failed", "reason": reason}, 503)
        status = "closing" if self.is_closing else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics_page(self, http: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        page, content_type = self.metrics.exposition(http.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})

    def _check_open(self, body: GenerationBody) -> None:
        if self.is_closing:
            raise ApiError(
                503,
                "the server is shutting down; send the request to another one",
                code="shutting_down",
                retry_after_s=_RETRY_WHEN_CLOSING_S,
            )
        self._check_model(body.model)
        if body.stops and self._text is None:
            raise ApiError(
                400,
                "`stop` needs a tokenizer, and this server has none; use `stop_token_ids`",
                param="stop",
            )

    def _check_model(self, name: str) -> None:
        if name != self._options.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self._options.model_name!r}",
                code="model_not_found",
                param="model",
            )

    def _model_card(self) -> Json:
        return {
            "id": self._options.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "nanoflow-tune",
            "max_model_len": self._engine.max_model_len,
        }

    async def _prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            size = self._engine.vocab_size
            if (largest := max(prompt)) >= size:
                raise ApiError(
                    400,
                    f"`prompt`: token ids must be below {size}, but got {largest}",
                    param="prompt",
                )
            return tuple(prompt)
        text = self._text
        if text is None:
            raise ApiError(
                400,
                "`prompt` must be token ids, since this server has no tokenizer; serve a folder "
                "with `tokenizer.json` for text",
                param="prompt",
            )
        return await self._in_thread(lambda: text.encode(prompt), "prompt")

    async def _in_thread(self, work: Callable[[], ResultT], param: str) -> ResultT:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        except ValueError as err:
            raise ApiError(400, f"`{param}`: {err}", param=param) from err

    def _header(self, reply_id: str, body: GenerationBody) -> ReplyHeader:
        return ReplyHeader(
            id=reply_id,
            created=int(time.time()),
            model=body.model,
            system_fingerprint=self._options.system_fingerprint,
            token_bytes=None if self._text is None else self._text.token_bytes,
            has_logprobs=body.num_logprobs is not None,
            has_token_ids=body.return_token_ids or self._text is None,
            has_usage_chunk=body.includes_usage,
        )

    async def _answer(
        self,
        body: GenerationBody,
        prompts: Sequence[tuple[int, ...]],
        form: ReplyFormat,
        http: Request,
    ) -> Response:
        assert self._bridge is not None, "the application's lifespan has not started"
        choices = self._choices(body, prompts, form.header.id)
        try:
            run = GenerationRun(self._engine, self._bridge, self.metrics, choices)
        except RequestRejected as err:
            raise _rejection(err) from err
        num_prompt_tokens = sum(map(len, prompts))
        headers = {"X-Request-Id": form.header.id}
        if body.stream:
            content = events(run, form, num_prompt_tokens)
            return EventStream(content, run.close, headers)
        try:
            whole = await unless_gone(collect(run), http)
        finally:
            run.close()
        if whole is None:
            return Response(status_code=499)  # nobody reads it
        counts = usage(num_prompt_tokens, num_generated(run))
        return JSONResponse(form.reply(whole, counts), headers=headers)

    def _choices(
        self, body: GenerationBody, prompts: Sequence[tuple[int, ...]], reply_id: str
    ) -> list[Choice]:
        if len(prompts) * body.num_choices > MAX_CHOICES:
            raise ApiError(
                400,
                f"prompts times `n` must be at most {MAX_CHOICES}, but got {len(prompts)} x "
                f"{body.num_choices}; send several requests",
                param="n",
            )
        return [
            self._choice(body, prompt, place * body.num_choices + number, number, reply_id)
            for place, prompt in enumerate(prompts)
            for number in range(body.num_choices)
        ]

    def _choice(
        self, body: GenerationBody, prompt: tuple[int, ...], index: int, number: int, reply_id: str
    ) -> Choice:
        limit = self._engine.max_model_len
        room = limit - len(prompt)
        asked = body.most_tokens
        if room < (asked or 1):
            wanted = "an answer" if asked is None else f"{asked} tokens to generate"
            raise ApiError(
                413,
                f"prompt and answer must have at most {limit} tokens together, but the prompt has "
                f"{len(prompt)} and leaves no room for {wanted}; shorten it",
                code="context_length_exceeded",
            )
        if not prompt:
            raise ApiError(400, "`prompt`: it has no tokens; send at least one", param="prompt")
        try:
            sampling = body.sampling(room, _choice_seed(body.seed, number))
        except ValueError as err:
            raise ApiError(400, str(err)) from err
        request = GenerationRequest(
            request_id=f"{reply_id}-{index}",
            prompt_token_ids=prompt,
            sampling=sampling,
            arrival_s=time.perf_counter(),
        )
        return Choice(
            index,
            request,
            end_token_ids=self._engine.eos_token_ids,
            decode=None if self._text is None else self._text.decode,
            stops=body.stops,
        )


def _choice_seed(seed: int | None, number: int) -> int | None:
    """Seeds of a request's choices: the first has the request's, so that `n` does not change it."""
    if seed is None:
        return None
    if number == 0:
        return seed % _MAX_SEED
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % _MAX_SEED


def _rejection(err: RequestRejected) -> ApiError:
    codes = {413: "context_length_exceeded", 429: "queue_full", 503: "shutting_down"}
    return ApiError(
        err.status,
        err.message,
        code=codes.get(err.status),
        retry_after_s=err.retry_after_s,
    )
