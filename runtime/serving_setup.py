"""From a plan and a checkpoint to an engine that serves: loads, checks, sizes the KV cache.

A plan that does not fit the model or the GPUs is refused; one that fits roughly runs its sequential
schedules, and says so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..search_spaces.loader import load_hardware, load_model
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .engine_config import EngineConfig, LatencyTarget
from .gpu_failures import memory_for
from .kv_sizes import pages_for
from .op_graph import OpGraph
from .plan import Plan, Schedule
from .plan_choice import PlanBook
from .plan_io import load_plan
from .plan_match import LiveGpus, match_plan
from .schedule import has_o_columns
from .scheduler_records import SchedulerLimits

if TYPE_CHECKING:
    from .engine import Engine
    from .launch import RankContext
    from .model_runner import ModelRunner
    from .step_watch import Runner
    from .weights import Weights

RANDOM = "random"
"""Instead of a folder: weights drawn from a seed, for measurements."""
USABLE_SHARE = 0.9
"""Of a GPU's memory, for weights, activations and cache; the rest is the driver's and NCCL's."""
CPU_CACHE_BYTES = 1 << 30
CPU_CONTEXT = 4096
DEFAULT_MAX_RUNNING = {"cuda": 2048, "cpu": 64}
_FP32_BYTES = 4
_MORE_GPUS = (
    "end what else runs on the GPU, serve a smaller model, or tune and serve on more GPUs "
    "(nanoflow-tune --num-gpus)"
)
_SMALLER_CACHE = "lower --kv-cache-gib, or end what else runs on the GPU"
_FEWER_ROWS = "lower --kv-cache-gib, --dense-batch or --max-running"

