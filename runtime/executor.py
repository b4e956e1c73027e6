"""Runs one schedule on one dense batch: the hot path of the runtime.

`prepare` unrolls the schedule once and binds every instance to a launch without arguments. `run`
is one loop over them in issue order. On CUDA an instance runs on the stream of its (lane, SM
share); it waits by events for producers on other streams, and for nothing else: producers on its
own stream are behind it in stream order. Embedding runs before and final norm, LM head and sampling
run after all of them, on the caller's stream and the whole GPU.

Shape legend: T rows of the dense batch, D hidden, R logit rows, V this rank's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .batching import DenseBatch
from .binding import Binder, Launch
from .buffers import Buffers
from .kernels import registry, torch_ops
from .kernels.gather_buffer import output_rows
from .kv_cache import PagedKvCache
from .op_graph import OpGraph
from .plan import NanoOp, Schedule
from .sampling import GreedySampler, MakeSampler, Sampler
from .schedule import Instance, has_o_columns, unroll
from .weights import Weights

Observe = Callable[[Instance], None]


class Partitions(Protocol):
    """SM partitions of a GPU: one stream per lane and share."""

    def stream(self, lane: str, num_sms: int) -> torch.cuda.Stream:
        """The stream of a lane on a share; the share of all SMs is the whole GPU."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a rank has besides tensors."""

    partitions: Partitions | None = None
    """None: everything runs on the caller's stream."""
    groups: Mapping[str, Any] | None = None
    """By lane, what the all-reduce variants take as `group`; None with one rank."""


@dataclass(slots=True)
class _Step:
    launch: Launch | None
    """None when the range has no rows of the op's kind; its place in the order still counts."""
    stream: torch.cuda.Stream | None
    waits: tuple[torch.cuda.Event, ...] = ()
    done: torch.cuda.Event | None = None
    """Recorded only when another stream waits for it."""


