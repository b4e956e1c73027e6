"""What stands before the routes: the API key and the size of bodies, and the shape of errors.

Both are checked before a body is read, so that nobody without the key can make the server hold one.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GUARDED = "/v1"
"""Only paths below it want the key: `/health` and `/metrics` are for probes."""

_NO_OBJECT = ("missing", "dict_type", "model_type", "model_attributes_type")


class ApiError(HTTPException):
    """An error reply in OpenAI's shape.

    An HTTPException, since FastAPI makes something else of others met while it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Describe the reply.

        Args:
            status: HTTP status.
            message: rule, value, remedy.
            code: OpenAI's word for it, where there is one.
            param: the parameter at fault.
            retry_after_s: when to try again; sent in whole seconds, at least one.
        """
        super().__init__(status, message)
        self.code, self.param, self.retry_after_s = code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {
            "message": self.detail,
            "type": kinds.get(self.status_code, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The reply itself."""
        headers = dict[str, str]()
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status_code, headers)


async def on_api_error(_: Request, err: Exception) -> JSONResponse:
    """Reply to our own errors."""
    assert isinstance(err, ApiError)
    return err.response()


async def on_invalid_body(_: Request, err: Exception) -> JSONResponse:
    """Reply to a body that breaks the schema: one thing that is wrong, the most precise one."""
    assert isinstance(err, RequestValidationError)
    # Of the forms that a parameter may have, the one meant is that which fits furthest.
    error = max(err.errors(), key=lambda error: len(error["loc"]))
    place = [str(part) for part in error["loc"][1:] if not _is_form(part)]
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "this server does not know this parameter; leave it out"
    elif error["type"] == "json_invalid":
        message, place = f"the body is no JSON: {error['ctx']['error']}", []
    elif error["type"] in _NO_OBJECT and not place:
        message = "the body must be a JSON object, sent as `Content-Type: application/json`"
    where = f"`{'.'.join(place)}`: " if place else ""
    return ApiError(400, where + message, param=place[0] if place else None).response()


def _is_form(part: int | str) -> bool:
    """Whether a step of pydantic's path names one of several types, and no parameter."""
    return isinstance(part, str) and ("[" in part or part.removeprefix("constrained-") == "str")


async def on_http_error(_: Request, err: Exception) -> JSONResponse:
    """Reply to unknown paths and methods."""
    assert isinstance(err, HTTPException)
    return ApiError(err.status_code, str(err.detail)).response()


async def on_crash(_: Request, err: Exception) -> JSONResponse:
    """Reply to errors of ours without their details; the log has the traceback."""
    return ApiError(500, "the server met an error of its own; its log says which").response()


class Guard:
    """ASGI middleware: refuses a wrong key and a body that is too large."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        """Stand before an application.

        Args:
            app: the routes.
            api_key: None lets everybody in.
            max_body_bytes: of one request.
        """
        self._app = app
        self._key_digest = None if api_key is None else _digest(api_key.encode())
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or reply to it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            length = headers.get(b"content-length", b"0")
            self._check_length(int(length) if length.isdigit() else 0)
        except ApiError as err:
            await err.response()(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _check_key(self, path: str, authorization: bytes) -> None:
        if self._key_digest is None or not path.startswith(GUARDED):
            return
        scheme, _, key = authorization.partition(b" ")
        # Digests have one length, so the time of the comparison tells nothing of the key.
        is_right = secrets.compare_digest(_digest(key.strip()), self._key_digest)
        if scheme.lower() != b"bearer" or not is_right:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise ApiError(
                413,
                f"the body must have at most {self._max_body_bytes} bytes, but has {num_bytes} or "
                "more; send less at a time",
                code="request_too_large",
            )

    def _counted(self, receive: Receive) -> Receive:
        """For bodies sent in chunks, whose length no header tells."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            self._check_length(total)
            return message

        return counted


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
