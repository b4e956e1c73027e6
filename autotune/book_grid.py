"""The grid of a plan book: dense-batch sizes, mixes of decode and prefill rows, KV lengths.

    steady         the workload's part of decode rows, d / (p + d)
    decode_only    no prefill rows
    prefill_heavy  one row in eight decodes

At a mean KV length of K the workload's prompts and answers are both K / (p + d/2) times as long.
Points whose KV cache does not fit into the memory are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..runtime.op_graph import RowMix
from ..runtime.plan import Bucket, MixKind
from ..search_spaces.schema import HardwareSpec, ModelSpec, WorkloadSpec
from .capacity import DECODE_GRANULARITY, memory_use

PREFILL_HEAVY_DECODES = 1 / 8
MIXES: tuple[MixKind, ...] = ("steady", "decode_only", "prefill_heavy")
ROW_GRANULARITY = 8
"""Sizes of a book are multiples of this, so that a decode row more or less does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BookGrid:
    """What a book covers, and how hard it is searched."""

    tokens: tuple[int, ...]
    """Dense-batch sizes; empty: the workload's own bucket alone."""
    contexts: tuple[float, ...]
    """Mean KV lengths of decode rows beside the workload's own."""
    steady_loads: tuple[float, ...] = ()
    """More of them for the steady mix, over the workload's own: other loads of attention."""
    mixes: tuple[MixKind, ...] = MIXES
    starts: int = 1
    """Schedules of neighbours and baselines that a point's search starts from."""
    regret_samples: int = 5
    """Batches between grid points at which a fresh search is made."""


_EVEN = (128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096)
"""Close enough that padding to the next size costs little, see the regret in a report."""
QUICK = BookGrid(tokens=_EVEN, contexts=(2048.0,), steady_loads=(0.6, 1.5))
FULL = BookGrid(
    tokens=_EVEN,
    contexts=(512.0, 1024.0, 2048.0, 4096.0),
    steady_loads=(0.5, 0.7, 1.4),
    starts=3,
    regret_samples=24,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One dense batch that a plan is searched for."""

    mix: MixKind
    rows: RowMix

    @property
    def key(self) -> tuple[int, int, float]:
        """Rows, decode rows, KV length; points with equal keys are one."""
        return key_of(self.rows)


def key_of(rows: RowMix) -> tuple[int, int, float]:
    """Rows, decode rows, and the KV length to a tenth of a token."""
    return round(rows.tokens), round(rows.decode_tokens), round(rows.decode_context_tokens, 1)


def bucket_rows(bucket: Bucket) -> RowMix:
    """The rows that a bucket was searched for."""
    return RowMix(
        decode_tokens=bucket.decode_tokens,
        prefill_tokens=bucket.prefill_tokens,
        decode_context_tokens=bucket.decode_context_tokens,
        prefill_context_tokens=bucket.prefill_context_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What decides which batches there are: the workload, and the memory of the GPUs."""

    model: ModelSpec
    hardware: HardwareSpec
    workload: WorkloadSpec
    num_gpus: int

    def rows(self, tokens: int, decode_fraction: float, context: float) -> RowMix:
        """A batch of this size, part of decode rows and mean KV length."""
        step = DECODE_GRANULARITY if tokens % DECODE_GRANULARITY == 0 else 1
        decodes = min(tokens, round(tokens * decode_fraction / step) * step)
        return RowMix(
            decode_tokens=decodes,
            prefill_tokens=tokens - decodes,
            decode_context_tokens=context,
            prefill_context_tokens=(self.prompt_tokens(context) + 1) / 2,
        )

    def decode_fraction(self, mix: MixKind) -> float:
        """Part of the rows that decode."""
        fixed = {"decode_only": 1.0, "prefill_heavy": PREFILL_HEAVY_DECODES}
        return fixed.get(mix, self.workload.decode_fraction)

    def prompt_tokens(self, context: float) -> float:
        """Mean prompt at a mean KV length of decode rows."""
        own = self.workload
        return own.prompt_tokens * context / own.decode_context_tokens

    def fits(self, rows: RowMix) -> bool:
        """Whether the KV cache of a batch fits beside weights and activations."""
        prompt = self.prompt_tokens(rows.decode_context_tokens)
        return memory_use(self.model, self.hardware, self.num_gpus, rows, prompt).fits

    def contexts(self, grid: BookGrid) -> tuple[float, ...]:
        """The workload's own KV length, then the grid's."""
        return tuple(dict.fromkeys((self.workload.decode_context_tokens, *grid.contexts)))


def grid_points(
    grid: BookGrid, traffic: Traffic, main_tokens: int
) -> tuple[list[GridPoint], list[GridPoint]]:
    """Points of the book, and those that memory does not hold; the workload's own series first.

    Args:
        grid: what to cover.
        traffic: workload and memory.
        main_tokens: rows of the main bucket, which is not among the points.
    """
    own = traffic.workload.decode_context_tokens
    main = key_of(traffic.rows(main_tokens, traffic.decode_fraction("steady"), own))
    seen, kept, left_out = {main}, list[GridPoint](), list[GridPoint]()
    for point in _all_points(grid, traffic):
        if point.key in seen:
            continue
        seen.add(point.key)
        (kept if traffic.fits(point.rows) else left_out).append(point)
    return kept, left_out


def _all_points(grid: BookGrid, traffic: Traffic) -> Iterator[GridPoint]:
    for context in traffic.contexts(grid):
        for mix in grid.mixes:
            fraction = traffic.decode_fraction(mix)
            for tokens in sorted(grid.tokens, reverse=True):
                yield GridPoint(mix=mix, rows=traffic.rows(tokens, fraction, context))
    for load in grid.steady_loads:
        context = float(round(load * traffic.workload.decode_context_tokens))
        for tokens in sorted(grid.tokens, reverse=True):
            rows = traffic.rows(tokens, traffic.decode_fraction("steady"), context)
            yield GridPoint(mix="steady", rows=rows)


def check_sizes(tokens: Sequence[int]) -> None:
    """Refuse sizes that no two nano-batches can be made of.

    Raises:
        ValueError: not a multiple of 8, or smaller than 16.
    """
    for size in tokens:
        if size < 2 * ROW_GRANULARITY or size % ROW_GRANULARITY:
            raise ValueError(
                f"--buckets must be multiples of {ROW_GRANULARITY} from {2 * ROW_GRANULARITY} up, "
                f"but got {size}; e.g. --buckets 512,1024,2048, or --buckets main for the "
                "workload's own alone"
            )
