"""A lower bound on the time of one layer that holds for every order: the configuration LP.

A configuration is a set of nano-ops that may run at the same instant: at most one of each lane,
on shares that fit on the GPU together, none of which waits for another one. In it each runs at the
rate 1 / (time alone on its share x its slowdown beside the others).

    minimise sum_c x_c                     x_c: time spent in configuration c, in us
    sum_c rate_ic x_c >= 1                 every nano-op i is done once a layer

Any schedule spends its time in configurations, so none is shorter. What the LP leaves out: when a
nano-op may start (order within a layer beyond "never beside"), that it keeps its share and runs in
one go, and synchronisation. A collective without SMs makes the norm behind it longer; that is a
linear term of the norm's row.

There are up to a million configurations, so columns are generated: prices v_i of a few columns,
then the configuration that earns most at these prices. Prices of any kind give a valid bound,

    sum_i v_i / max_c sum_i rate_ic v_i    (Farley)

so that stopping early, or having no LP solver at all, costs tightness and never truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .highs_banner import silence_banner

Array = NDArray[np.float64]

MAX_ROUNDS = 40
"""Of column generation; a round is one LP and one pricing."""
COLUMNS_A_ROUND = 24
TOLERANCE = 2e-4
"""Relative distance between the LP's value and the bound at which generation stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A nano-op on one share."""

    node: int
    """Which nano-op, counted over all nano-batches; of the first one where any may be meant."""
    op: int
    num_sms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """The options of three lanes, and how fast each runs beside those of the other lanes.

    `rates[lane][c, m, n]` are 1 / slowdown of each of a triple, 0 for all three where they must not
    run together. The last option of each lane is "nothing".
    """

    options: tuple[tuple[Option | None, ...], ...]
    rates: tuple[Array, Array, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Longer:
    """A collective without SMs makes the norm behind it longer."""

    option: int
    """Of the third lane."""
    norm: int
    """Node of the norm, in the option's own nano-batch."""
    parts: tuple[float, ...]
    """By nano-batch that may be meant: of the norm's time alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Times of one way to cut the batch."""

    num_nodes: int
    us: tuple[Array, ...]
    """By lane, [nano-batch that may be meant, option]: time alone; infinite for nothing to do."""
    stride: int
    """Nodes from one nano-batch to the next."""
    longer: tuple[Longer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBound:
    """What was proved, and the prices that prove it."""

    us: float
    prices: Array
    """By node, in us."""
    rounds: int


class _Earnings:
    """What each configuration earns per us at some prices, an array over all triples."""

    def __init__(self, lanes: Lanes, work: Work, prices: Array) -> None:
        self.batch: list[NDArray[np.intp]] = []
        """By lane and option: the nano-batch that earns most."""
        parts: list[Array] = []
        for lane, (options, us) in enumerate(zip(lanes.options, work.us, strict=True)):
            first = np.array([0 if option is None else option.node for option in options])
            nodes = first[None, :] + work.stride * np.arange(len(us))[:, None]
            values = prices[nodes] / us
            for one in work.longer if lane == 2 else ():
                norms = one.norm + work.stride * np.arange(len(us))
                values[:, one.option] -= np.array(one.parts) * prices[norms] / us[:, one.option]
            self.batch.append(values.argmax(axis=0))
            parts.append(values.max(axis=0))
        first, second, third = parts
        self.values = lanes.rates[0] * first[:, None, None]
        self.values += lanes.rates[1] * second[None, :, None]
        self.values += lanes.rates[2] * third[None, None, :]
        self.most = float(self.values.max())
        self.bound_us = float(prices.sum()) / self.most if self.most > 0 else 0.0

    def promising(self) -> list[tuple[int, int, int]]:
        """The best configuration of each option of the first lane, best first."""
        flat = self.values.reshape(self.values.shape[0], -1)
        at = flat.argmax(axis=1)
        most = flat[np.arange(len(at)), at]
        chosen = np.argsort(-most, kind="stable")[:COLUMNS_A_ROUND]
        _, width, depth = self.values.shape
        assert width * depth == flat.shape[1]
        return [(int(c), int(at[c]) // depth, int(at[c]) % depth) for c in chosen]


def price_bound(lanes: Lanes, work: Work, prices: Array) -> float:
    """The bound that these prices prove, in us (Farley)."""
    return _Earnings(lanes, work, prices).bound_us


def layer_bound(lanes: Lanes, work: Work, prices: Array, enough_us: float) -> LayerBound:
    """The best bound of the LP.

    Args:
        lanes: all configurations.
        work: times of one cut.
        prices: to begin with, by node.
        enough_us: a bound of so much is not improved further.
    """
    best = LayerBound(us=0.0, prices=prices, rounds=0)
    master = _Master(lanes, work)
    for round_number in range(1, MAX_ROUNDS + 1):
        earnings = _Earnings(lanes, work, prices)
        if earnings.bound_us > best.us:
            best = LayerBound(us=earnings.bound_us, prices=prices, rounds=round_number)
        is_solved = round_number > 1 and earnings.most <= 1 + TOLERANCE
        if is_solved or best.us >= enough_us or not master.is_available:
            break
        for place in earnings.promising():
            master.add(_column(lanes, work, earnings, place))
        prices = master.prices()
    return best


class _Column(NamedTuple):
    """A configuration: what it does per us."""

    nodes: tuple[int, ...]
    rates: tuple[float, ...]


def _column(lanes: Lanes, work: Work, earnings: _Earnings, place: tuple[int, int, int]) -> _Column:
    done: dict[int, float] = {}
    for lane, index in enumerate(place):
        option, batch = lanes.options[lane][index], int(earnings.batch[lane][index])
        us = float(work.us[lane][batch, index])
        rate = float(lanes.rates[lane][place]) / us
        if option is not None and rate > 0:
            done[option.node + work.stride * batch] = rate
            for one in work.longer:
                if lane == 2 and one.option == index:
                    norm = one.norm + work.stride * batch
                    done[norm] = done.get(norm, 0.0) - one.parts[batch] * rate
    return _Column(tuple(done), tuple(done.values()))


class _Master:
    """The LP over the columns known so far, in HiGHS."""

    def __init__(self, lanes: Lanes, work: Work) -> None:
        self.is_available = True
        try:
            import highspy
        except ImportError:  # the first prices alone are a bound too
            self.is_available = False
            return
        silence_banner()
        self._known: set[_Column] = set()
        self._highs: Any = highspy.Highs()
        self._highs.setOptionValue("output_flag", False)
        self._highs.setOptionValue("threads", 2)
        least = _least(lanes, work)
        for node in range(work.num_nodes):
            self._highs.addRow(1.0 if least[node] > 0 else 0.0, highspy.kHighsInf, 0, [], [])
        for node in np.flatnonzero(least > 0):
            self.add(_Column((int(node),), (1.0 / float(least[node]),)))

    def add(self, column: _Column) -> None:
        """A configuration; those known are left out."""
        if column in self._known or not column.nodes:
            return
        self._known.add(column)
        nodes, rates = np.array(column.nodes, np.int32), np.array(column.rates)
        self._highs.addCol(1.0, 0.0, 1e30, len(nodes), nodes, rates)

    def prices(self) -> Array:
        """Dual values of the rows."""
        self._highs.run()
        duals = np.array(self._highs.getSolution().row_dual, dtype=np.float64)
        return np.maximum(duals, 0.0)


def _least(lanes: Lanes, work: Work) -> Array:
    """Least time alone of each node; 0 without rows."""
    least = np.full(work.num_nodes, np.inf)
    for options, us in zip(lanes.options, work.us, strict=True):
        for place, option in enumerate(options):
            if option is None:
                continue
            for batch in range(len(us)):
                node = option.node + work.stride * batch
                least[node] = min(least[node], us[batch, place])
    least[~np.isfinite(least)] = 0.0
    return least
