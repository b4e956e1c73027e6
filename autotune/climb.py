"""Local search over cut, forms, order and shares of one period, priced in its steady state.

Simulated annealing: a change is kept when the period gets no longer than a little, and that little
falls to nothing. A change is one of

    share    of a node, of a macro op in all nano-batches, or of all nodes of a lane with one share
    beside   of a node off the compute lane, with compute nodes around it given what it leaves
    order    a node moves to another place
    slide    a nano-batch's nodes move together against the others'
    cut      a boundary moves, or the row order changes
    form     of a nano-batch

The value of a period is its time where its joules keep the power cap, from its time at two clocks.
The number of evaluations is limited, never the time, so that a seed gives one result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

from ..runtime.legality import check
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Candidate, Schedule
from ..runtime.schedule import IllegalScheduleError, output_forms
from ..search_spaces.schema import SearchSpace
from .cost_model import CostModel
from .cut_bounds import space_shares
from .many_batches import even_sizes, round_robin
from .milp_input import Split
from .patterns import has_sm_free, macro_ops, total_tokens
from .power_model import Load, PowerModel, period_at
from .refine import placed_of
from .simulator import Simulator, predict
from .steady import LANES, Layer, Period, SteadyCut

REPEATS = 8
"""Changes looked at for each new evaluation, at most: many lead back to periods that are known."""
HOTTEST = 0.001
"""By how much of the period a change may lengthen it at first, on average."""
STARTS = 8
"""Best starts that are climbed from."""
SIDES = 1, 2, 3
"""Eighths of the SMs that attention has in the first round robins."""
ALL_TRIALS = 60
"""Simulator trials of a space below which evaluations fall with their square."""
FEW_MACROS = 6
NARROW, DEEP, FINALISTS = 20, 50, 2
"""Evaluations for each simulator trial of the space: of even cuts into every number of nano-batches
in each row order, then of all cuts from the best two of these."""
NEARBY = 0.06
"""How far from the expected clock the two clocks are."""
HOPELESS = 1.03
"""Times the best known period: from there the second search has never come back."""
POLISH, NEAR = 6, 0.003
"""Changes of the best one for each trial, and how much longer its steady period may get by them."""
WRITTEN = 8
"""Best periods that are written down and simulated whole."""
NEVER_US = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """How time and joules of a layer make the period of an iteration."""

    num_layers: int
    clocks: tuple[float, ...]
    power: PowerModel | None
    """None: nothing is known of joules, and the only clock is the highest."""
    overhead: tuple[Load, ...]
    """Beyond the layers; empty without a power model."""
    overhead_us: float

    def period_us(self, layer: Layer) -> float:
        """At the cap."""
        if self.power is None:
            return layer.us[0] * self.num_layers + self.overhead_us
        periods = {
            clock: us * self.num_layers + sum(load.us_at(clock) for load in self.overhead)
            for clock, us in zip(self.clocks, layer.us, strict=True)
        }
        joules = layer.joules * self.num_layers + sum(load.joules for load in self.overhead)
        clock = self.power.clock_under_cap(joules, lambda x: period_at(periods, x))
        return period_at(periods, clock)


class Climb:
    """The search of one job."""

    def __init__(
        self,
        graph: OpGraph,
        cost_model: CostModel,
        space: SearchSpace,
        mix: RowMix,
        *,
        clock: float,
        is_powered: bool,
        seed: int,
    ) -> None:
        self.graph, self.cost_model, self.space, self.mix = graph, cost_model, space, mix
        self.rng, self.macros = Random(seed), macro_ops(graph)
        power = cost_model.power if is_powered else None
        clocks = (min(1.0, clock * (1 + NEARBY)), clock * (1 - NEARBY)) if power else (1.0,)
        self.worth = Worth(
            num_layers=graph.num_layers,
            clocks=clocks,
            power=power,
            overhead=cost_model.overhead_loads(graph, mix) if power else (),
            overhead_us=cost_model.iteration_overhead_us(graph, mix),
        )
        is_free = has_sm_free(graph, cost_model)
        self.shares = [space_shares(lane, cost_model, space, is_free) for lane in LANES]
        self.cuts: dict[Split, SteadyCut] = {}
        self.seen: dict[Period, float] = {}

    def cut(self, split: Split) -> SteadyCut:
        """Prices of a cut."""
        if split not in self.cuts:
            price = self.cost_model.price(self.graph, self.mix)
            self.cuts[split] = SteadyCut(
                self.graph, self.cost_model, self.mix, split, self.worth.clocks, price
            )
        return self.cuts[split]

    def value(self, period: Period) -> float:
        """Period in us, infinite where illegal."""
        if period not in self.seen:
            layer = self.cut(period.split).layer(period)
            self.seen[period] = self.worth.period_us(layer) if layer else NEVER_US
        return self.seen[period]

    # -- starts --------------------------------------------------------------------------------

    def starts(self, num_batches: int, known: Sequence[Schedule]) -> list[Period]:
        """Known schedules of so many nano-batches, and round robins on a few shares."""
        total, step = total_tokens(self.mix), self.space.token_granularity
        sizes = even_sizes(num_batches, total, step)
        if min(sizes) <= 0:
            return []
        found = [self._read(s) for s in known if len(s.nano_batches) == num_batches]
        periods = [period for period in found if period is not None]
        count, whole = len(self.macros), self.cost_model.hardware.num_sms
        links = self.shares[2] if self.graph.tp_degree > 1 else [0]
        parts = [s for s in self.shares[1] if s < whole]
        sides = [min(parts, key=lambda s: abs(8 * s - k * whole)) for k in SIDES]
        for row_order, form, lag in product(self.space.row_orders, self.graph.forms, (0, 1)):
            split = Split(sizes=sizes, row_order=row_order)
            order = [b * count + m for m, b, _ in round_robin(self.graph, num_batches, lag)]
            lanes = self.cut(split).lane
            for side, link in product(
                sorted({*sides, whole}), sorted({links[0], links[len(links) // 2]})
            ):
                compute = whole - (max(side, link) if side < whole else link)
                share = compute if compute in self.shares[0] else whole, side, link
                periods.append(
                    Period(
                        split=split,
                        forms=(form,) * num_batches,
                        order=tuple(order),
                        shares=tuple(share[lane] for lane in lanes),
                    )
                )
        return [p for p in periods if self.value(p) < NEVER_US]

    def _read(self, schedule: Schedule) -> Period | None:
        """A known schedule as a period; None where it has another structure."""
        sizes = tuple(batch.num_tokens for batch in schedule.nano_batches)
        forms = output_forms(schedule, self.graph)
        if any(len(some) != 1 for some in forms):
            return None
        for row_order in self.space.row_orders:
            split = Split(sizes=sizes, row_order=row_order)
            cut = self.cut(split)
            if cut.batches != schedule.nano_batches:
                continue
            placed = placed_of(schedule, self.graph)
            shares = [0] * cut.num_nodes
            for place in placed:
                shares[place.batch * len(self.macros) + place.macro] = place.num_sms
            order = tuple(place.batch * len(self.macros) + place.macro for place in placed)
            if sorted(order) != list(range(cut.num_nodes)):
                return None
            return Period(
                split=split,
                forms=tuple(form for (form,) in forms),
                order=order,
                shares=tuple(shares),
            )
        return None

    # -- climbing ------------------------------------------------------------------------------

    def run(self, starts: Sequence[Period], evaluations: int, *, is_cut_kept: bool) -> list[Period]:
        """The best periods found from these starts, best first."""
        first = len(self.seen)
        changes = [self._share] * 6 + [self._beside] * 3 + [self._order] * 6 + [self._slide] * 3
        changes += [self._form] * (len(self.graph.forms) > 1)
        changes += [] if is_cut_kept else [self._cut] * 2
        tops = sorted(starts, key=self.value)[:STARTS]
        here = tops[0]
        for step in range(REPEATS * evaluations):
            done = max((len(self.seen) - first) / evaluations, step / (REPEATS * evaluations))
            if done >= 1:
                break
            other = self.rng.choice(changes)(here)
            heat = HOTTEST * (1 - done) ** 2
            if self.value(other) > self.value(here) * (1 + heat * self.rng.expovariate(1.0)):
                continue
            here = other
            if self.value(here) < self.value(tops[-1]) and here not in tops:
                tops = sorted([*tops, here], key=self.value)[:STARTS]
        return tops[:WRITTEN]

    def _near(self, lane: int, share: int) -> int:
        """Another share, often a neighbour."""
        options = self.shares[lane]
        if share in options and self.rng.random() < 0.5:
            at = options.index(share) + self.rng.choice((-1, 1))
            return options[max(0, min(len(options) - 1, at))]
        return self.rng.choice(options)

    def _share(self, here: Period) -> Period:
        lanes, shares = self.cut(here.split).lane, list(here.shares)
        node = self.rng.randrange(len(shares))
        old, new, how = shares[node], self._near(lanes[node], shares[node]), self.rng.random()
        for other, share in enumerate(here.shares):
            same_op = how < 0.3 and (other - node) % len(self.macros) == 0
            same_share = how > 0.8 and lanes[other] == lanes[node] and share == old
            if other == node or same_op or same_share:
                shares[other] = new
        return replace(here, shares=tuple(shares))

    def _beside(self, here: Period) -> Period:
        lanes, shares, order = self.cut(here.split).lane, list(here.shares), here.order
        node = self.rng.choice([n for n in order if lanes[n] != 0])
        share = self._near(lanes[node], shares[node])
        left = self.cost_model.hardware.num_sms - share
        if left not in self.shares[0]:
            return here
        shares[node] = share
        if self.rng.random() < 0.4:  # what is not beside it has the whole GPU again
            whole = self.cost_model.hardware.num_sms
            shares = [s if lanes[n] else whole for n, s in enumerate(shares)]
        at = order.index(node) + self.rng.randint(-2, 1)
        for step in range(self.rng.randint(1, max(1, len(order) // 2))):
            other = order[(at + step) % len(order)]
            if lanes[other] == 0:
                shares[other] = left
        return replace(here, shares=tuple(shares))

    def _order(self, here: Period) -> Period:
        order = list(here.order)
        old = self.rng.randrange(len(order))
        node = order.pop(old)
        order.insert((old + self.rng.choice((-3, -2, -1, 1, 2, 3))) % (len(order) + 1), node)
        return replace(here, order=tuple(order))

    def _slide(self, here: Period) -> Period:
        """Places of one nano-batch's nodes are filled by its ring, turned."""
        count = len(self.macros)
        batch, by = self.rng.randrange(len(here.forms)), self.rng.choice((-2, -1, 1, 2))
        mine = [n for n in here.order if n // count == batch]
        turned = iter(mine[by:] + mine[:by])
        order = [next(turned) if n // count == batch else n for n in here.order]
        return replace(here, order=tuple(order))

    def _cut(self, here: Period) -> Period:
        sizes, step = list(here.split.sizes), self.space.token_granularity
        if len(self.space.row_orders) > 1 and self.rng.random() < 0.2:
            others = [o for o in self.space.row_orders if o != here.split.row_order]
            return replace(here, split=replace(here.split, row_order=self.rng.choice(others)))
        giver, taker = self.rng.sample(range(len(sizes)), 2)
        rows = step * self.rng.choice((1, 1, 2))
        if sizes[giver] <= rows or sum(sizes[:-1]) % step:
            return here
        sizes[giver], sizes[taker] = sizes[giver] - rows, sizes[taker] + rows
        return replace(here, split=replace(here.split, sizes=tuple(sizes)))

    def _form(self, here: Period) -> Period:
        forms = list(here.forms)
        forms[self.rng.randrange(len(forms))] = self.rng.choice(self.graph.forms)
        return replace(here, forms=tuple(forms))

    def polished(self, here: Period, evaluations: int) -> dict[Period, Candidate | None]:
        """Periods near one that are better when simulated whole, filling and draining included."""
        best, found = self.written(here), dict[Period, Candidate | None]()
        changes = [self._share] * 4 + [self._order] * 2 + [self._slide]
        for _ in range(evaluations):
            other = self.rng.choice(changes)(here)
            if other == here or self.value(other) > self.value(here) * (1 + NEAR):
                continue
            candidate = self.written(other)
            if candidate and best and candidate.predicted.period_us < best.predicted.period_us:
                here, best = other, candidate
                found[here] = best
        return found

    # -- results -------------------------------------------------------------------------------

    def written(self, period: Period) -> Candidate | None:
        """Simulated whole, with the kernels of the batch's price of a joule or of its own."""
        cut, hardware, best = self.cut(period.split), self.cost_model.hardware, None
        name = "overlapped_climbed"
        price = cut.price
        for _ in range(2):
            try:
                schedule = cut.schedule(period, name, price)
                check(schedule, self.graph, hardware.num_sms, hardware.sm_granularity)
            except IllegalScheduleError:
                return best
            timing = predict(schedule, self.graph, self.cost_model, self.mix)
            if best is None or timing.period_us < best.predicted.period_us:
                best = Candidate(schedule=schedule, predicted=timing)
            price = Simulator(schedule, self.graph, self.cost_model, self.mix).price()
        return best


def climbed(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    *,
    known: Sequence[Candidate],
    most_batches: int,
    seed: int,
) -> list[Candidate]:
    """The best schedules of two and more nano-batches that local search finds.

    Args:
        graph: of one rank.
        cost_model: durations, joules and slowdowns.
        space: shares, granularity, row orders; evaluations by its simulator trials.
        mix: rows of the dense batch.
        known: the race so far, sequential first; overlapped ones are climbed from.
        most_batches: largest number of nano-batches, at least two.
        seed: of all choices.
    """
    if total_tokens(mix) < 2:
        return []
    power = cost_model.power
    is_powered = power is not None and known[0].predicted.source != "roofline"
    overlapped = sorted(
        (c for c in known if c.schedule.is_overlapped), key=lambda c: c.predicted.period_us
    )
    expected = (overlapped or known)[0].predicted.sm_clock_mhz
    clock = expected / power.max_clock_mhz if power is not None and is_powered else 1.0
    climb = Climb(graph, cost_model, space, mix, clock=clock, is_powered=is_powered, seed=seed)
    schedules = [c.schedule for c in overlapped]
    trials = space.simulator_trials * min(1.0, space.simulator_trials / ALL_TRIALS)
    trials *= min(1.0, FEW_MACROS / len(climb.macros))  # larger periods take longer to price
    narrow, deep = max(1, round(NARROW * trials)), max(1, round(DEEP * trials))
    groups: list[list[Period]] = []
    for count in range(2, max(2, most_batches) + 1):
        starts = climb.starts(count, schedules)
        for row_order in space.row_orders:
            mine = [p for p in starts if p.split.row_order == row_order]
            if mine:
                groups.append(climb.run(mine, max(1, 2 * narrow // count), is_cut_kept=True))
    groups.sort(key=lambda periods: climb.value(periods[0]))
    known_us = min(c.predicted.period_us for c in known)
    hopeful = [some for some in groups[:FINALISTS] if climb.value(some[0]) < HOPELESS * known_us]
    tops = [p for some in hopeful for p in climb.run(some, deep, is_cut_kept=False)]
    tops.sort(key=climb.value)
    chosen = dict.fromkeys([*tops[:WRITTEN], *(some[0] for some in groups)])
    written = {period: climb.written(period) for period in chosen}
    ranked = sorted(
        (
            (c.predicted.period_us, number, period)
            for number, (period, c) in enumerate(written.items())
            if c
        )
    )
    if ranked:
        written |= climb.polished(ranked[0][2], round(POLISH * trials))
    found = [c for c in written.values() if c is not None]
    return sorted(found, key=lambda candidate: candidate.predicted.period_us)


def words(found: Sequence[Candidate], before_us: float) -> str:
    """What local search found, in words."""
    if not found:
        return "no schedule of two nano-batches finds places"
    sizes = "+".join(str(batch.num_tokens) for batch in found[0].schedule.nano_batches)
    return (
        f"{found[0].predicted.period_us / 1e3:.2f} ms with {sizes} rows, the best of the race was "
        f"{before_us / 1e3:.2f} ms"
    )
