"""What the configuration LP of a cut is about: options of nano-ops, and what may run together.

Made by `configurations.py`; `configuration_lp.py` and `progress_lp.py` solve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Singles = NDArray[np.float32]
Indices = NDArray[np.intp]

NOTHING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Clocks x in a range, as parts of the highest; and what is beyond the layers at them."""

    high: float
    low: float
    num_layers: int
    beyond_us: float
    """Time, at the upper end."""
    us_per_joule: tuple[float, float]
    """Time that the cap asks for a dynamic joule (at the highest clock), at both ends, the lower
    one first; 0 without a cap."""
    beyond_cap_us: float
    """Joules, as time."""

    def joined_us(self, layer: float, time_price: float, joule_price: float) -> float:
        """The bound that prices prove, of which those of the nano-ops add up to `layer`."""
        both = time_price + joule_price
        if both <= 0:
            return 0.0
        beyond = time_price * self.beyond_us + joule_price * self.beyond_cap_us
        return (self.num_layers * layer + beyond) / both


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The options of one lane: a nano-op on a share in a variant. The last one is "nothing"."""

    node: Indices
    """`NOTHING` for nothing."""
    us: Array
    """Time at the highest clock, with nothing slowing it."""
    sync_us: Array
    """Synchronisation before it, which follows no clock."""
    alone_sync_us: Array
    """The same with nothing beside it."""
    stretch: Array
    """Clock below which it is longer in proportion."""
    joules: Array
    """Dynamic, at the highest clock."""
    is_hidden: NDArray[np.bool_]
    """Memory-bound: of what the clock and the neighbours cost it, the larger counts."""

    def factor(self, clock: float) -> Array:
        """How much longer it takes at a clock."""
        return np.maximum(1.0, self.stretch / clock)

    def factor_in(self, clock: float, cell: Cell) -> Array:
        """The same at an end of a cell: of the upper end where it follows the clock in a part."""
        is_part = (self.stretch > cell.low) & (self.stretch < cell.high)
        return np.where(is_part, self.factor(cell.high), self.factor(clock))

    def alone_us(self, clock: float) -> Array:
        """Time with nothing beside it."""
        return self.us * self.factor(clock) + self.alone_sync_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """The configurations: triples of options, one of each lane, that may run together."""

    places: tuple[Indices, Indices, Indices]
    """By lane, the option of each configuration; all in order of the first lane's."""
    slowdowns: tuple[Singles, Singles, Singles]
    """Product of the pairwise slowdowns of the option of each lane beside the others."""
    numbers: Indices
    """By which a configuration is known where some are left out; rising."""

    @property
    def size(self) -> int:
        """Number of configurations."""
        return len(self.places[0])

    def kept(self, keep: Sequence[NDArray[np.bool_]]) -> Together:
        """Those of some options only, which are numbered anew."""
        stays = np.ones(self.size, dtype=bool)
        for place, mask in zip(self.places, keep, strict=True):
            stays &= mask[place]
        renamed = [np.cumsum(mask) - 1 for mask in keep]
        first, second, third = (
            new[place[stays]] for new, place in zip(renamed, self.places, strict=True)
        )
        slow_1, slow_2, slow_3 = (slow[stays] for slow in self.slowdowns)
        return Together(
            places=(first, second, third),
            slowdowns=(slow_1, slow_2, slow_3),
            numbers=self.numbers[stays],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Longer:
    """A collective without SMs makes the norm behind it longer."""

    option: int
    """Of the third lane."""
    norm: int
    """Node."""
    part: float
    """Of the norm's time alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """Chains of nodes of which exactly one is done."""

    chains: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The LP of one cut."""

    lanes: tuple[Lane, Lane, Lane]
    together: Together
    has_work: NDArray[np.bool_]
    """By node."""
    forms: tuple[Forms, ...] = ()
    longer: tuple[Longer, ...] = ()

    def total(self, prices: Array) -> float:
        """What nodes that must be done earn at least; of forms the cheapest."""
        optional = [node for forms in self.forms for chain in forms.chains for node in chain]
        whole = float(prices[self.has_work].sum() - prices[optional].sum())
        chosen = sum(
            min(float(prices[list(chain)].sum()) for chain in forms.chains) for forms in self.forms
        )
        return whole + chosen