class Executor:
    """One schedule bound to weights, cache and batch; run it as often as needed."""

    def __init__(
        self,
        graph: OpGraph,
        weights: Weights,
        cache: PagedKvCache,
        batch: DenseBatch,
        schedule: Schedule,
        resources: Resources | None = None,
        make_sampler: MakeSampler | None = GreedySampler,
    ) -> None:
        """Bind nothing yet; `prepare` does.

        Without a sampler a run ends with the logits, and the caller samples from `logits_RV`.

        Raises:
            ValueError: batch and schedule differ in rows, a request is longer than the model
                takes, ranks lack groups, or weights lack a form of the output projection.
        """
        if batch.num_rows != schedule.dense_batch_tokens:
            raise ValueError(
                f"the schedule is for {schedule.dense_batch_tokens} rows, but the batch has "
                f"{batch.num_rows}: build the batch from `schedule.nano_batches`"
            )
        longest, limit = batch.max_kv_len, graph.model.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a request has {longest} tokens, but {graph.model.name} takes {limit} "
                "(`max_position_embeddings`)"
            )
        self.resources = resources or Resources()
        if graph.tp_degree > 1 and self.resources.groups is None:
            raise ValueError(f"{graph.tp_degree} ranks need `Resources.groups`, one for each lane")
        if has_o_columns([schedule]) and weights.layers[0].o_columns_WA is None:
            raise ValueError(
                f"schedule {schedule.name!r} splits the output projection by columns, but the "
                "weights were made without that form: make them with `with_o_columns`"
            )
        self.graph, self.weights, self.cache = graph, weights, cache
        self.batch, self.schedule = batch, schedule
        self._make_sampler = make_sampler
        self.sampler: Sampler | None = None
        self.device = weights.device
        self.instances: list[Instance] = []
        self._steps: list[_Step] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, shares_with: Executor | None = None) -> Executor:
        """Allocate buffers and events, unroll the schedule, bind every instance.

        Args:
            shares_with: an executor with at least as many rows and logit rows, which never runs at
                the same time: its buffers and logits are used instead of new ones.
        """
        num_rows = self.batch.num_rows
        if shares_with is None:
            self.buffers = Buffers.allocate(self.weights, num_rows)
        else:
            shared = shares_with.buffers.named().items()
            self.buffers = replace(
                shares_with.buffers, **{name: buffer[:num_rows] for name, buffer in shared}
            )
        if has_o_columns([self.schedule]) and self.buffers.heads_TA is None:
            self.buffers = self.buffers.with_gathered(self.weights, self._gathered_rows)
        num_layers = len(self.weights.layers)
        self.instances = unroll(self.schedule, self.graph, num_layers)
        binder = Binder(
            graph=self.graph,
            weights=self.weights,
            cache=self.cache,
            batch=self.batch,
            buffers=self.buffers,
            groups=self.resources.groups,
            nano_ops=self.schedule.nano_ops,
        )
        self._steps = [
            _Step(launch=binder.bind(nano_op, instance.layer), stream=self._stream(nano_op))
            for instance in self.instances
            for nano_op in (self.schedule.nano_ops[instance.index],)
        ]
        self._final_sums = binder.final_sums()
        first_norm = next(
            nano_op for nano_op in self.schedule.nano_ops if nano_op.op == "attn_norm"
        )
        self._final_norm = registry.kernel("norm", first_norm.variant, self.device.type)
        self.received = binder.received_buffers()
        """Rows that peers' copy engines write, by name; empty for other all-reduces."""
        self.fetching = frozenset(
            index
            for index, nano_op in enumerate(self.schedule.nano_ops)
            if binder.leaves_sum(nano_op)
        )
        """Nano-ops that write `received` instead of their own buffer."""
        self._streams = tuple(dict.fromkeys(step.stream for step in self._steps if step.stream))
        self._connect()
        self._allocate_outputs(shares_with)
        return self

    def _gathered_rows(self, name: str, num_rows: int, width: int) -> Tensor:
        """Memory that every all-gather of the schedule can write; all lanes share it."""
        gathers = (n for n in self.schedule.nano_ops if self.graph.op(n.op).kind == "all_gather")
        group = self.resources.groups[next(gathers).lane] if self.resources.groups else None
        dtype = self.buffers.residual_TD.dtype
        return output_rows(group, num_rows, width, dtype, self.device, name)

    def _stream(self, nano_op: NanoOp) -> torch.cuda.Stream | None:
        if self.device.type != "cuda" or self.resources.partitions is None:
            return None
        return self.resources.partitions.stream(nano_op.lane, nano_op.num_sms)

    def _connect(self) -> None:
        """Give each step the events it waits for: the last producer on each other stream."""
        if not self._streams:
            return
        for here, instance in enumerate(self.instances):
            latest: dict[torch.cuda.Stream, int] = {}
            for there in instance.waits_for:  # ascending: a later one implies the earlier
                stream = self._steps[there].stream
                if stream is not None and stream != self._steps[here].stream:
                    latest[stream] = there
            self._steps[here].waits = tuple(self._done(there) for there in latest.values())
        self._begin = torch.cuda.Event()
        self._ends = tuple(torch.cuda.Event() for _ in self._streams)

    def _done(self, there: int) -> torch.cuda.Event:
        step = self._steps[there]
        step.done = step.done or torch.cuda.Event()
        return step.done

    def _allocate_outputs(self, shares_with: Executor | None) -> None:
        num_logits, weights = self.batch.logit_rows_R.shape[0], self.weights
        hidden, vocab = weights.model.hidden_size, weights.lm_head_VD.shape[0]
        new = partial(torch.empty, dtype=weights.lm_head_VD.dtype, device=self.device)
        if shares_with is None:
            self.logits_RV = new((num_logits, vocab))
            """Logits of this rank's part of the vocabulary."""
            self._last_3RD = new((3, num_logits, hidden))
        else:
            self.logits_RV = shares_with.logits_RV[:num_logits]
            self._last_3RD = shares_with._last_3RD[:, :num_logits]
        self._last_RD, self._delta_RD, self._last_normed_RD = self._last_3RD
        if self._make_sampler is not None:
            self.sampler = self._make_sampler(weights, num_logits)

    @property
    def next_token_ids_R(self) -> Tensor:  # noqa: N802 - shape suffix
        """int64: tokens of the last run, in the order of `batch.logit_requests`."""
        assert self.sampler is not None, "the executor was made without a sampler"
        return self.sampler.next_token_ids_R

    def run(self, observe: Observe | None = None, before: Observe | None = None) -> None:
        """Run the whole iteration in issue order.

        Args:
            observe: called after each instance is issued, with its stream current; eager only.
            before: called before each is issued, behind what it waits for; eager only.
        """
        main = torch.cuda.current_stream() if self._streams else None
        self._embed()
        if main is not None:
            # Partition streams start behind the embedding.
            self._begin.record(main)
            for stream in self._streams:
                stream.wait_event(self._begin)
        for step, instance in zip(self._steps, self.instances, strict=True):
            stream = step.stream
            if stream is not None:
                for event in step.waits:
                    stream.wait_event(event)
                torch.cuda.set_stream(stream)
            if before is not None:
                before(instance)
            if step.launch is not None:
                step.launch()
            if observe is not None:
                observe(instance)
            if step.done is not None:
                step.done.record(stream)
        if main is not None:
            # The final norm starts behind the last nano-op of every partition.
            for stream, end in zip(self._streams, self._ends, strict=True):
                end.record(stream)
                main.wait_event(end)
            torch.cuda.set_stream(main)
        self._finish()

    def run_in_order(
        self,
        order: Sequence[int],
        observe: Observe | None = None,
        before: Observe | None = None,
    ) -> None:
        """Run instances one at a time in any legal order, each finished before the next.

        Args:
            order: positions in `instances`, see `schedule.random_legal_order`.
            observe: called after each instance has finished.
            before: called before each instance is issued.
        """
        self._embed()
        self._synchronize()
        for here in order:
            if before is not None:
                before(self.instances[here])
                self._synchronize()
            self._run_alone(self._steps[here])
            if observe is not None:
                observe(self.instances[here])
                self._synchronize()
        self._finish()

    def _run_alone(self, step: _Step) -> None:
        if step.launch is None:
            return
        if step.stream is None:
            step.launch()
        else:
            with torch.cuda.stream(step.stream):
                step.launch()
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def capture(
        self,
        stream: torch.cuda.Stream | None = None,
        *,
        pool: Any = None,  # noqa: ANN401 - torch names no type
        is_warm: bool = False,
    ) -> None:
        """Capture the whole iteration into one CUDA graph; two eager runs warm it up.

        Args:
            stream: to capture on; None takes a new one.
            pool: memory that graphs which never run at the same time may share.
            is_warm: another executor ran this schedule: what comes behind the layers is run alone.
        """
        for _ in range(1 if is_warm else 2):
            if is_warm:
                self._finish()
            else:
                self.run()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread may query events meanwhile: only this thread is restricted.
        with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self.run()

    def replay(self) -> None:
        """Run the captured iteration."""
        assert self._graph is not None, "capture() comes first"
        self._graph.replay()

    def _embed(self) -> None:
        self.batch.fetch_token_ids()
        torch_ops.embedding(
            self.batch.token_ids_T, self.weights.embedding_VD, self.buffers.residual_TD, 0
        )

    def _finish(self) -> None:
        """Final norm, LM head and sampling on the logit rows."""
        for final_sum in self._final_sums:
            final_sum()
        weights, rows_R = self.weights, self.batch.logit_rows_R
        torch.index_select(self.buffers.residual_TD, 0, rows_R, out=self._last_RD)
        torch.index_select(self.buffers.ffn_TD, 0, rows_R, out=self._delta_RD)
        self._final_norm(
            self._last_RD,
            self._delta_RD,
            weights.final_norm_D,
            self._last_normed_RD,
            weights.model.rms_norm_eps,
            0,
        )
        torch_ops.gemm(self._last_normed_RD, weights.lm_head_VD, None, self.logits_RV, 0)
        if self.sampler is not None:
            self.sampler(self.logits_RV)
