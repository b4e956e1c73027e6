"""The search: baselines, structure, refinement, race; from an op graph and costs to a winner.

    baselines -> best of the ping-pong family -> MILP -> Optuna on the simulator
      -> (with a GPU) measure the race, then Optuna on the hardware -> winner

The sequential schedule is always in the race. An overlapped one wins on predictions only when it
is more than `PREDICTED_MARGIN` faster, because predictions are no better than that; on
measurements only when it measured faster by more than `MEASURED_MARGIN`. The best overlapped
schedule is reported either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..runtime.legality import check
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Candidate, Schedule
from ..runtime.schedule import IllegalScheduleError, concurrent_pairs
from ..search_spaces.schema import HardwareSpec, SearchSpace
from .baselines import (
    PingPongChoice,
    PingPongOrder,
    equal_split,
    equal_split_choice,
    nano_only,
    ping_pong,
    sequential,
    whole_gpu_choice,
)
from .bounds import lower_bound_us, power_limit_of, what_binds
from .cost_model import CostModel
from .milp import Certificate
from .patterns import COMPUTE, MEMORY, NETWORK
from .refine import Family, Measure, placed_of, refine
from .simulator import predict
from .structure import find_structure

PREDICTED_MARGIN = 0.02
"""A schedule must be predicted faster than the sequential one by more than this part to win: the
error of predictions against the measured iterations in results/."""
MEASURED_MARGIN = 0.005
"""The same for measured ones: medians of one interleaved run repeat to about this part."""
MEASURED_FROM_SIMULATOR = 4
"""Best refined schedules of the simulator that are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found for one dense-batch size and mix."""

    winner: Candidate
    sequential: Candidate
    best_overlapped: Candidate
    race: tuple[Candidate, ...]
    """Sequential first, then by best known time."""
    certificate: Certificate
    lower_bound_us: float
    power_limit_us: float
    """0 where no energy model is known."""
    bound: str
    """`compute`, `memory`, `network` or `power`."""
    history: tuple[tuple[int, str, float], ...]
    """(number, schedule name, period in us) of everything tried, in order."""
    seed: int


def _silent(_: str) -> None:
    """Progress nobody reads."""


@dataclass(slots=True, kw_only=True)
class _Search:
    """One search under way: its inputs, and what it tried."""

    graph: OpGraph
    cost_model: CostModel
    hardware: HardwareSpec
    space: SearchSpace
    mix: RowMix
    seed: int
    storage: str | None
    on_progress: Callable[[str], None]
    measure: Measure | None
    tried: list[Candidate]

    def add(self, schedule: Schedule) -> Candidate:
        """Check and predict a schedule, and enter it into the race."""
        check(schedule, self.graph, self.hardware.num_sms, self.hardware.sm_granularity)
        timing = predict(schedule, self.graph, self.cost_model, self.mix)
        candidate = Candidate(schedule=schedule, predicted=timing)
        self.tried.append(candidate)
        return candidate

    def is_legal(self, schedule: Schedule) -> bool:
        """Whether it may run on this GPU."""
        try:
            check(schedule, self.graph, self.hardware.num_sms, self.hardware.sm_granularity)
        except IllegalScheduleError:
            return False
        return True

    def baselines(self) -> Candidate:
        """Sequential (returned), nano-only in each row order, equal split."""
        first = self.add(sequential(self.graph, self.cost_model, self.mix))
        for order in self.space.row_orders:
            self.add(nano_only(self.graph, self.cost_model, self.mix, order))
        self.add(equal_split(self.graph, self.cost_model, self.mix, self.space))
        return first

    def family(self, structure: Schedule | None = None) -> Family:
        """What the refinement searches, around a structure of two nano-batches."""
        has_two = structure is not None and len(structure.nano_batches) == 2
        placed = placed_of(structure, self.graph) if structure and has_two else ()
        return Family(
            graph=self.graph,
            cost_model=self.cost_model,
            space=self.space,
            mix=self.mix,
            structure=placed,
        )

    def _ping_pong_grid(self) -> Iterator[PingPongChoice]:
        """Half splits, all orders and shares that fit."""
        family, num_sms = self.family(), self.hardware.num_sms
        half = min(family.first_tokens(), key=lambda n: abs(2 * n - self.mix.tokens))
        if family.is_sm_free:
            for rows in self.space.row_orders:
                yield whole_gpu_choice(half, rows, num_sms)
        orders: tuple[PingPongOrder, ...] = ("blocks", "interleaved")
        shares = product(*(family.shares(lane) for lane in (COMPUTE, MEMORY, NETWORK)))
        for (compute, memory, network), rows, order in product(
            shares, self.space.row_orders, orders
        ):
            if compute + max(memory, network) > num_sms:
                continue
            yield PingPongChoice(
                first_tokens=half,
                row_order=rows,
                compute_sms=compute,
                memory_sms=memory,
                network_sms=network,
                order=order,
            )

    def best_ping_pongs(self) -> list[PingPongChoice]:
        """Best members of a coarse grid: half splits, all orders and shares that fit.

        Two where collectives can go without SMs, best first: the best on partitions, and the best
        on the whole GPU, as how much that one hides is better measured than predicted.
        """
        found: list[tuple[PingPongChoice, Candidate]] = []
        for choice in self._ping_pong_grid():
            is_whole = choice.order == "alternating"
            name = "overlapped_whole_gpu" if is_whole else "overlapped_ping_pong"
            try:
                schedule = ping_pong(self.graph, self.cost_model, self.mix, choice, name)
            except IllegalScheduleError:
                continue  # its shares find no places, in any order
            if not self.is_legal(schedule):
                continue
            timing = predict(schedule, self.graph, self.cost_model, self.mix)
            found.append((choice, Candidate(schedule=schedule, predicted=timing)))
        if not found:
            choice = equal_split_choice(self.graph, self.mix, self.hardware, self.space)
            return [choice]
        found.sort(key=lambda pair: pair[1].predicted.period_us)
        names = dict.fromkeys(candidate.schedule.name for _, candidate in found)
        best = [next(pair for pair in found if pair[1].schedule.name == name) for name in names]
        self.tried += [candidate for _, candidate in best]
        return [choice for choice, _ in best]

    def structures(self, known: Sequence[Candidate]) -> tuple[Schedule | None, Certificate]:
        """The MILP's schedule; solved again for two nano-batches if it prefers one.

        Returns:
            The overlapped structure, if there is one, and the certificate of the whole model.
        """
        ranked = sorted(known, key=lambda candidate: candidate.predicted.period_us)
        schedules = [candidate.schedule for candidate in ranked]
        found, certificate = self._solve(schedules, 1)
        is_single = found is None or len(found.nano_batches) == 1
        if is_single and self.space.max_nano_batches > 1:
            overlapped = [s for s in schedules if s.is_overlapped]
            found, _ = self._solve(overlapped, 2)
        return found, certificate

    def _solve(
        self, known: Sequence[Schedule], least_batches: int
    ) -> tuple[Schedule | None, Certificate]:
        """One MILP; its schedule enters the race."""
        found, certificate = find_structure(
            self.graph,
            self.cost_model,
            self.space,
            self.mix,
            seed=self.seed,
            known=known,
            least_batches=least_batches,
        )
        if found is not None and not self.is_legal(found):
            self.on_progress("structure MILP: its shares fit in pairs only, left out")
            found = None
        if found is not None:
            self.add(found)
        self.on_progress(
            f"structure MILP: {certificate.status}, layer {certificate.period_us:.0f} us, bound "
            f"{certificate.bound_us:.0f} us, gap {100 * certificate.gap:.1f} %, "
            f"{certificate.seconds:.1f} s"
        )
        return found, certificate

    def refine(self, structure: Schedule | None, choices: Sequence[PingPongChoice]) -> None:
        """Optuna on the simulator, around the structure, the best ping-pong and the equal split."""
        family = self.family(structure)
        equal = equal_split_choice(self.graph, self.mix, self.hardware, self.space)
        first = [family.parameters(choice) for choice in (*choices, equal)]
        if structure is not None and family.structure:
            first = [family.structure_parameters(structure), *first]
        enqueue = [parameters for parameters in first if parameters]
        self.tried += refine(
            family,
            trials=self.space.simulator_trials,
            seed=self.seed,
            storage=self.storage,
            enqueue=enqueue,
        )
        if self.measure is None:
            return
        self.measure_race()
        self.tried += refine(
            replace(family, is_variant_free=True),
            trials=self.space.hardware_trials,
            seed=self.seed,
            storage=self.storage,
            enqueue=enqueue,
            measure=self.measure,
        )
        self.measure_final()

    def measure_final(self) -> None:
        """Sequential and the fastest few, once more, in one run: they decide who wins."""
        measured = [c for c in distinct(self.tried) if c.measured is not None]
        base = next(c for c in measured if c.schedule.name == "sequential")
        others = [c for c in measured if c is not base]
        others.sort(key=lambda candidate: candidate.best_known.period_us)
        overlapped = [c for c in others if c.schedule.is_overlapped]
        self._measure(distinct([base, *others[:2], *overlapped[:3]]))

    def measure_race(self) -> None:
        """Measure every named schedule and the best few refined ones, together."""
        race = distinct(self.tried)
        refined = [c for c in race if c.schedule.name == "overlapped_refined"]
        refined.sort(key=lambda candidate: candidate.predicted.period_us)
        named = [c for c in race if c.schedule.name != "overlapped_refined"]
        chosen = named + refined[:MEASURED_FROM_SIMULATOR]
        self._measure(chosen)

    def _measure(self, chosen: Sequence[Candidate]) -> None:
        assert self.measure is not None
        self.on_progress(f"measuring {len(chosen)} schedules on the GPU")
        timings = self.measure([candidate.schedule for candidate in chosen])
        self.tried += [
            replace(candidate, measured=timing)
            for candidate, timing in zip(chosen, timings, strict=True)
        ]


def search(
    graph: OpGraph,
    cost_model: CostModel,
    hardware: HardwareSpec,
    space: SearchSpace,
    mix: RowMix,
    *,
    seed: int,
    storage: str | None = None,
    on_progress: Callable[[str], None] = _silent,
    measure: Measure | None = None,
) -> SearchResult:
    """Find the fastest schedule of one dense batch.

    Args:
        graph: of one tensor-parallel rank.
        cost_model: from a profile, or from the datasheet.
        hardware: the GPU.
        space: what may be decided, and how long to think.
        mix: rows of the dense batch.
        seed: of solver and sampler.
        storage: Optuna storage URL, to resume from and to look at.
        on_progress: told what happens, in words.
        measure: times schedules on the GPU, all of them interleaved in one sustained run.
    """
    run = _Search(
        graph=graph,
        cost_model=cost_model,
        hardware=hardware,
        space=space,
        mix=mix,
        seed=seed,
        storage=storage,
        on_progress=on_progress,
        measure=measure,
        tried=[],
    )
    run.baselines()
    choices = run.best_ping_pongs()
    on_progress(f"baselines: {_summary(run.tried)}")
    structure, certificate = run.structures(tuple(run.tried))
    run.refine(structure, choices)
    race = distinct(run.tried)
    lower = lower_bound_us(graph, mix, hardware, cost_model.dtype)
    power_us = power_limit_of(graph, mix, cost_model)
    base = next(c for c in race if c.schedule.name == "sequential")
    others = sorted((c for c in race if c is not base), key=lambda c: c.best_known.period_us)
    result = SearchResult(
        winner=pick_winner(base, others),
        sequential=base,
        best_overlapped=best_overlapped(others, graph),
        race=(base, *others),
        certificate=certificate,
        lower_bound_us=lower[0],
        power_limit_us=power_us,
        bound=what_binds(lower, power_us),
        history=tuple(
            (number, c.schedule.name, c.best_known.period_us) for number, c in enumerate(run.tried)
        ),
        seed=seed,
    )
    on_progress(f"winner: {result.winner.schedule.name}; {_summary(result.race)}")
    return result


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Each schedule once, under its first name, with its latest measurement."""
    found: dict[object, Candidate] = {}
    for candidate in candidates:
        key = candidate.schedule.nano_batches, candidate.schedule.nano_ops
        known = found.get(key)
        if known is None:
            found[key] = candidate
        elif candidate.measured is not None:
            found[key] = replace(known, measured=candidate.measured)
    return list(found.values())


