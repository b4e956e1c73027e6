"""Which kernels are measured side by side: pairs that fill the GPU, and three-way spot checks.

Pairs: a GEMM (the largest, the smallest of the layer) or prefill attention on the large share,
decode attention, a norm or a collective on the rest. Triples: the same with a third kernel, to see
how far the product of two measured slowdowns is off. Each runs in the variant that is fastest
alone on its share. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product, zip_longest
from math import log
from typing import TypeVar

from ..runtime.op_graph import Op, OpGraph
from ..runtime.plan import SM_FREE_VARIANTS
from .grid import Variants, is_collective
from .profile import PairRow, Point, Row, TripleRow

ItemT = TypeVar("ItemT")
Together = tuple[Point, ...]
"""Points that run side by side, the one with the largest share first."""
COMPUTE_SHARES = (0.76, 0.88, 0.64, 0.52, 0.82, 0.94)
"""Of all SMs, the most telling first: 100, 116, 84, 68, 108, 124 of 132."""
ROWS, DECODE_ROWS, DECODE_KEYS, PROMPT = 1024, 512, 1024, 512
NETWORK_SHARES = (16, 8)


class Fastest:
    """Names the variant that was fastest alone, at the nearest measured rows and share."""

    def __init__(self, rows: Iterable[Row], variants: Variants) -> None:
        self._variants = variants
        self._rows: dict[tuple[str, str, int], list[Row]] = {}
        for row in rows:
            if not row.error:
                key = row.point.kind, row.point.shape, row.point.kv_len
                self._rows.setdefault(key, []).append(row)

    def point(self, op: Op, tokens: int, kv_len: int, num_sms: int) -> Point:
        """The op in its fastest variant; in its first one where nothing was measured."""
        nearest: dict[str, tuple[float, float]] = {}
        for row in self._rows.get((op.kind, op.shape, kv_len), ()):
            point = row.point
            distance = abs(log(point.tokens / tokens)) + abs(log(point.num_sms / num_sms))
            us = row.median_us * (tokens / point.tokens) * (point.num_sms / num_sms)
            known = nearest.get(point.variant)
            if known is None or distance < known[0]:
                nearest[point.variant] = distance, us
        options = {name: us for name, (_, us) in nearest.items()}
        first = self._variants[op.kind][0]
        variant = min(options, key=lambda name: (options[name], name), default=first)
        return Point(
            kind=op.kind,
            shape=op.shape,
            variant=variant,
            tokens=tokens,
            kv_len=kv_len,
            num_sms=num_sms,
        )


def _large(part: float, num_sms: int, granularity: int) -> int:
    """The share near this part of all SMs that leaves whole groups to others."""
    return num_sms - granularity * max(1, round((1 - part) * num_sms / granularity))


def _compute_ops(graph: OpGraph) -> list[Op]:
    """Largest GEMM, smallest GEMM, prefill attention: what keeps the large share busy."""
    gemms = [op for op in graph.layer if op.resource == "compute" and op.weight_elements]
    largest = max(gemms, key=lambda op: op.weight_elements)
    smallest = min(gemms, key=lambda op: op.weight_elements)
    return [largest, smallest, *(op for op in graph.layer if op.kind == "prefill_attention")]


def _first(graph: OpGraph, kind: str) -> Op:
    return next(op for op in graph.layer if op.kind == kind)


def _compute_point(op: Op, fastest: Fastest, num_sms: int) -> Point:
    kv_len = PROMPT if op.kv_elements_per_key else 0
    return fastest.point(op, ROWS, kv_len, num_sms)


def pairs(graph: OpGraph, fastest: Fastest, num_sms: int, granularity: int) -> list[Together]:
    """Pairs of one GPU, the most telling first."""
    decode, norm = _first(graph, "decode_attention"), _first(graph, "norm")
    found: list[Together] = []
    for part in COMPUTE_SHARES:
        share = _large(part, num_sms, granularity)
        for op in _compute_ops(graph):
            beside = fastest.point(decode, DECODE_ROWS, DECODE_KEYS, num_sms - share)
            found.append((_compute_point(op, fastest, share), beside))
    for op in (_compute_ops(graph)[0], decode):
        share = _large(COMPUTE_SHARES[1], num_sms, granularity)
        alone = (
            fastest.point(op, DECODE_ROWS, DECODE_KEYS, share)
            if op is decode
            else _compute_point(op, fastest, share)
        )
        found.insert(6, (alone, fastest.point(norm, ROWS, 0, num_sms - share)))
    return found


def network_pairs(
    graph: OpGraph, fastest: Fastest, num_sms: int, variants: Variants
) -> list[Together]:
    """Largest and smallest GEMM beside every kind of collective; needs all ranks.

    Decode attention too, beside those that take no SMs: it then has all of them.
    """
    collectives = {op.kind: op for op in graph.all_ops if is_collective(op.kind)}
    decode, found = _first(graph, "decode_attention"), list[Together]()
    for op, turn in product(_compute_ops(graph)[:2], range(len(NETWORK_SHARES))):
        for other in collectives.values():
            for variant in variants[other.kind]:
                for share in _beside_shares(variant)[turn : turn + 1]:
                    beside = _collective(other, variant, share)
                    found.append((_compute_point(op, fastest, num_sms - share), beside))
    for other in collectives.values():
        attention = fastest.point(decode, DECODE_ROWS, DECODE_KEYS, num_sms)
        found += [
            (attention, _collective(other, variant, 0))
            for variant in variants[other.kind]
            if variant in SM_FREE_VARIANTS
        ]
    return found


def _beside_shares(variant: str) -> tuple[int, ...]:
    """Shares of a collective beside other kernels: none for one that takes no SMs."""
    return (0,) if variant in SM_FREE_VARIANTS else NETWORK_SHARES


def _collective(op: Op, variant: str, num_sms: int) -> Point:
    return Point(
        kind=op.kind, shape=op.shape, variant=variant, tokens=ROWS, kv_len=0, num_sms=num_sms
    )


def triples(graph: OpGraph, fastest: Fastest, num_sms: int, granularity: int) -> list[Together]:
    """Compute, decode attention and a norm side by side on one GPU."""
    decode, norm = _first(graph, "decode_attention"), _first(graph, "norm")
    large, small, prefill = _compute_ops(graph)[:3]
    found: list[Together] = []
    for op, groups_of_decode, groups_of_norm in (
        (large, 2, 2),
        (prefill, 4, 2),
        (small, 4, 2),
        (large, 6, 2),
        (large, 4, 4),
        (large, 1, 1),
    ):
        shares = groups_of_decode * granularity, groups_of_norm * granularity
        compute = _compute_point(op, fastest, num_sms - sum(shares))
        beside = fastest.point(decode, DECODE_ROWS, DECODE_KEYS, shares[0])
        found.append((compute, beside, fastest.point(norm, ROWS, 0, shares[1])))
    return found


def network_triples(
    graph: OpGraph, fastest: Fastest, num_sms: int, granularity: int, variants: Variants
) -> list[Together]:
    """The largest GEMM, decode attention and a collective side by side; needs all ranks."""
    decode = _first(graph, "decode_attention")
    collectives = {op.kind: op for op in graph.layer if is_collective(op.kind)}
    found: list[Together] = []
    for other in collectives.values():
        for variant in variants[other.kind]:
            size = 2 * granularity
            share = 0 if variant in SM_FREE_VARIANTS else size
            compute = _compute_point(_compute_ops(graph)[0], fastest, num_sms - size - share)
            beside = fastest.point(decode, DECODE_ROWS, DECODE_KEYS, size)
            found.append((compute, beside, _collective(other, variant, share)))
    return found


def in_turn(lists: Iterable[Sequence[ItemT]]) -> list[ItemT]:
    """The first of each list, then the second of each, and so on."""
    rounds = chain.from_iterable(zip_longest(*lists))
    return [item for item in rounds if item is not None]


def place_of(together: Together) -> tuple[object, ...]:
    """What is measured, whatever the variants: kinds, shapes, rows and shares.

    The variant of a collective counts: each is a case of its own.
    """
    return tuple(
        (p.kind, p.shape, p.tokens, p.kv_len, p.num_sms, p.variant if is_collective(p.kind) else "")
        for p in together
    )


def left(wanted: Iterable[Together], known: Iterable[PairRow | TripleRow]) -> list[Together]:
    """What was not measured yet, in any variants."""
    done = {
        place_of((row.a, row.b, row.c) if isinstance(row, TripleRow) else (row.a, row.b))
        for row in known
    }
    fresh: Mapping[tuple[object, ...], Together] = {place_of(item): item for item in wanted}
    return [item for place, item in fresh.items() if place not in done]
