"""Runs steps on one rank: an executor for each schedule and number of logit rows, tokens in slots.

`launch` queues a step and returns at once; `collect` waits for its tokens. The token sampled last
in each slot stays on the device and feeds the next step, so a step can be queued before the tokens
of the one before are known. On a GPU a step is one CUDA graph, captured when a schedule is first
used; schedules with attention variants that plan on the host run eagerly, and `Launched` says so.

What a graph holds: fetching token ids, embedding, all nano-ops, final norm, LM head. What stays
outside: cache operations, the copy of the step's numbers to the device (one for each step) and of
page-table entries that changed, gathering page tables, sampling (it depends on what the step's
requests ask for), the copy of the tokens back. All of it is queued before the step runs, so the
device sees no gap.

Shape legend: R logit rows, N slots, P pages of a request.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch_memory import BatchSizes, num_page_entries, staging_bytes
from .engine_config import RunnerSizes
from .executor import Executor, Resources
from .kv_cache import PagedKvCache
from .kv_sizes import pages_for
from .kv_store import KvStore
from .op_graph import OpGraph
from .page_tables import PageTables
from .plan import Schedule
from .plan_choice import Choice, PlanBook
from .plan_lookup import is_interleaved
from .sampling import SamplingTable, TokenSampler
from .slot_needs import SlotNeeds
from .static_batch import StaticBatch
from .step import StepInputs
from .step_schedules import TILE_ROWS
from .weights import Weights

MANY_ROWS = 1024
"""Of a constant dense batch: from here on its executors have room for any number of whole GEMM
tiles of rows that predict tokens. Others have room for halves: each room is a graph to capture, and
rows of other batches nearly all decode."""
ResourcesOf = Callable[[Schedule], Resources]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A step that was queued; its tensors lie on the host and are valid once it is done."""

    tokens_R: Tensor
    logprobs_R: Tensor | None
    """None: no row asked for log-probabilities."""
    top_ids_RK: Tensor | None
    top_logprobs_RK: Tensor | None
    done: torch.cuda.Event | None
    is_eager: bool
    """On a GPU: no graph was replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a step sampled, by logit row."""

    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """Likeliest first."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """An executor with its batch and its sampler, which runs behind it outside of the graph."""

    executor: Executor
    batch: StaticBatch
    sampler: TokenSampler


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
            store: of pages outside the device.
        """
        self.graph, self.weights, self.cache, self.book = graph, weights, cache, book
        self.sizes = sizes
        self.store = store or KvStore(cache)
        self._resources_of = resources_of or _no_resources
        self._table = SamplingTable(sizes.max_running, weights.device)
        self._needs = SlotNeeds(sizes.max_running)
        self._alike = _alike(book)
        self._batches: dict[tuple[str, bool], StaticBatch] = {}
        self._bound: dict[tuple[str, int], _Bound] = {}
        self._warm: set[str] = set()
        self._largest: Executor | None = None
        max_pages = pages_for(sizes.max_model_len, cache.page_size)
        self._max_pages = max_pages
        self._tables = PageTables(
            sizes.max_running, max_pages, weights.device, is_shared=weights.device.type == "cpu"
        )
        self._last_tokens_N = torch.zeros(
            sizes.max_running + 1, dtype=torch.int64, device=weights.device
        )
        self._is_cuda = weights.device.type == "cuda"
        needs = [(c.schedule, self._batch_sizes(c.rows)) for c in book.choices.values()]
        num_bytes = max(staging_bytes(*need) for need in needs)
        self._block = torch.zeros(num_bytes, dtype=torch.uint8, device=weights.device)
        """What the numbers of each step are copied to: steps run one after the other."""
        num_entries = max(num_page_entries(*need) for need in needs)
        self._page_block = torch.zeros(num_entries, dtype=torch.int32, device=weights.device)
        """The page tables of each step."""
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None

    def warm_up(self, max_rows: int | None = None) -> int:
        """Make (and capture) the executors of dense batches for every number of logit rows.

        Args:
            max_rows: larger dense batches are left to their first use; None: all are made.

        Returns:
            How many there are.
        """
        limit = self.book.max_rows if max_rows is None else max_rows
        limit = next(size for size in self.book.sizes if size >= min(limit, self.book.max_rows))
        for choice in self.book.choices.values():
            if choice.rows <= limit:
                rows = choice.rows
                rooms = {self._room(rows, count + 1) for count in range(rows)}
                for num_logits in sorted(rooms, reverse=True):
                    self._bind(choice.key, num_logits)
        # What lives from now on is for good: looking through all of it takes longer than a step.
        gc.collect()
        gc.freeze()
        return len(self._bound)

    def reset(self) -> None:
        """Wait for the device and forget all requests and stored pages; what was made stays."""
        if self._is_cuda:
            torch.cuda.synchronize(self.weights.device)
        self.store.close()

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step on the current stream."""
        self.store.run(inputs.cache_ops)
        self._tables.update(inputs.page_updates_U3)
        self._table.take(inputs.slots_taken)
        self._needs.take(inputs.slots_taken)
        choice = self.book.choices[inputs.choice]
        slots = inputs.logit_slots
        bound = self._bind(choice.key, self._room(choice.rows, len(slots)))
        bound.batch.fill(inputs, self._tables)
        if bound.batch.is_captured:
            bound.executor.replay()
        else:
            bound.executor.run()
        bound.sampler.mode = self._needs.mode_of(slots)
        bound.sampler(bound.executor.logits_RV)
        next_R = bound.sampler.next_token_ids_R
        self._last_tokens_N.index_copy_(0, bound.batch.logit_slots, next_R)
        return self._read_back(bound, len(slots))

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled, once it has run."""
        if launched.done is not None:
            launched.done.synchronize()
        token_ids = launched.tokens_R.tolist()
        if launched.logprobs_R is None:
            return Sampled(token_ids=token_ids)
        top = None
        if launched.top_ids_RK is not None and launched.top_logprobs_RK is not None:
            pairs = zip(
                launched.top_ids_RK.tolist(), launched.top_logprobs_RK.tolist(), strict=True
            )
            top = [list(zip(ids, values, strict=True)) for ids, values in pairs]
        return Sampled(token_ids=token_ids, logprobs=launched.logprobs_R.tolist(), top_logprobs=top)

    def close(self) -> None:
        """Wait for the device and give back what lies outside of it."""
        self.reset()
        self._bound.clear()
        self._batches.clear()
        self._largest = None

    def _read_back(self, bound: _Bound, count: int) -> Launched:
        sampler, mode = bound.sampler, bound.sampler.mode
        launched = Launched(
            tokens_R=self._to_host(sampler.next_token_ids_R[:count]),
            logprobs_R=self._to_host(sampler.logprobs_R[:count]) if mode.has_logprobs else None,
            top_ids_RK=self._to_host(sampler.top_ids_RK[:count]) if mode.has_alternatives else None,
            top_logprobs_RK=(
                self._to_host(sampler.top_logprobs_RK[:count]) if mode.has_alternatives else None
            ),
            done=torch.cuda.Event() if self._is_cuda else None,
            is_eager=self._is_cuda and not bound.batch.is_captured,
        )
        if launched.done is not None:
            launched.done.record()
        return launched

    def _to_host(self, x_RX: Tensor) -> Tensor:
        host_RX = torch.empty(x_RX.shape, dtype=x_RX.dtype, pin_memory=self._is_cuda)
        return host_RX.copy_(x_RX, non_blocking=True)

    def _bind(self, key: str, num_logits: int) -> _Bound:
        key = self._alike[key]
        found = self._bound.get((key, num_logits))
        if found is None:
            if self._largest is None:
                rows = self.book.max_rows
                largest = next(c for c in self.book.choices.values() if c.rows == rows)
                self._largest = self._make(largest, rows, None).executor
                for buffer in self._largest.buffers.named().values():
                    buffer.zero_()  # padding rows compute on what lies there: no NaN
            found = self._make(self.book.choices[key], num_logits, self._largest)
            self._bound[key, num_logits] = found
        return found

    def _room(self, rows: int, num_tokens: int) -> int:
        is_usual = rows == self.book.target_rows and rows >= MANY_ROWS
        return logit_room(rows, num_tokens, TILE_ROWS if is_usual else max(1, rows // 2))

    def _batch_sizes(self, num_logits: int) -> BatchSizes:
        return BatchSizes(
            num_logits=num_logits,
            max_chunks=self.sizes.max_chunks,
            max_pages=self._max_pages,
            num_slots=self.sizes.max_running,
            page_size=self.cache.page_size,
        )

    def _batch(self, choice: Choice, *, is_captured: bool) -> StaticBatch:
        """One for all executors of a schedule."""
        found = self._batches.get((choice.key, is_captured))
        if found is None:
            found = StaticBatch.make(
                choice.schedule,
                self._batch_sizes(choice.rows),
                self._last_tokens_N,
                is_captured=is_captured,
                block=self._block,
                page_block=self._page_block,
            )
            self._batches[choice.key, is_captured] = found
        return found

    def _make(self, choice: Choice, num_logits: int, shares_with: Executor | None) -> _Bound:
        is_captured = self._is_cuda and choice.is_capturable and shares_with is not None
        batch = self._batch(choice, is_captured=is_captured).narrowed(num_logits)
        batch.clear()  # the block may hold another schedule's numbers
        executor = Executor(
            self.graph,
            self.weights,
            self.cache,
            batch,
            choice.schedule,
            self._resources_of(choice.schedule),
            make_sampler=None,
        ).prepare(shares_with)
        if is_captured:
            executor.capture(pool=self._pool, is_warm=choice.key in self._warm)
            self._warm.add(choice.key)
        sampler = TokenSampler(
            self.weights, num_logits, table=self._table, slots_R=batch.logit_slots
        )
        return _Bound(executor, batch, sampler)


def _no_resources(schedule: Schedule) -> Resources:
    del schedule
    return Resources()


def logit_room(rows: int, num_tokens: int, unit: int) -> int:
    """Logit rows of the executor that runs a step with `num_tokens` tokens to predict."""
    return min(rows, -(-max(1, num_tokens) // unit) * unit)


def _alike(book: PlanBook) -> dict[str, str]:
    """By key of a choice, the first choice that runs the same nano-ops on the same rows.

    How many rows decode differs between them, and a step brings its own number.
    """
    first: dict[Any, str] = {}
    return {
        key: first.setdefault(_structure(choice.schedule), key)
        for key, choice in book.choices.items()
    }


def _structure(schedule: Schedule) -> tuple[Any, ...]:
    batches = schedule.nano_batches
    ranges = tuple(batch.tokens for batch in batches)
    return schedule.nano_ops, ranges, is_interleaved(schedule)
