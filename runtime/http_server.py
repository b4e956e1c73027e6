"""uvicorn with a shutdown that operators expect: SIGTERM ends requests in peace and exits with 0.

On the first signal no request is taken any more and running ones may finish within a limit; on the
second all end at once.
"""

from __future__ import annotations

from types import FrameType

import uvicorn

from .openai_api import OpenAiApi

_KEEP_ALIVE_S = 30


class HttpServer(uvicorn.Server):
    """Serves one `OpenAiApi`."""

    def __init__(
        self, api: OpenAiApi, *, host: str, port: int, shutdown_timeout_s: float, log_level: str
    ) -> None:
        """Set up; `run()` serves until a signal comes or `should_exit` is set.

        Args:
            api: what to serve.
            host: address to listen on.
            port: 0 takes a free one, see `bound_port`.
            shutdown_timeout_s: how long running requests may go on after a signal.
            log_level: uvicorn's.
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
                timeout_graceful_shutdown=max(1, round(shutdown_timeout_s)),
            )
        )
        self._api = api

    @property
    def bound_port(self) -> int:
        """The port it listens on, once `started`."""
        return self.servers[0].sockets[0].getsockname()[1]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal.

        uvicorn's own handler raises the signal again after the shutdown, so that the process
        would end by it and not with 0.
        """
        self._api.is_closing = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
