"""uvicorn with a shutdown that operators expect: SIGTERM ends requests in peace and exits with 0.

On a signal no request is taken any more, and running ones may finish within a limit; then the
engine cancels them, and their clients are told. A second SIGINT ends all at once.

An engine that failed ends the server too: probes see it for a moment, then whoever supervises the
process starts another one.
"""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from .openai_api import OpenAiApi

_KEEP_ALIVE_S = 30
_LAST_WORDS_S = 5
_UNWELL_S = 3.0
"""How long `/health` tells that the engine failed, before the server ends."""


class HttpServer(uvicorn.Server):
    """Serves one `OpenAiApi`."""

    def __init__(
        self,
        api: OpenAiApi,
        *,
        host: str,
        port: int,
        shutdown_timeout_s: float,
        log_level: str,
        on_start: Callable[[str], None] | None = None,
    ) -> None:
        """Set up; `run()` serves until a signal comes or `should_exit` is set.

        Args:
            api: what to serve.
            host: address to listen on.
            port: 0 takes a free one, see `bound_port`.
            shutdown_timeout_s: how long running requests may go on after a signal.
            log_level: uvicorn's.
            on_start: told the URL when requests are taken.
        """
        super().__init__(
            uvicorn.Config(
                api.app(),
                host=host,
                port=port,
                log_level=log_level,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                # The engine ends all requests at the limit; this is for clients that do not read.
                timeout_graceful_shutdown=math.ceil(shutdown_timeout_s) + _LAST_WORDS_S,
            )
        )
        self._api, self._on_start = api, on_start
        self._shutdown_timeout_s = shutdown_timeout_s
        self._failed_s: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell."""
        await super().startup(sockets)
        if self.started and self._on_start is not None:
            host = self.config.host
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{self.bound_port}")

    @property
    def bound_port(self) -> int:
        """The port it listens on, once `started`."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._api.has_failed:
            self._failed_s = self._failed_s or time.monotonic()
            if time.monotonic() - self._failed_s > _UNWELL_S:
                self._api.begin_closing(0.0)
                self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal.

        uvicorn's own handler raises the signal again after the shutdown, so that the process
        would end by it and not with 0.
        """
        self._api.begin_closing(self._shutdown_timeout_s)
        # SIGTERM may come twice for one wish (process and group): it is never taken for haste.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
