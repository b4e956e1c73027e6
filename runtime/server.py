"""`nanoflow-serve`: a plan and a checkpoint behind the OpenAI API.

    nanoflow-serve --plan plan.yaml --weights DIR

The API key, where one is wanted, comes from NANOFLOW_API_KEY or a file: arguments can be seen by
every user of the machine. The URL is printed when requests are taken.
Exit codes: 0 shut down as asked (SIGTERM, SIGINT), 1 crash, 2 bad input, 5 a GPU failed: its memory
ran out, a rank died, or a step did not end.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import ipaddress
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .gpu_failures import GPU_FAILED, GpuFailureError, StalledStepError

if TYPE_CHECKING:
    from .chat_text import ChatText
    from .engine import Engine
    from .serving_setup import RankSetting

DONE, CRASH, BAD_INPUT = 0, 1, 2
KEY_VARIABLE = "NANOFLOW_API_KEY"
_SWITCH_S = 2e-4
"""The engine's thread gives the interpreter away at each of its launches; by Python's default of
5 ms, a thread that writes replies would let it wait for longer than a step takes."""
_NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "transformers", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    options = build_parser().parse_args(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(
            f"serving needs {', '.join(missing)}: install them with "
            "`pip install 'nanoflow-tune[serve]'` (or `'.[serve]'` in a checkout)"
        )
    try:
        _serve(options)
    except ValueError as err:
        if options.log_level == "debug":
            traceback.print_exc()
        return _refuse(str(err))
    except GpuFailureError as err:
        if options.log_level == "debug":
            traceback.print_exc()
        _say(f"ended: {err}")
        if isinstance(err, StalledStepError):  # its thread would keep the interpreter from ending
            sys.stdout.flush()
            os._exit(GPU_FAILED)
        return GPU_FAILED
    return DONE


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="nanoflow-serve",
        description="Serve a checkpoint with a tuned plan, over the OpenAI API.",
        epilog="exit: 0 shut down as asked, 1 crash, 2 bad input, 5 a GPU failed",
    )
    add = parser.add_argument
    add("--version", action="version", version=version("nanoflow-tune"))
    add("--plan", type=Path, required=True, metavar="PLAN.yaml", help="what nanoflow-tune wrote")
    add(
        "--weights",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder with safetensors; `random[:SEED]` for measurements",
    )
    add("--model", help="the model of random weights (default: the plan's)")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="a folder with `tokenizer.json` (default: that of the weights, where it has one)",
    )
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="how conversations are written, in Jinja (default: the tokenizer's own)",
    )
    add("--model-name", help="what clients call it (default: the model's name)")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    add("--num-gpus", type=_positive, help="tensor-parallel degree (default: the plan's)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=_port, default=8000, help="0 takes a free one (%(default)s)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"its first line is the key that clients must send (or set {KEY_VARIABLE})",
    )
    add(
        "--max-model-len", type=_positive, help="tokens of prompt and answer (default: the model's)"
    )
    add(
        "--dense-batch",
        type=_positive,
        metavar="ROWS",
        help="tokens that a step computes while there is enough to do (default: the plan's)",
    )
    add("--max-running", type=_positive, help="requests with a place in the KV cache")
    add("--max-queue", type=_positive, default=4096, help="requests that may wait (%(default)s)")
    add("--kv-cache-gib", type=_positive_float, help="per GPU (default: what is left of it)")
    add(
        "--kv-offload-gib",
        type=_positive_float,
        help="host memory, all GPUs together, that keeps the KV pages of finished requests for "
        "prompts that begin alike (default: none)",
    )
    add(
        "--kv-offload-dir",
        type=Path,
        metavar="DIR",
        help="pages that no longer fit there become files here",
    )
    add("--kv-offload-disk-gib", type=_positive_float, help="of those (default: as of memory)")
    add(
        "--swap-gib",
        type=_not_negative_float,
        help="host memory for requests preempted while the cache is full; one that finds no room "
        "ends (default: no limit)",
    )
    add(
        "--ttft-ms",
        type=_positive_float,
        metavar="MS",
        help="refuse requests (429) whose first token would come later (default: no limit)",
    )
    add(
        "--tpot-ms",
        type=_positive_float,
        metavar="MS",
        help="keep steps shorter, at the price of throughput (default: no limit)",
    )
    add(
        "--step-timeout",
        type=_positive_float,
        default=600.0,
        metavar="SECONDS",
        help="a step that takes longer has hung, and ends the server (%(default)g)",
    )
    add("--max-body-mib", type=_positive, default=8, help="of one request (%(default)s)")
    add(
        "--shutdown-timeout",
        type=_positive_float,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM (%(default)g)",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    return parser


def api_key(file: Path | None, variable: str | None) -> str | None:
    """The key that clients must send; None when nobody set one.

    Args:
        file: read when given.
        variable: value of the environment variable.

    Raises:
        ValueError: both are given, or the file is unreadable or empty.
    """
    if file is None:
        return variable or None
    if variable:
        raise ValueError(f"--api-key-file and {KEY_VARIABLE} are both set; unset one of them")
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ValueError(f"{file}: the API key cannot be read ({err}); check the path") from err
    if not lines or not lines[0].strip():
        raise ValueError(f"{file}: its first line must be the API key, but it is empty")
    return lines[0].strip()


def _serve(options: argparse.Namespace) -> None:
    from .launch import RankContext

    key = api_key(options.api_key_file, os.environ.get(KEY_VARIABLE))
    if key is None and not _is_loopback(options.host):
        _say(f"anybody who reaches {options.host} may use this server: set {KEY_VARIABLE}")
    setting, text = read_inputs(options, say=_say)
    if text is None:
        _say(
            "there is no tokenizer (see --tokenizer): prompts must be token ids, and so are the "
            "answers"
        )
    if setting.num_gpus > 1:
        from .serving_ranks import serve_on_ranks

        serve_on_ranks(options, setting.num_gpus, setting.device)
        return
    context = RankContext(0, 1, "cuda:0" if setting.device == "cuda" else "cpu")
    serve_http(options, text, setting.engine(lambda: setting.make_runner(context)))


def read_inputs(
    options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[RankSetting, ChatText | None]:
    """Plan, model and tokenizer, checked; no weights yet.

    Raises:
        ValueError: unreadable, not supported, or they do not go together.
    """
    from .engine_config import LatencyTarget
    from .serving_setup import ServingOptions, prepare

    serving = ServingOptions(
        plan=options.plan,
        weights=options.weights,
        model=options.model,
        num_gpus=options.num_gpus,
        device=options.device,
        max_model_len=options.max_model_len,
        dense_batch=options.dense_batch,
        max_running=options.max_running,
        max_queue=options.max_queue,
        cache_bytes=_bytes(options.kv_cache_gib),
        latency=LatencyTarget(ttft_s=_seconds(options.ttft_ms), tpot_s=_seconds(options.tpot_ms)),
        offload_bytes=_bytes(options.kv_offload_gib),
        offload_folder=options.kv_offload_dir,
        offload_disk_bytes=_bytes(options.kv_offload_disk_gib),
        swap_bytes=_bytes(options.swap_gib),
        step_timeout_s=options.step_timeout,
    )
    text = _chat_text(options.tokenizer, serving.folder, options.chat_template)
    setting = prepare(serving, () if text is None else text.end_token_ids, say)
    if options.tokenizer is not None and text is not None:
        known = setting.model.vocab_size
        if text.num_token_ids > known:
            raise ValueError(
                f"--tokenizer must fit the model, but it has {text.num_token_ids} token ids and "
                f"{setting.model.name} {known}: choose the model's own"
            )
    return setting, text


def _chat_text(
    tokenizer: Path | None, checkpoint: Path | None, template: Path | None
) -> ChatText | None:
    """The tokenizer that was asked for, else that of the checkpoint; None where there is none."""
    from .chat_text import TOKENIZER_FILES, load_chat_text

    folder = tokenizer or checkpoint
    text = None if folder is None else load_chat_text(folder, template)
    if text is None and tokenizer is not None:
        raise ValueError(
            f"--tokenizer must be a folder with one of {', '.join(TOKENIZER_FILES)}, but is "
            f"{tokenizer}"
        )
    if text is None and template is not None:
        raise ValueError("--chat-template needs a tokenizer: give --tokenizer too")
    return text


def serve_http(options: argparse.Namespace, text: ChatText | None, engine: Engine) -> None:
    """Start an engine and serve it until a signal comes; it is closed in any case.

    Raises:
        GpuFailureError: the engine ran out of memory, lost a rank, or waits for a step in vain.
        Exception: whatever else the engine failed with.
    """
    from .http_server import HttpServer
    from .openai_api import ApiOptions, OpenAiApi

    sys.setswitchinterval(_SWITCH_S)
    name = options.model_name or engine.model_name
    api_options = ApiOptions(
        model_name=name,
        api_key=api_key(options.api_key_file, os.environ.get(KEY_VARIABLE)),
        max_body_bytes=options.max_body_mib << 20,
        system_fingerprint=_fingerprint(options.plan),
    )
    try:
        engine.start()
        HttpServer(
            OpenAiApi(engine, text, api_options),
            host=options.host,
            port=options.port,
            shutdown_timeout_s=options.shutdown_timeout,
            log_level=options.log_level,
            on_start=lambda url: print(f"serving {name} at {url}", flush=True),
        ).run()
        if engine.failure is not None:
            raise engine.failure
    finally:
        engine.close(0.0)  # also when the port is taken, or two signals left no time for it


def _fingerprint(plan: Path) -> str:
    return f"fp_{hashlib.sha256(plan.read_bytes()).hexdigest()[:10]}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, but got {text}")
    return value


def _not_negative_float(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive_float(text)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds * 1e-3


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, but got {value}")
    return value


def _say(text: str) -> None:
    print(f"nanoflow-serve: {text}", file=sys.stderr, flush=True)


def _refuse(text: str) -> int:
    _say(f"error: {text}")
    return BAD_INPUT
