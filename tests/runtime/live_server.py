"""The real HTTP application in a thread, on a port of the system's choice, with a fake engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from fake_engine import FakeEngine
from tiny_tokenizer import END, byte_level, fast

from nanoflow_tune.runtime.chat_text import ChatText
from nanoflow_tune.runtime.http_server import HttpServer
from nanoflow_tune.runtime.openai_api import ApiOptions, OpenAiApi

MODEL = "echo"


@dataclass
class LiveServer:
    engine: FakeEngine
    api: OpenAiApi
    http: HttpServer
    thread: threading.Thread
    url: str = ""
    clients: list[Any] = field(default_factory=list)

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 30.0} | options
        client = openai.OpenAI(base_url=f"{self.url}/v1", **options)
        self.clients.append(client)
        return client

    def plain(self) -> httpx.Client:
        client = httpx.Client(base_url=self.url, timeout=30.0)
        self.clients.append(client)
        return client


@contextlib.contextmanager
def live_server(
    *,
    has_tokenizer: bool = True,
    api_key: str | None = None,
    max_body_bytes: int = 8 << 20,
    shutdown_timeout_s: float = 5.0,
    **engine_options: Any,
) -> Iterator[LiveServer]:
    tokenizer = byte_level()
    engine = FakeEngine(
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_ids=(tokenizer.token_to_id(END),),
        **engine_options,
    )
    engine.start()
    text = ChatText(fast(tokenizer)) if has_tokenizer else None
    options = ApiOptions(model_name=MODEL, api_key=api_key, max_body_bytes=max_body_bytes)
    api = OpenAiApi(engine, text, options)
    http = HttpServer(
        api, host="127.0.0.1", port=0, shutdown_timeout_s=shutdown_timeout_s, log_level="warning"
    )
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    server = LiveServer(engine, api, http, thread)
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{http.bound_port}"
    try:
        yield server
    finally:
        engine.may_go_on.set()
        for client in server.clients:
            client.close()
        http.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
