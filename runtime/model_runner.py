"""Runs steps on one rank: an executor for each schedule and number of logit rows, tokens in slots.

`launch` queues a step and returns at once; `collect` waits for its tokens. The token sampled last
in each slot stays on the device and feeds the next step, so a step can be queued before the tokens
of the one before are known. On a GPU a step is one CUDA graph, captured when a schedule is first
used; schedules with attention variants that plan on the host run eagerly, and `Launched` says so.

What a graph holds: fetching token ids, embedding, all nano-ops, LM head, sampling, storing the
tokens by slot. What stays outside: cache operations, the copy of the step's numbers to the device
(one for each step), the copy of the tokens back.

Shape legend: R logit rows, N slots, P pages of a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .engine_config import RunnerSizes
from .executor import Executor, Resources
from .kv_cache import PagedKvCache
from .kv_sizes import pages_for
from .kv_store import KvStore
from .op_graph import OpGraph
from .plan import Schedule
from .plan_choice import Choice, PlanBook
from .sampling import GreedySampler, MakeSampler, Sampler
from .static_batch import BatchSizes, StaticBatch
from .step import StepInputs
from .weights import Weights

LOGIT_STEPS = 8
"""An executor has room for a multiple of 1 / 8 of its rows to predict tokens."""
ResourcesOf = Callable[[Schedule], Resources]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A step that was queued."""

    tokens_R: Tensor
    """On the host, valid once the step is done."""
    done: torch.cuda.Event | None
    is_eager: bool
    """On a GPU: no graph was replayed."""


class _SlotSampler:
    """Samples, then stores the tokens by slot for the next step."""

    def __init__(self, inner: Sampler, batch: StaticBatch) -> None:
        self.inner = inner
        self.next_token_ids_R = inner.next_token_ids_R
        self._batch = batch

    def __call__(self, logits_RV: Tensor) -> None:
        self.inner(logits_RV)
        self._batch.last_tokens_N.index_copy_(
            0, self._batch.logit_slots, self.inner.next_token_ids_R
        )


class ModelRunner:
    """One rank's model, cache and executors."""

    def __init__(
        self,
        graph: OpGraph,
        weights: Weights,
        cache: PagedKvCache,
        book: PlanBook,
        sizes: RunnerSizes,
        resources_of: ResourcesOf | None = None,
        make_sampler: MakeSampler = GreedySampler,
        store: KvStore | None = None,
    ) -> None:
        """Make the tables; executors are made when they are first used, or by `warm_up`.

        Args:
            graph: of the model on this rank.
            weights: of this rank.
            cache: of this rank; page 0 is for padding.
            book: what steps may run.
            sizes: of tables and batches.
            resources_of: partitions and groups of a schedule; None: none are needed.
            make_sampler: makes what chooses tokens.
            store: of pages outside the device.
        """
        self.graph, self.weights, self.cache, self.book = graph, weights, cache, book
        self.sizes = sizes
        self.store = store or KvStore(cache)
        self._resources_of = resources_of or _no_resources
        self._make_sampler = make_sampler
        self._executors: dict[tuple[str, int], Executor] = {}
        self._largest: Executor | None = None
        max_pages = pages_for(sizes.max_model_len, cache.page_size)
        self._page_table_NP = np.zeros((sizes.max_running, max_pages), dtype=np.int32)
        self._last_tokens_N = torch.zeros(
            sizes.max_running + 1, dtype=torch.int64, device=weights.device
        )
        self._is_cuda = weights.device.type == "cuda"

    def warm_up(self, keys: tuple[str, ...] | None = None) -> None:
        """Make (and capture) the executors of some choices for every number of logit rows."""
        for key in keys or tuple(self.book.choices):
            rows = self.book.choices[key].rows
            for num_logits in sorted({logit_room(rows, n + 1) for n in range(rows)}, reverse=True):
                self._executor(key, num_logits)

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step on the current stream."""
        self.store.run(inputs.cache_ops)
        updates = inputs.page_updates_U3
        self._page_table_NP[updates[:, 0], updates[:, 1]] = updates[:, 2]
        choice = self.book.choices[inputs.choice]
        num_tokens = len(inputs.logit_slots)
        executor = self._executor(choice.key, logit_room(choice.rows, num_tokens))
        batch, sampler = executor.batch, executor.sampler
        assert isinstance(batch, StaticBatch)
        assert sampler is not None
        batch.fill(inputs, self._page_table_NP)
        if batch.is_captured:
            executor.replay()
        else:
            executor.run()
        return self._read_back(sampler.next_token_ids_R[:num_tokens], batch.is_captured)

    def collect(self, launched: Launched) -> list[int]:
        """The tokens of a step, once it has run."""
        if launched.done is not None:
            launched.done.synchronize()
        return launched.tokens_R.tolist()

    def close(self) -> None:
        """Wait for the device and give back what lies outside of it."""
        if self._is_cuda:
            torch.cuda.synchronize(self.weights.device)
        self._executors.clear()
        self.store.close()

    def _read_back(self, tokens_R: Tensor, is_captured: bool) -> Launched:
        if not self._is_cuda:
            return Launched(tokens_R=tokens_R.clone(), done=None, is_eager=False)
        host_R = torch.empty(tokens_R.shape, dtype=tokens_R.dtype, pin_memory=True)
        host_R.copy_(tokens_R, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Launched(tokens_R=host_R, done=done, is_eager=not is_captured)

    def _executor(self, key: str, num_logits: int) -> Executor:
        found = self._executors.get((key, num_logits))
        if found is None:
            if self._largest is None:
                rows = self.book.max_rows
                largest = next(c for c in self.book.choices.values() if c.rows == rows)
                self._largest = self._make(largest, rows, None)
                for buffer in self._largest.buffers.named().values():
                    buffer.zero_()  # padding rows compute on what lies there: no NaN
            found = self._make(self.book.choices[key], num_logits, self._largest)
            self._executors[key, num_logits] = found
        return found

    def _make(self, choice: Choice, num_logits: int, shares_with: Executor | None) -> Executor:
        sizes = BatchSizes(
            num_logits=num_logits,
            max_chunks=self.sizes.max_chunks,
            max_pages=self._page_table_NP.shape[1],
            num_slots=self.sizes.max_running,
            page_size=self.cache.page_size,
        )
        is_captured = self._is_cuda and choice.is_capturable and shares_with is not None
        batch = StaticBatch.make(
            choice.schedule, sizes, self._last_tokens_N, is_captured=is_captured
        )

        def make_sampler(weights: Weights, num_rows: int) -> Sampler:
            return _SlotSampler(self._make_sampler(weights, num_rows), batch)

        executor = Executor(
            self.graph,
            self.weights,
            self.cache,
            batch,
            choice.schedule,
            self._resources_of(choice.schedule),
            make_sampler,
        ).prepare(shares_with)
        if is_captured:
            executor.capture()
        return executor


def _no_resources(schedule: Schedule) -> Resources:
    del schedule
    return Resources()


def logit_room(rows: int, num_tokens: int) -> int:
    """Logit rows of the executor that runs a step with `num_tokens` tokens to predict."""
    unit = max(1, rows // LOGIT_STEPS)
    return min(rows, -(-max(1, num_tokens) // unit) * unit)
