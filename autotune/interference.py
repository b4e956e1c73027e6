"""How much two kernels disturb each other when they run side by side: the measured pairs.

Of a pair that was not measured the nearest one speaks: same two kinds of op, else the same two
resources; shares by ratio. The kernel matters where memory binds: a GEMM beside an attention kernel
that draws twice the bytes on the same SMs waits longer, whatever its own tile is. So pairs with
another variant of a memory-bound op count as far away, and are taken where there are no others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import log
from typing import NamedTuple, cast

from ..profiler.profile import PairRow, Point
from ..runtime.op_graph import Op, OpKind
from ..runtime.op_shapes import RESOURCE_OF_KIND
from ..search_spaces.schema import HardwareSpec
from .roofline import memory_share

OTHER_KERNEL = 10.0
"""Distance between two variants of a memory-bound op: more than between any two shares."""


class Place(NamedTuple):
    """A kernel where it runs."""

    op: Op
    num_sms: int
    variant: str = ""
    """Any where empty."""


class _Measured(NamedTuple):
    """One side of a measured pair."""

    num_sms: int
    beside_sms: int
    variant: str
    beside_variant: str
    slowdown: float


class Interference:
    """The measured pairs of a profile, by kind and by resource."""

    def __init__(self, pairs: Iterable[PairRow], hardware: HardwareSpec) -> None:
        self.hardware = hardware
        self._pairs = _index(pairs)

    def slowdown(self, one: Place, beside: Place) -> float:
        """Time of a kernel beside another one / time alone on the same SMs; never below 1.

        The measured pair of these kinds with the nearest shares, else of these resources, else
        what sharing the memory bandwidth costs when both are bound by it. A transport on a share
        of 0 is like pairs with a share of 0 only. Without any, it and what runs beside it share
        the bandwidth as if they were bound by it, where copies at full speed draw twice the
        link's: 1.19 at most on an H200, which a GEMM should rather stay below.
        """
        kinds = one.op.kind, beside.op.kind
        resources = RESOURCE_OF_KIND[kinds[0]], RESOURCE_OF_KIND[kinds[1]]
        places = one.num_sms, beside.num_sms
        measured = self._like(kinds, places) or self._like(resources, places)
        if not measured:
            if resources != ("memory", "memory") and 0 not in places:
                return 1.0
            return max(1.0, sum(memory_share(sms, self.hardware) for sms in places))
        distances = [(_distance(pair, one, beside), pair.slowdown) for pair in measured]
        nearest = min(distance for distance, _ in distances)
        close = [slowdown for distance, slowdown in distances if distance <= nearest + 1e-9]
        return max(1.0, sum(close) / len(close))

    def _like(self, kinds: tuple[str, str], places: tuple[int, int]) -> list[_Measured]:
        """Measured pairs of two kinds or resources, with SMs and without them where asked so."""
        return [
            pair
            for pair in self._pairs.get(kinds, ())
            if (pair.num_sms > 0, pair.beside_sms > 0) == (places[0] > 0, places[1] > 0)
        ]


def _distance(pair: _Measured, one: Place, beside: Place) -> float:
    far = _share_distance(one.num_sms, pair.num_sms)
    far += _share_distance(beside.num_sms, pair.beside_sms)
    for place, variant in ((one, pair.variant), (beside, pair.beside_variant)):
        is_memory = RESOURCE_OF_KIND[place.op.kind] == "memory"
        if is_memory and place.variant and place.variant != variant:
            far += OTHER_KERNEL
    return far


def _share_distance(a: int, b: int) -> float:
    """How different two shares are, by ratio; a share of 0 is only ever compared with itself."""
    return 0.0 if a == b else abs(log(a / b))


def _index(pairs: Iterable[PairRow]) -> dict[tuple[str, str], tuple[_Measured, ...]]:
    """(kind or resource of A, of B) -> pairs, both ways round."""
    found = defaultdict[tuple[str, str], list[_Measured]](list)

    def add(a: Point, b: Point, slowdown: float) -> None:
        entry = _Measured(
            num_sms=a.num_sms,
            beside_sms=b.num_sms,
            variant=a.variant,
            beside_variant=b.variant,
            slowdown=slowdown,
        )
        kinds = cast(OpKind, a.kind), cast(OpKind, b.kind)
        found[kinds].append(entry)
        found[RESOURCE_OF_KIND[kinds[0]], RESOURCE_OF_KIND[kinds[1]]].append(entry)

    for pair in pairs:
        add(pair.a, pair.b, pair.slowdown_a)
        add(pair.b, pair.a, pair.slowdown_b)
    return {key: tuple(entries) for key, entries in found.items()}
