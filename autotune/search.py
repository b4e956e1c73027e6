"""The search: baselines, structure, refinement, race; from an op graph and costs to a winner.

    baselines -> best of the ping-pong family -> MILP -> local search -> bound of the space
      -> Optuna on the simulator -> (with a GPU) measure the race, Optuna on the hardware -> winner

The sequential schedule is always in the race. An overlapped one wins on predictions only when it
is more than `race.PREDICTED_MARGIN` faster, because predictions are no better than that; on
measurements only when it measured faster by more than `race.MEASURED_MARGIN`. The best overlapped
schedule is reported either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..runtime.legality import check
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Candidate, Schedule
from ..runtime.schedule import IllegalScheduleError
from ..search_spaces.schema import HardwareSpec, SearchSpace
from .baselines import (
    PingPongChoice,
    equal_split,
    equal_split_choice,
    nano_only,
    sequential_forms,
)
from .better_kernels import with_better_kernels
from .bounds import lower_bound_us, power_limit_of, what_binds
from .certificate import MOST_BATCHES, SpaceBound, space_bound
from .climb import climbed, words
from .cost_model import CostModel
from .hardware_loop import refine_on_hardware
from .many_batches import round_robins
from .measured_together import Measure, measure_race
from .milp import Certificate
from .ping_pong_grid import best_of_grid
from .profile_faults import profile_warnings
from .race import (
    best_overlapped,
    distinct,
    finalists,
    forms_in_words,
    pick_winner,
    racers,
    summary,
    why_it_won,
)
from .race import overlaps as overlaps
from .refine import Family, placed_of, refine
from .search_progress import Stage, StageTold, unseen
from .search_result import SearchResult as SearchResult
from .side_by_side import attention_side_by_side
from .simulator import predict
from .structure import find_structure

CLIMB_AGAIN = 0.03
"""Part of the period that a local search gains where another one goes on from what it found."""
LEAST_TRIALS = 20
"""Of the simulator, below which single nano-ops do not try other kernels."""
CLIMBED_KEPT = 2
"""Best schedules of the local search that enter the race."""


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
    on_stage: StageTold
    measure: Measure | None
    tried: list[Candidate]
    stages: list[str]

    @property
    def job(self) -> tuple[OpGraph, CostModel, SearchSpace, RowMix]:
        """What every part of the search works on."""
        return self.graph, self.cost_model, self.space, self.mix

    def tell(self, text: str) -> None:
        """Say what happened, and keep it for the report."""
        self.stages.append(text)
        self.on_progress(text)

    def add(self, schedule: Schedule) -> Candidate:
        """Check and predict a schedule, and enter it into the race."""
        candidate = self.predicted(schedule)
        self.tried.append(candidate)
        return candidate

    def predicted(self, schedule: Schedule) -> Candidate:
        """A schedule that may run, with its predicted time."""
        check(schedule, self.graph, self.hardware.num_sms, self.hardware.sm_granularity)
        timing = predict(schedule, self.graph, self.cost_model, self.mix)
        return Candidate(schedule=schedule, predicted=timing)

    def sequential(self) -> Candidate:
        """The better form of the sequential schedule enters the race; what each takes is told."""
        schedules = sequential_forms(self.graph, self.cost_model, self.mix)
        found = {form: self.predicted(schedule) for form, schedule in schedules.items()}
        if len(found) > 1:
            times = ", ".join(
                f"{c.predicted.period_us / 1e3:.2f} ms by {form.replace('_', '-')}s"
                for form, c in found.items()
            )
            self.tell(f"attention's output in the sequential schedule: {times}")
        best = min(found.values(), key=lambda candidate: candidate.predicted.period_us)
        self.tried.append(best)
        return best

    def is_legal(self, schedule: Schedule) -> bool:
        """Whether it may run on this GPU."""
        try:
            check(schedule, self.graph, self.hardware.num_sms, self.hardware.sm_granularity)
        except IllegalScheduleError:
            return False
        return True

    def baselines(self) -> Candidate:
        """Sequential (returned), nano-only in each row order, equal split, attentions at once."""
        first = self.sequential()
        for order in self.space.row_orders:
            self.add(nano_only(self.graph, self.cost_model, self.mix, order))
        self.add(equal_split(self.graph, self.cost_model, self.mix, self.space))
        beside = attention_side_by_side(first.schedule, self.graph, self.cost_model, self.mix)
        if beside is not None and self.is_legal(beside):
            self.add(beside)
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

    def best_ping_pongs(self) -> list[PingPongChoice]:
        """Best members of a coarse grid, best first; they enter the race."""
        found = best_of_grid(self.family())
        if not found:
            return [equal_split_choice(self.graph, self.mix, self.hardware, self.space)]
        self.tried += [candidate for _, candidate in found]
        return [choice for choice, _ in found]

    def structures(self, known: Sequence[Candidate]) -> tuple[Schedule | None, Certificate]:
        """The MILP's schedule; solved again for two nano-batches if it prefers one.

        Returns:
            The overlapped structure, if there is one, and the certificate of the whole model.
        """
        ranked = sorted(known, key=lambda candidate: candidate.predicted.period_us)
        schedules = [c.schedule for c in ranked]
        found, certificate = self._solve(schedules, 1)
        is_single = found is None or len(found.nano_batches) == 1
        if is_single and self.space.max_nano_batches > 1:
            overlapped = [s for s in schedules if s.is_overlapped and len(s.nano_batches) > 1]
            found, _ = self._solve(overlapped, 2)
        return found, certificate

    def _solve(
        self, known: Sequence[Schedule], least_batches: int
    ) -> tuple[Schedule | None, Certificate]:
        """One MILP; its schedule enters the race."""
        found, certificate = find_structure(
            *self.job, seed=self.seed, known=known, least_batches=least_batches
        )
        if found is not None and not self.is_legal(found):
            self.tell("structure MILP: its shares fit in pairs only, left out")
            found = None
        if found is not None:
            self.add(found)
        self.tell(
            f"structure MILP: {certificate.status}, layer {certificate.period_us:.0f} us, gap "
            f"{100 * certificate.gap:.1f} % to {certificate.bound_us:.0f} us, "
            f"{certificate.seconds:.1f} s; at its own slowdowns "
            f"{certificate.same_interference_us:.0f} us ({certificate.rounds} rounds), simulated "
            f"{certificate.simulated_us:.0f} us a layer"
        )
        return found, certificate

    @property
    def best_us(self) -> float:
        """Shortest predicted period so far."""
        return min(candidate.predicted.period_us for candidate in self.tried)

    def bound(self, most_batches: int) -> SpaceBound:
        """Bound the declared space, by number of nano-batches."""
        base = next(c for c in self.tried if c.schedule.name == "sequential")
        is_powered = self.cost_model.power is not None and base.predicted.source != "roofline"
        return space_bound(
            *self.job,
            best_us=self.best_us,
            is_powered=is_powered,
            most_batches=most_batches,
        )

    def round_robins(self, bound: SpaceBound) -> None:
        """Try each number of nano-batches that the bound lets beat what is known."""
        has_climbed = any(c.schedule.name == "overlapped_climbed" for c in self.tried)
        for count in bound.counts[1:]:
            name = f"{count.num_nano_batches} nano-batches"
            at_best = f"at best {count.bound_us / 1e3:.2f} ms against {self.best_us / 1e3:.2f} ms"
            if count.is_dominated:
                self.tell(f"{name}: rejected by the bound, {at_best}")
                continue
            if has_climbed:  # from round robins among others
                self.tell(f"{name}: not rejected by the bound ({at_best}), searched already")
                continue
            found = round_robins(*self.job, count)
            if not found:
                self.tell(f"{name}: not rejected by the bound ({at_best}), but none finds places")
                continue
            best = min(found, key=lambda candidate: candidate.predicted.period_us)
            self.tried.append(best)
            self.tell(
                f"{name}: not rejected by the bound ({at_best}); best of {len(found)} round robins "
                f"{best.predicted.period_us / 1e3:.2f} ms"
            )

    def climb(self, most_batches: int) -> None:
        """Local search over cuts, forms, orders and shares of two and more nano-batches."""
        before_us = self.best_us
        found = self._climbed(most_batches)
        if self.best_us < before_us * (1 - CLIMB_AGAIN):  # at the clock that it has now
            found = self._climbed(most_batches)
        if found and self.space.simulator_trials >= LEAST_TRIALS:
            best = with_better_kernels(found[0], self.graph, self.cost_model, self.mix)
            self.tried.append(best)
        self.tell(f"local search: {words(found, before_us)}")

    def _climbed(self, most_batches: int) -> list[Candidate]:
        """One local search from all that is known; its best schedules enter the race."""
        found = climbed(*self.job, known=self.tried, most_batches=most_batches, seed=self.seed)
        self.tried += found[:CLIMBED_KEPT]
        return found

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
            advance=partial(self.on_stage, Stage.TRIALS),
        )
        if self.measure is None:
            return
        self.on_stage(Stage.RACE)
        self._measure(racers(self.tried))
        self.on_stage(Stage.GPU_TRIALS)
        self.tried += refine_on_hardware(
            family,
            trials=self.space.hardware_trials,
            seed=self.seed,
            measure=self.measure,
            storage=self.storage,
            enqueue=enqueue,
            known=tuple(self.tried),
            tell=self.tell,
            advance=partial(self.on_stage, Stage.GPU_TRIALS),
        )
        self.on_stage(Stage.FINALISTS)
        self._measure(finalists(self.tried))

    def _measure(self, chosen: Sequence[Candidate]) -> None:
        assert self.measure is not None
        self.on_progress(f"measuring {len(chosen)} schedules on the GPU")
        schedules = [candidate.schedule for candidate in chosen]
        timings = measure_race(self.measure, schedules, self.on_progress)
        self.tried += [
            replace(candidate, measured=timing)
            for candidate, timing in zip(chosen, timings, strict=True)
            if timing is not None
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
    on_progress: Callable[[str], None] = lambda _: None,
    on_stage: StageTold = unseen,
    measure: Measure | None = None,
    most_batches: int = MOST_BATCHES,
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
        on_stage: told which stage begins, and how many of how many parts of it are done.
        measure: times schedules on the GPU, all of them interleaved in one sustained run.
        most_batches: largest number of nano-batches that round robins and bound look at.
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
        on_stage=on_stage,
        measure=measure,
        tried=[],
        stages=[],
    )
    for warning in profile_warnings(cost_model.profile, graph) if cost_model.profile else ():
        run.tell(f"warning: {warning}")
    on_stage(Stage.BASELINES)
    run.baselines()
    choices = run.best_ping_pongs()
    run.tell(f"baselines: {summary(run.tried)}")
    on_stage(Stage.STRUCTURE)
    structure, certificate = run.structures(tuple(run.tried))
    on_stage(Stage.LOCAL)
    run.climb(most_batches)
    on_stage(Stage.BOUND)
    bound = run.bound(most_batches)
    run.round_robins(bound)
    on_stage(Stage.TRIALS)
    run.refine(structure, choices)
    bound = bound.against(run.best_us)
    race = distinct(run.tried)
    lower = lower_bound_us(graph, mix, hardware, cost_model.dtype)
    base = next(c for c in race if c.schedule.name == "sequential")
    others = sorted((c for c in race if c is not base), key=lambda c: c.best_known.period_us)
    run.tell(
        f"bound of the space: {bound.bound_us / 1e3:.2f} ms over {bound.num_cuts} cuts, "
        f"{100 * bound.gap:.1f} % below the best prediction; {bound.binds}"
    )
    winner, overlapped = pick_winner(base, others), best_overlapped(others, graph)
    power_us = power_limit_of(graph, mix, cost_model, winner.best_known.sm_clock_mhz)
    if graph.alternatives:
        run.tell(
            f"attention's output: the winner joins it by {forms_in_words(winner.schedule, graph)}, "
            f"the best overlapped one by {forms_in_words(overlapped.schedule, graph)}"
        )
    result = SearchResult(
        winner=winner,
        sequential=base,
        best_overlapped=overlapped,
        race=(base, *others),
        certificate=certificate,
        space_bound=bound,
        lower_bound_us=lower[0],
        power_limit_us=power_us,
        bound=what_binds(lower, power_us),
        history=tuple(
            (number, c.schedule.name, c.best_known.period_us) for number, c in enumerate(run.tried)
        ),
        stages=(*run.stages, f"race: {why_it_won(base, others)}"),
        seed=seed,
    )
    on_progress(f"winner: {result.winner.schedule.name}; {summary(result.race)}")
    return result
