"""Which points a profile run measures, and how long that takes. No torch.

Solo points: every op of the graph, every variant, rows and SM shares (a share and its complement).
Pair points: the co-runs that overlapped pipelines are made of.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product

from ..runtime.op_graph import GEMM_KINDS, Op, OpGraph
from .profile import Point

TOKENS = (256, 512, 1024, 1536, 2048)
DECODE_TOKENS = (128, *TOKENS)
KV_LENS = (512, 1024, 2048)
SHARES = (16, 32, 48, 64, 68, 84, 100, 116)
NETWORK_SHARES = (8, 16, 32)
SECONDS_PER_POINT = 0.085
SECONDS_PER_JOULE_POINT = 0.65
SECONDS_PER_PAIR = 2.0
JOULE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Points of one model on one rank, in the (random) order they are measured."""

    solo: tuple[Point, ...]
    joule_points: frozenset[Point]
    """Those whose energy is measured, about a tenth."""
    pairs: tuple[tuple[Point, Point], ...]

    @property
    def minutes(self) -> float:
        """Predicted minutes on a GPU."""
        solo = len(self.solo) * SECONDS_PER_POINT + len(self.joule_points) * SECONDS_PER_JOULE_POINT
        return (solo + len(self.pairs) * SECONDS_PER_PAIR) / 60

    @property
    def summary(self) -> str:
        """What will be measured, by kind, and how long that takes."""
        counts = Counter(point.kind for point in self.solo)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        return (
            f"{len(self.solo)} points ({kinds}), {len(self.joule_points)} with joules, "
            f"{len(self.pairs)} pairs: about {self.minutes:.1f} minutes"
        )

    def without(self, solo: Container[Point], pairs: Container[tuple[Point, Point]]) -> Grid:
        """What is left when some points are measured already."""
        left = tuple(point for point in self.solo if point not in solo)
        return Grid(
            solo=left,
            joule_points=self.joule_points.intersection(left),
            pairs=tuple(pair for pair in self.pairs if pair not in pairs),
        )


def _points(
    op: Op,
    variants: Iterable[str],
    shares: Iterable[int],
    tokens: Iterable[int] = TOKENS,
    kv_lens: Iterable[int] = (0,),
) -> list[Point]:
    """Every combination for one op, shares fastest."""
    return [
        Point(
            kind=op.kind,
            shape=op.shape,
            variant=variant,
            tokens=rows,
            kv_len=kv_len,
            num_sms=share,
        )
        for variant, rows, kv_len, share in product(variants, tokens, kv_lens, shares)
    ]


def solo_points(
    graph: OpGraph, num_sms: int, variants: Mapping[str, tuple[str, ...]]
) -> list[Point]:
    """Every kernel of the layer at every share, and the epilogue on the whole GPU."""
    points: list[Point] = []
    shares = (*SHARES, num_sms)
    seen: set[tuple[str, str]] = set()
    for op in graph.layer:
        if (op.kind, op.shape) in seen or op.kind == "all_reduce":
            continue
        seen.add((op.kind, op.shape))
        tokens = DECODE_TOKENS if op.kind == "decode_attention" else TOKENS
        kv_lens = KV_LENS if op.kind in ("decode_attention", "prefill_attention") else (0,)
        points += _points(op, variants[op.kind], shares, tokens, kv_lens)
    for op in (*graph.prologue, *graph.epilogue):
        if (op.kind, op.shape) in seen:
            continue
        seen.add((op.kind, op.shape))
        points += _points(op, variants[op.kind], (num_sms,))
    return points


def collective_points(
    graph: OpGraph, num_sms: int, variants: Mapping[str, tuple[str, ...]]
) -> list[Point]:
    """All-reduces of the layer at every size and network share; needs all ranks."""
    by_shape = {op.shape: op for op in graph.layer if op.kind == "all_reduce"}
    shares = (*NETWORK_SHARES, num_sms)
    return [
        point
        for _, op in sorted(by_shape.items())
        for point in _points(op, variants["all_reduce"], shares)
    ]


def pair_points(
    graph: OpGraph, num_sms: int, variants: Mapping[str, tuple[str, ...]]
) -> list[tuple[Point, Point]]:
    """Co-runs of the ping-pong pipeline: each GEMM and prefill beside decode attention."""
    decode = graph.op("decode_attention")
    pairs: list[tuple[Point, Point]] = []

    def point(op_name: str, variant: str, tokens: int, kv_len: int, share: int) -> Point:
        return _points(graph.op(op_name), (variant,), (share,), (tokens,), (kv_len,))[0]

    def beside_decode(op_name: str, variant: str, kv_len: int, share: int) -> None:
        attention = point(decode.name, variants["decode_attention"][0], 512, 1024, num_sms - share)
        pairs.append((point(op_name, variant, 1024, kv_len, share), attention))

    persistent = [v for v in variants["gemm"] if v != "cublas"] or list(variants["gemm"])
    for share in (116, 100, 84, 68):
        beside_decode("up_gate", persistent[0], 0, share)
    beside_decode("up_gate", variants["gemm"][0], 0, 100)
    beside_decode("down", persistent[0], 0, 100)
    beside_decode("o_proj", persistent[0], 0, 100)
    beside_decode("kqv", persistent[0], 0, 100)
    beside_decode("prefill_attention", variants["prefill_attention"][0], 512, 100)
    return pairs


def sustained_points(
    graph: OpGraph, num_sms: int, variants: Mapping[str, tuple[str, ...]]
) -> list[Point]:
    """The largest GEMM of the layer, epilogue left out, on all SMs by the first two variants."""
    gemms = [op for op in graph.layer if op.kind in GEMM_KINDS]
    largest = max(gemms, key=lambda op: op.weight_elements)
    return _points(replace(largest, kind="gemm"), variants["gemm"][:2], (num_sms,), (max(TOKENS),))


def make_grid(
    graph: OpGraph,
    num_sms: int,
    variants: Mapping[str, tuple[str, ...]],
    *,
    with_collectives: bool,
    seed: int = 0,
) -> Grid:
    """The grid in a random order that depends on the seed alone."""
    rng = random.Random(seed)
    solo = solo_points(graph, num_sms, variants)
    rng.shuffle(solo)
    joule_points = frozenset(rng.sample(solo, round(JOULE_SHARE * len(solo))))
    if with_collectives:
        solo += collective_points(graph, num_sms, variants)
    return Grid(
        solo=tuple(solo),
        joule_points=joule_points,
        pairs=tuple(pair_points(graph, num_sms, variants)),
    )
