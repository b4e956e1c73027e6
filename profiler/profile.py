"""The profile record: what was measured, of which kernel, on how many SMs, and where it is from.

Rows are keyed by kernel and shape, not by model, so that models with equal shapes share them.
No torch here: a search runs from a saved profile on a laptop. `store.py` reads and writes CSV.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["measured", "interpolated", "roofline"]
ProfilePart = Literal["compute", "joules", "pairs", "collectives"]
"""What a profile run measures: kernels alone, their joules, co-runs, and collectives (which need
all ranks)."""
ALL_PARTS: tuple[ProfilePart, ...] = ("compute", "joules", "pairs", "collectives")
JoulesSource = Literal["measured", "fitted", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one profile row is about."""

    kind: str
    """`Op.kind`: gemm, gemm_silu, decode_attention, prefill_attention, norm, rope_append,
    all_reduce, all_gather, sampling, embedding."""
    shape: str
    """`Op.shape`, e.g. `n28672_k4096`, `q32_kv8_d128`, `d8192_r2`."""
    variant: str
    tokens: int
    """Rows that the kernel works on."""
    kv_len: int
    """KV length of each decode row; prompt length of prefill; 0 for everything else."""
    num_sms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured point; a failing case is a row with `error` and no time."""

    point: Point
    median_us: float
    p10_us: float
    p90_us: float
    n: int
    """Samples."""
    joules: float
    """Dynamic and static energy of one call, one GPU, kept up for half a second."""
    joules_source: JoulesSource
    sm_clock_mhz: float
    """While joules were measured, where they were; else while the time was."""
    watts: float
    """While joules were measured, longer than a burst: joules / watts is the sustained time."""
    source: Source = "measured"
    error: str = ""

    @property
    def has_measured_joules(self) -> bool:
        """Whether joules were read from the energy counter, not fitted."""
        return self.joules_source == "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """Two kernels side by side on disjoint SMs: how much slower each gets than alone there."""

    a: Point
    b: Point
    slowdown_a: float
    """Time of A beside B for 0.4 s, at the cap / time of A alone on the same SMs for 40 ms."""
    slowdown_b: float
    watts: float
    sm_clock_mhz: float
    n: int
    source: Source = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class TripleRow:
    """Three kernels side by side on disjoint SMs: a check of what pairs predict."""

    a: Point
    b: Point
    c: Point
    slowdown_a: float
    """Time of A beside B and C / time of A alone on the same SMs."""
    slowdown_b: float
    slowdown_c: float
    watts: float
    sm_clock_mhz: float
    n: int
    source: Source = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyModel:
    """Joules of a kernel on one GPU: static_w x time + per FLOP + per byte, least squares."""

    static_w: float
    joules_per_flop: float
    joules_per_byte: float
    joules_per_link_byte: float = 0.0
    relative_error: float = 0.0
    """Median |fitted - measured| / measured over the rows with measured joules."""

    def dynamic_joules(self, flops: float, memory_bytes: float, link_bytes: float = 0.0) -> float:
        """Joules beyond static power."""
        return (
            self.joules_per_flop * flops
            + self.joules_per_byte * memory_bytes
            + self.joules_per_link_byte * link_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All rows of one GPU kind with their provenance."""

    hardware: str
    """`HardwareSpec.name`."""
    dtype: str
    rows: tuple[Row, ...]
    pairs: tuple[PairRow, ...] = ()
    triples: tuple[TripleRow, ...] = ()
    energy: EnergyModel | None = None
    header: dict[str, str] = field(default_factory=dict[str, str])
    """GPU, driver, versions, date, commit, command, audit result."""

    @property
    def usable_rows(self) -> tuple[Row, ...]:
        """Rows that hold a time."""
        return tuple(row for row in self.rows if not row.error)