DeviceType = Literal["cpu", "cuda"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What an operator asks for; None leaves the choice to this module."""

    plan: Path
    weights: str
    """A Hugging Face folder, or `random`, or `random:SEED`."""
    model: str | None = None
    """The model of random weights; by default the plan's."""
    num_gpus: int | None = None
    device: DeviceType | None = None
    max_model_len: int | None = None
    dense_batch: int | None = None
    """Rows of the constant dense batch."""
    max_running: int | None = None
    max_queue: int = 4096
    cache_bytes: int | None = None
    """Of the KV cache on each rank."""
    latency: LatencyTarget = field(default_factory=LatencyTarget)
    offload_bytes: int | None = None
    """Of host memory, for the pages of finished requests, all ranks together; None: none."""
    offload_folder: Path | None = None
    """Where pages go that host memory has no room for; None: nowhere."""
    offload_disk_bytes: int | None = None
    """Of files in that folder; None: as much as of host memory."""
    swap_bytes: int | None = None
    """Of host memory, for requests preempted while the cache is full; None: no limit."""
    step_timeout_s: float = 600.0
    """A step that takes longer has hung."""

    @property
    def folder(self) -> Path | None:
        """The checkpoint; None for random weights."""
        return None if self.weights.split(":")[0] == RANDOM else Path(self.weights)

    @property
    def random_seed(self) -> int:
        """Of random weights.

        Raises:
            ValueError: no number behind the colon.
        """
        text = self.weights.partition(":")[2] or "0"
        if not text.isdigit():
            raise ValueError(f"--weights {RANDOM}:SEED needs a number, but got {text!r}")
        return int(text)


def prepare(
    options: ServingOptions, extra_end_ids: tuple[int, ...] = (), say: Say = lambda _: None
) -> RankSetting:
    """Read and check everything but the weights.

    Args:
        options: what to serve, and how much of it.
        extra_end_ids: end-of-sequence tokens beside those of the checkpoint's configuration.
        say: takes remarks for the operator.

    Raises:
        ValueError: unreadable, not supported, or a plan for something else.
    """
    plan, model = load_plan(options.plan), _model(options)
    hardware = load_hardware(plan.hardware)
    device = options.device or _device_type()
    num_gpus = options.num_gpus or plan.num_gpus
    gpus = _live_gpus() if device == "cuda" else None
    match = match_plan(plan, model, hardware, num_gpus, gpus)
    for remark in match.remarks:
        say(remark)
    remark = "" if match.is_exact else "the plan fits this model or GPU only roughly"
    if remark:
        say(f"{remark}: only its sequential schedules run")
    graph = OpGraph.build(model, num_gpus)
    book = PlanBook.from_plan(graph, plan, hardware, remark)
    if device == "cuda":
        from .kernels.graph_variants import graph_variants

        for replaced in book.hold_in_graphs(graph, graph_variants(graph, plan.page_size)):
            say(replaced)
    if options.dense_batch is not None:
        book.aim_at(options.dense_batch)
    _check_offload(options)
    page_bytes = model.kv_bytes_per_token * plan.page_size // num_gpus
    room = options.cache_bytes or _cache_bytes(model, book, num_gpus, device)
    limits = _limits(options, model, book, device)
    if options.swap_bytes is not None:
        swap_pages = options.swap_bytes // (page_bytes * num_gpus)
        limits = replace(limits, max_swapped_pages=swap_pages)
    num_pages = room // page_bytes
    if num_pages < pages_for(limits.max_model_len, plan.page_size):
        raise ValueError(
            f"the KV cache must hold one request of {limits.max_model_len} tokens, but "
            f"{room / 2**30:.2f} GiB hold {num_pages * plan.page_size}; lower --max-model-len, or "
            "raise --kv-cache-gib"
        )
    config = EngineConfig(
        model_name=model.name,
        vocab_size=model.vocab_size,
        limits=limits,
        num_pages=num_pages,
        page_size=plan.page_size,
        eos_token_ids=tuple(sorted({*_end_token_ids(options.folder), *extra_end_ids})),
        latency=options.latency,
        page_bytes=page_bytes * num_gpus,
        memory_remedy=_FEWER_ROWS,
        step_timeout_s=options.step_timeout_s,
        **_offload_pages(options, page_bytes * num_gpus),
    )
    return RankSetting(options, plan, model, hardware, graph, book, config, device)


@dataclass(frozen=True, slots=True)
class RankSetting:
    """All that a rank needs to make its runner."""

    options: ServingOptions
    plan: Plan
    model: ModelSpec
    hardware: HardwareSpec
    graph: OpGraph
    book: PlanBook
    config: EngineConfig
    device: DeviceType

    @property
    def num_gpus(self) -> int:
        """Tensor-parallel ranks."""
        return self.plan.num_gpus

    def engine(self, make_runner: Callable[[], Runner]) -> Engine:
        """An engine that has not been started; its thread makes the runner."""
        from .engine import Engine

        return Engine(self.config, self.book, make_runner)

    def make_runner(self, context: RankContext) -> ModelRunner:
        """Load a rank's weights, make its cache, capture its graphs."""
        import torch

        from .device import device_resources
        from .executor import Resources
        from .kv_cache import PagedKvCache
        from .kv_store import KvStore
        from .model_runner import ModelRunner
        from .verify_rank import default_resources

        device, ranks = torch.device(context.device), context.world_size
        if self.device == "cpu":
            # One core is for HTTP: an op's threads wait for the slowest of them.
            torch.set_num_threads(max(1, ((os.cpu_count() or 1) - 1) // ranks))
        weights = self._weights(context, device)
        with memory_for("the KV cache", _SMALLER_CACHE):
            cache = PagedKvCache(
                self.model,
                num_pages=self.config.num_pages,
                device=device,
                tp_degree=ranks,
                rank=context.rank,
                page_size=self.plan.page_size,
            )

        def resources_of(schedule: Schedule) -> Resources:
            if self.device == "cpu":
                return default_resources(context, [schedule])
            return device_resources(context, self.graph, self.hardware, [schedule])

        with memory_for("pinned host memory of the KV cache", "lower --kv-offload-gib"):
            store = KvStore(cache, self.options.offload_folder, self.config.offload_host_pages)
        with memory_for("the engine's buffers and CUDA graphs", _FEWER_ROWS):
            runner = ModelRunner(
                self.graph,
                weights,
                cache,
                self.book,
                self.config.runner_sizes,
                resources_of,
                store,
            )
            if self.device == "cuda":
                self._warm_up(runner, context)
        return runner

    def _weights(self, context: RankContext, device: Any) -> Weights:  # noqa: ANN401 - torch.device
        from .checkpoint import load_checkpoint
        from .weights import random_weights

        folder = self.options.folder
        gathers = has_o_columns(choice.schedule for choice in self.book.choices.values())
        with memory_for("the weights", _MORE_GPUS):
            if folder is None:
                return random_weights(
                    self.model,
                    rank=context.rank,
                    tp_degree=context.world_size,
                    device=device,
                    seed=self.options.random_seed,
                    sharded_exactly=self.device == "cpu",
                    with_o_columns=gathers,
                )
            _, weights = load_checkpoint(
                folder,
                rank=context.rank,
                tp_degree=context.world_size,
                device=device,
                with_o_columns=gathers,
            )
            return weights

    def _warm_up(self, runner: ModelRunner, context: RankContext) -> None:
        # Steps grow beyond the constant dense batch when a latency target leaves room.
        has_target = self.config.latency.tpot_s is not None
        usual = max(self.book.target_rows, self.config.limits.max_running)
        began_s = time.monotonic()
        count = runner.warm_up(None if has_target else usual)
        if context.rank == 0:
            took_s = time.monotonic() - began_s
            print(f"nanoflow-serve: {count} graphs in {took_s:.0f} s", file=sys.stderr)


def _model(options: ServingOptions) -> ModelSpec:
    if options.folder is not None:
        if options.model is not None:
            raise ValueError("--model goes with --weights random alone; a folder names its model")
        return load_model(_as_path(options.folder))
    return load_model(options.model or load_plan(options.plan).model)


def _as_path(folder: Path) -> Path:
    """A folder that no shipped model's name can stand for."""
    if not folder.is_dir():
        raise ValueError(f"--weights must be a folder, `{RANDOM}` or `{RANDOM}:SEED`, not {folder}")
    return folder.resolve()


def _limits(
    options: ServingOptions, model: ModelSpec, book: PlanBook, device: DeviceType
) -> SchedulerLimits:
    longest = model.max_position_embeddings
    default = longest if device == "cuda" else min(longest, CPU_CONTEXT)
    max_model_len = options.max_model_len or default
    if max_model_len > longest:
        raise ValueError(
            f"--max-model-len must be at most the model's {longest} positions, but is "
            f"{max_model_len}"
        )
    max_running = options.max_running or min(DEFAULT_MAX_RUNNING[device], book.target_rows)
    return SchedulerLimits(
        max_model_len=max_model_len, max_running=max_running, max_waiting=options.max_queue
    )


def _check_offload(options: ServingOptions) -> None:
    folder = options.offload_folder
    if folder is None:
        if options.offload_disk_bytes is not None:
            raise ValueError("--kv-offload-disk-gib needs the folder: give --kv-offload-dir too")
        return
    if options.offload_bytes is None:
        raise ValueError(
            "--kv-offload-dir takes what host memory has no room for: give --kv-offload-gib too"
        )
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--kv-offload-dir must be a folder that can be written, not {folder}")


def _offload_pages(options: ServingOptions, page_bytes: int) -> dict[str, int]:
    """Fields of `EngineConfig`; `page_bytes` are those of all ranks."""
    host = options.offload_bytes
    if host is None:
        return {}
    disk = 0
    if options.offload_folder is not None:
        disk = host if options.offload_disk_bytes is None else options.offload_disk_bytes
    for flag, held in (("gib", host), ("disk-gib", disk)):
        if 0 < held < page_bytes:
            raise ValueError(
                f"--kv-offload-{flag} must hold one page, {page_bytes / 2**30:.4g} GiB, but is "
                f"{held / 2**30:.4g} GiB; raise it"
            )
    return {
        "offload_host_pages": host // page_bytes,
        "offload_disk_pages": disk // page_bytes,
    }


def _end_token_ids(folder: Path | None) -> tuple[int, ...]:
    """Of `generation_config.json`, else of `config.json`."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name if folder is not None else None
        if file is None or not file.is_file():
            continue
        found = cast("dict[str, Any]", json.loads(file.read_text("utf-8"))).get("eos_token_id")
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list):
            return tuple(int(token_id) for token_id in cast("list[Any]", found))
    return ()


def _cache_bytes(model: ModelSpec, book: PlanBook, num_gpus: int, device: DeviceType) -> int:
    """What is left beside weights, activations and logits."""
    if device == "cpu":
        return CPU_CACHE_BYTES
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    widest = model.qo_size + 2 * model.kv_size + 3 * model.intermediate_size
    row_bytes = (4 * model.hidden_size + widest) * model.dtype_bytes
    row_bytes += -(-model.vocab_size // num_gpus) * (model.dtype_bytes + _FP32_BYTES)
    embedding = model.vocab_size * model.hidden_size * model.dtype_bytes
    weights = (model.weight_bytes - embedding) // num_gpus + embedding
    if has_o_columns(choice.schedule for choice in book.choices.values()):
        projections = model.num_hidden_layers * model.hidden_size * model.qo_size
        weights += projections * model.dtype_bytes // num_gpus  # in both forms
        row_bytes += (model.qo_size + model.hidden_size) * model.dtype_bytes
    room = int(USABLE_SHARE * total) - weights - row_bytes * book.max_rows
    if room <= 0:
        raise ValueError(
            f"the weights take {weights / 2**30:.1f} GiB of the GPU's {total / 2**30:.1f}, which "
            "leaves no room for a KV cache; tune for more GPUs"
        )
    return room


def _device_type() -> DeviceType:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _live_gpus() -> LiveGpus:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU with its driver, and there is none")
    properties = torch.cuda.get_device_properties(0)
    return LiveGpus(
        name=properties.name,
        count=torch.cuda.device_count(),
        num_sms=properties.multi_processor_count,
    )
