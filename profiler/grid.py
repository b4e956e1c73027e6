"""What a profile run may measure: kernel families and the lattice of their points. No torch.

A family is one op shape (and KV length) with all its variants. Rows run along multiples of 128,
shares along what one split of the SMs can give: multiples of the granularity, their complements,
and all SMs. `refinement.py` decides which points of the lattice are measured, and in which order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..runtime.op_graph import DENSE_GEMM_KINDS, Op, OpGraph, OpKind
from ..runtime.op_shapes import RESOURCE_OF_KIND
from ..runtime.partition_layout import SmSplit
from ..runtime.plan import SM_FREE_VARIANTS
from .profile import Point

Variants = Mapping[str, tuple[str, ...]]
"""Kernel variants by op kind."""

TOKENS = (2048, 512, 1024, 256, 1536, 768, 128)
"""Rows of every kernel, the most telling first; refinement goes between them."""
DECODE_TOKENS = (512, 2048, 128, 1024)
ROW_TOKENS = (2048, 256, 1024)
"""Norms, rotary and the epilogue: time is all but linear in rows."""
TOKEN_STEP = 128
KV_LENS = (1024, 512, 2048)
"""Time per key is interpolated over log(keys)."""
COMPUTE_PARTS, MEMORY_PARTS = (0.76, 0.48), (0.36, 0.12)
"""Coarse shares, as parts of all SMs: 100 and 64, 48 and 16 of 132."""
COMPUTE_EDGE, MEMORY_EDGE = 0.12, 0.06
"""Smallest shares, measured of variants that are worth it."""
NETWORK_SHARES = (8, 16, 32)
COLLECTIVE_TOKENS = (128, 256, 512, 1024, 2048)
JOULE_TOKENS = 1024
"""Rows of the collectives whose joules are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One op shape at one KV length, all variants."""

    kind: str
    shape: str
    kv_len: int
    variants: tuple[str, ...]
    tokens: tuple[int, ...]
    """Coarse numbers of rows, the most telling first."""
    shares: tuple[int, ...]
    """Coarse shares, all SMs first."""
    edge: int
    """Smallest share; 0 where only the whole GPU counts."""
    lattice: tuple[int, ...]
    """All legal shares between the edge and all SMs, in order."""
    weight: float
    """How much a relative error of this family matters, 0 to 1."""

    def point(self, variant: str, tokens: int, num_sms: int) -> Point:
        """A point of the family."""
        return Point(
            kind=self.kind,
            shape=self.shape,
            variant=variant,
            tokens=tokens,
            kv_len=self.kv_len,
            num_sms=num_sms,
        )

    @property
    def num_sms(self) -> int:
        """All SMs of the GPU."""
        return self.shares[0]


def legal_shares(num_sms: int, granularity: int) -> tuple[int, ...]:
    """Shares that a front or back partition of one split can have, and all SMs; in order."""
    split = SmSplit.expected(num_sms, granularity)
    sizes = [size * granularity for size in range(1, split.num_groups + 1)]
    return tuple(sorted({*sizes, *(num_sms - size for size in sizes if size < num_sms), num_sms}))


def is_collective(kind: str) -> bool:
    """Whether all ranks take part in an op of this kind."""
    return RESOURCE_OF_KIND[_kind(kind)] == "network"


def _kind(kind: str) -> OpKind:
    assert kind in RESOURCE_OF_KIND, kind
    return kind  # type: ignore[return-value]


def _nearest(lattice: Sequence[int], share: float) -> int:
    return min(lattice, key=lambda legal: (abs(legal - share), -legal))


def families(
    graph: OpGraph, num_sms: int, granularity: int, variants: Variants
) -> tuple[Family, ...]:
    """The families of a layer at every share, and of the rest of an iteration on all SMs."""
    found: dict[tuple[str, str, int], Family] = {}
    lattice = legal_shares(num_sms, granularity)
    for op in graph.all_ops:
        if is_collective(op.kind):
            continue
        for kv_len in KV_LENS if op.kv_elements_per_key else (0,):
            found.setdefault(
                (op.kind, op.shape, kv_len), _layer_family(op, kv_len, lattice, variants)
            )
    for op in (*graph.prologue, *graph.epilogue):
        family = Family(
            kind=op.kind,
            shape=op.shape,
            kv_len=0,
            variants=variants[op.kind],
            tokens=ROW_TOKENS,
            shares=(num_sms,),
            edge=0,
            lattice=(num_sms,),
            weight=0.2,
        )
        found.setdefault((op.kind, op.shape, 0), family)
    return tuple(found.values())


def _layer_family(op: Op, kv_len: int, lattice: tuple[int, ...], variants: Variants) -> Family:
    num_sms = lattice[-1]
    is_compute = op.resource == "compute"
    parts = COMPUTE_PARTS if is_compute else MEMORY_PARTS
    edge = _nearest(lattice, num_sms * (COMPUTE_EDGE if is_compute else MEMORY_EDGE))
    tokens = TOKENS if op.kind != "prefill_attention" else TOKENS[:5]
    if not is_compute:
        tokens = DECODE_TOKENS if op.kv_elements_per_key else ROW_TOKENS
    return Family(
        kind=op.kind,
        shape=op.shape,
        kv_len=kv_len,
        variants=variants[op.kind],
        tokens=tokens,
        shares=(num_sms, *(_nearest(lattice, num_sms * part) for part in parts)),
        edge=edge,
        lattice=tuple(share for share in lattice if share >= edge),
        weight=1.0 if is_compute or op.kv_elements_per_key else 0.3,
    )


def collective_shapes(graph: OpGraph) -> tuple[tuple[OpKind, str], ...]:
    """Kinds and shapes of collectives: the layer's, and those that could take their place."""
    return tuple(sorted({(op.kind, op.shape) for op in graph.all_ops if is_collective(op.kind)}))


