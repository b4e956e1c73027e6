"""The plan: what the tuner emits and the only thing the runtime reads.

    Plan -> Bucket (one dense-batch size, mix and KV length) -> Schedule -> NanoOp

The first bucket is the workload's own: the one that is searched in depth, measured and verified.
The others are the plan book, quickly searched grid points; `plan_lookup` picks among them.

A schedule is one period of a repeating layer pattern (a modulo schedule). Its nano-ops are listed
in issue order. In period t, a nano-op of stage s works on layer t - s; so the last ops of one layer
can run beside the first ops of the next, and a whole iteration is `num_layers + max stage` periods
with the instances outside [0, num_layers) left out. `schedule.py` unrolls it.

Ids are `<op>.<k>`: the k-th nano-op of that op in token order.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from typing import Literal

from ..search_spaces.schema import Dtype, RowOrder

SCHEMA = "nanoflow-plan/3"
READABLE_SCHEMAS = ("nanoflow-plan/1", "nanoflow-plan/2", SCHEMA)
"""1: each schedule written where it is used. 2: buckets without gains."""
MAX_TOKENS, MAX_NANO_OPS, MAX_STAGE, MAX_GPUS = 1 << 20, 512, 16, 1024
"""What goes over rows, nano-ops, periods or ranks one by one is bounded, whatever a file says."""
SM_FREE_VARIANTS = ("copy_engine",)
"""Kernel variants that occupy no SM: only they may be given a share of 0."""
Lane = str
"""Nano-ops of one lane run one after the other, lanes run side by side."""
MixKind = Literal["steady", "decode_only", "prefill_heavy"]
"""`steady`: the workload's own part of decode rows, with prompts as long as the KV length asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoBatch:
    """A contiguous range of dense-batch rows: its decode rows first, then its prefill rows."""

    tokens: tuple[int, int]
    """Half-open range of rows."""
    decode_tokens: int

    @property
    def num_tokens(self) -> int:
        """Rows in all."""
        return self.tokens[1] - self.tokens[0]

    def __post_init__(self) -> None:
        start, end = self.tokens
        if not 0 <= start < end <= MAX_TOKENS:
            raise ValueError(
                f"`tokens` must be a range 0 <= start < end <= {MAX_TOKENS}, but got {self.tokens}"
            )
        if not 0 <= self.decode_tokens <= end - start:
            raise ValueError(
                "`decode_tokens` must lie between 0 and the rows of the nano-batch, but got "
                f"decode_tokens={self.decode_tokens}, tokens={self.tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoOp:
    """One operation on one range of rows, with its lane, its SMs and its kernel."""

    op: str
    tokens: tuple[int, int]
    """Half-open range of dense-batch rows."""
    lane: Lane
    num_sms: int
    """0: it takes none, see SM_FREE_VARIANTS."""
    variant: str
    """Name of a registered kernel variant, e.g. `cublas`, `triton_128x256`, `nccl`."""
    stage: int = 0
    after: tuple[str, ...] = ()
    """Ids of nano-ops it waits for beyond its data dependencies: of this period when they come
    earlier in issue order, of the previous period otherwise."""

    @property
    def num_tokens(self) -> int:
        """Rows that it works on."""
        return self.tokens[1] - self.tokens[0]

    def __post_init__(self) -> None:
        start, end = self.tokens
        if not 0 <= start < end:
            raise ValueError(
                f"`tokens` must be a range 0 <= start < end, but got {self.tokens} in {self.op}"
            )
        least = 0 if self.variant in SM_FREE_VARIANTS else 1
        if self.num_sms < least or not 0 <= self.stage <= MAX_STAGE:
            raise ValueError(
                "`num_sms` must be positive (0 is for variants that take no SMs: "
                f"{', '.join(SM_FREE_VARIANTS)}) and `stage` from 0 to {MAX_STAGE}, but got "
                f"num_sms={self.num_sms}, stage={self.stage} in {self.op}, {self.variant}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One period of the layer pattern."""

    name: str
    """What kind of schedule it is: `sequential`, `nano_only`, `equal_split`, `overlapped`."""
    nano_batches: tuple[NanoBatch, ...]
    nano_ops: tuple[NanoOp, ...]
    """In issue order."""

    def __post_init__(self) -> None:
        if len(self.nano_ops) > MAX_NANO_OPS:
            raise ValueError(
                f"`nano_ops` must be at most {MAX_NANO_OPS}, but there are {len(self.nano_ops)}"
            )

    @property
    def dense_batch_tokens(self) -> int:
        """Rows of the dense batch."""
        return self.nano_batches[-1].tokens[1]

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Lanes in order of first use."""
        return tuple(dict.fromkeys(nano_op.lane for nano_op in self.nano_ops))

    @property
    def max_stage(self) -> int:
        """How many layers the pattern spans beyond one."""
        return max(nano_op.stage for nano_op in self.nano_ops)

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each nano-op, in issue order."""
        order = sorted(
            range(len(self.nano_ops)), key=lambda i: (self.nano_ops[i].op, self.nano_ops[i].tokens)
        )
        ids = [""] * len(order)
        counts: dict[str, int] = {}
        for i in order:
            op = self.nano_ops[i].op
            ids[i] = f"{op}.{counts.get(op, 0)}"
            counts[op] = counts.get(op, 0) + 1
        return tuple(ids)

    @property
    def is_overlapped(self) -> bool:
        """At least two lanes: of one nano-batch, both attentions may run at once."""
        return len(self.lanes) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of one iteration under one schedule, and where the figure comes from."""

    period_us: float
    """One whole iteration: all layers, LM head, sampling."""
    source: str
    """`measured`, `predicted` (from measured rows) or `roofline`."""
    p10_us: float = 0.0
    p90_us: float = 0.0
    joules: float = 0.0
    """Of one iteration, all GPUs; 0 when not known."""
    watts: float = 0.0
    """Mean of one GPU."""
    sm_clock_mhz: float = 0.0
    turn_spread: float = 0.0
    """A/A band: (largest - smallest) / median of its own interleaved turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A schedule with what the cost model says of it and, once executed, what was measured."""

    schedule: Schedule
    predicted: Timing
    measured: Timing | None = None

    @property
    def best_known(self) -> Timing:
        """Measured when there is a measurement, predicted otherwise."""
        return self.measured or self.predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Result of comparing the planned run with the unsplit sequential run."""

    passed: bool
    device: str
    model: str
    """The model that was run: the real one, or its scaled-down form."""
    num_layers: int
    num_ranks: int
    dtype: Dtype
    max_relative_error: float
    """Planned against sequential run: largest ||a-b|| / ||b|| of a layer's output, all ranks."""
    max_reference_error: float
    """Sequential run against a plain reference in higher precision, likewise."""
    tolerance: float
    orders_checked: int
    """Plan order plus random legal orders that were run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GainCurve:
    """How much faster than the sequential plan a schedule is, by what attention reads. Predicted.

    The batch has the bucket's rows and mix, with other KV lengths.
    """

    keys_per_row: tuple[float, ...]
    """Decode rows x their mean KV length / all rows, ascending; two or more."""
    gains: tuple[float, ...]
    """Time of the sequential plan / time of the schedule - 1, at each of them."""

    def __post_init__(self) -> None:
        keys = self.keys_per_row
        if len(keys) < 2 or len(keys) != len(self.gains):
            raise ValueError(
                "`keys_per_row` and `gains` must have two or more entries each, equally many, but "
                f"got {len(keys)} and {len(self.gains)}"
            )
        if keys[0] <= 0 or any(b <= a for a, b in pairwise(keys)):
            raise ValueError(f"`keys_per_row` must be positive and ascending, but got {keys}")
        if min(self.gains) <= -1:
            raise ValueError(f"`gains` must be greater than -1, but got {self.gains}")

    def at(self, keys_per_row: float) -> float | None:
        """The gain there, interpolated over the logarithm; None beyond the ends."""
        keys = self.keys_per_row
        if not keys[0] <= keys_per_row <= keys[-1]:
            return None
        place = max(1, bisect_left(keys, keys_per_row))
        part = log(keys_per_row / keys[place - 1]) / log(keys[place] / keys[place - 1])
        return self.gains[place - 1] + part * (self.gains[place] - self.gains[place - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What to run at one dense-batch size and mix."""

    dense_batch_tokens: int
    decode_tokens: int
    decode_context_tokens: float
    prefill_context_tokens: float
    row_order: RowOrder
    winner: Candidate
    sequential: Candidate
    best_overlapped: Candidate
    lower_bound_us: float
    power_limit_us: float
    bound: str
    """What binds: `compute`, `memory`, `network` or `power`."""
    verification: tuple[Verification, ...] = ()
    mix: MixKind = "steady"
    overlap_gain: GainCurve | None = None
    """Of `best_overlapped`; None where there are no decode rows, or nothing was looked at."""

    @property
    def prefill_tokens(self) -> int:
        """Prefill rows."""
        return self.dense_batch_tokens - self.decode_tokens

    @property
    def keys_per_row(self) -> float:
        """What decode attention reads, in keys for each row of the batch."""
        return self.decode_tokens * self.decode_context_tokens / self.dense_batch_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """From how many rows overlap pays, at one mix and KV length, on this card with this model."""

    mix: MixKind
    decode_context_tokens: float
    smallest_tokens: int
    """Fewest rows that were looked at."""
    largest_tokens: int
    """Most rows that were looked at; what memory does not hold was not."""
    tokens: int | None = None
    """An overlapped plan wins at this size and at all larger ones; None: not at the largest."""
    wins_at: tuple[int, ...] = ()
    """Buckets that an overlapped plan wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The emitted YAML. Hashes name the exact inputs that it was made from."""

    schema: str = SCHEMA
    model: str
    hardware: str
    workload: str
    num_gpus: int
    dtype: Dtype
    kv_dtype: Dtype
    page_size: int
    """Tokens of one KV-cache page."""
    inputs: dict[str, str] = field(default_factory=dict[str, str])
    """Content hashes of model, hardware, workload, space and profile."""
    created_by: str = ""
    """Tool version and commit."""
    buckets: tuple[Bucket, ...]
    """The workload's own first."""
    break_even: tuple[BreakEven, ...] = ()
    """The workload's own mix and KV length first; empty without a plan book."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_gpus <= MAX_GPUS or self.page_size < 1:
            raise ValueError(
                f"`num_gpus` must be from 1 to {MAX_GPUS} and `page_size` positive, but got "
                f"num_gpus={self.num_gpus}, page_size={self.page_size}"
            )