def pick_winner(base: Candidate, others: Sequence[Candidate]) -> Candidate:
    """The fastest candidate that is allowed to win against the sequential one."""
    has_measured = base.measured is not None
    margin = MEASURED_MARGIN if has_measured else PREDICTED_MARGIN
    limit_us = base.best_known.period_us * (1 - margin)
    rivals = [c for c in others if (c.measured is not None) == has_measured]
    best = min(rivals, key=lambda c: c.best_known.period_us, default=base)
    return best if best.best_known.period_us < limit_us else base


def best_overlapped(candidates: Sequence[Candidate], graph: OpGraph) -> Candidate:
    """The fastest with two nano-batches and two lanes of which some ops can run at once.

    Measured ones come first when there are any.
    """
    overlapped = [c for c in candidates if c.schedule.is_overlapped]
    measured = [c for c in overlapped if c.measured is not None] or overlapped
    ranked = sorted(measured, key=lambda c: c.best_known.period_us)
    return next((c for c in ranked if overlaps(c.schedule, graph)), ranked[0])


def overlaps(schedule: Schedule, graph: OpGraph) -> bool:
    """Whether any two nano-ops can run at the same time."""
    try:
        return bool(concurrent_pairs(schedule, graph))
    except IllegalScheduleError:
        return False


def _summary(candidates: Sequence[Candidate]) -> str:
    best: dict[str, float] = {}
    for candidate in candidates:
        name, us = candidate.schedule.name, candidate.best_known.period_us
        best[name] = min(us, best.get(name, us))
    return ", ".join(f"{name} {us / 1000:.2f} ms" for name, us in best.items())