def collective_points(graph: OpGraph, num_sms: int, variants: Variants) -> list[Point]:
    """Collectives at every size and network share; needs all ranks."""
    return [
        Point(
            kind=kind,
            shape=shape,
            variant=variant,
            tokens=tokens,
            kv_len=0,
            num_sms=share,
        )
        for kind, shape in collective_shapes(graph)
        for tokens, variant in product(COLLECTIVE_TOKENS, variants[kind])
        for share in collective_shares(variant, num_sms)
    ]


def collective_joule_points(graph: OpGraph, num_sms: int, variants: Variants) -> list[Point]:
    """Collectives whose joules are measured: each variant once, on its largest share."""
    return [
        point
        for point in collective_points(graph, num_sms, variants)
        if point.tokens == JOULE_TOKENS
        and point.num_sms == collective_shares(point.variant, num_sms)[-1]
    ]


def collective_shares(variant: str, num_sms: int) -> tuple[int, ...]:
    """Shares that a collective is measured on: none for copy engines, which take no SMs.

    `symm_<algorithm>_N` has N blocks, but no more than the SMs: on fewer than N it is one with
    fewer blocks.
    """
    if variant in SM_FREE_VARIANTS:
        return (0,)
    blocks = int(variant.rpartition("_")[2]) if variant.startswith("symm_") else 0
    return (*(share for share in NETWORK_SHARES if share >= blocks), num_sms)


def sustained_points(graphs: Iterable[OpGraph], num_sms: int, variants: Variants) -> list[Point]:
    """The largest dense GEMM of the layers, epilogue left out, on all SMs by every variant."""
    gemms = [op for graph in graphs for op in graph.layer if op.kind in DENSE_GEMM_KINDS]
    largest = replace(max(gemms, key=lambda op: op.weight_elements), kind="gemm")
    return [
        Point(
            kind="gemm",
            shape=largest.shape,
            variant=variant,
            tokens=max(TOKENS),
            kv_len=0,
            num_sms=num_sms,
        )
        for variant in variants["gemm"]
    ]
