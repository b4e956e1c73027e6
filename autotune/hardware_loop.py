"""Refinement with the hardware in the loop: measured trials, and a cost model that learns.

    fit corrections to all measured plans -> search the corrected model -> its best proposals and
      the study's own go to the GPU, beside the incumbent -> study and corrections get the periods

The trials are those of `refine.py`'s family, with kernel variants free. A trial is measured unless
it was before, or the corrected prediction says, beyond its own error, that it is slower than the
incumbent: then it is pruned, with the reason. The incumbent runs in every batch, and periods
count at its pace, so that a card that warms up in between favours nobody. The study keeps the
corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..profiler.progress import Advance, nothing
from ..runtime.plan import Candidate, Schedule, Timing
from .corrections import LEAST_PLANS, NO_CORRECTIONS, CorrectedCostModel, Corrections, Learner
from .measured_together import Measure, measure_what_fits
from .ping_pong_grid import best_of_grid
from .refine import Family, ask, open_study, replayed
from .simulator import predict

if TYPE_CHECKING:
    import optuna

MEASURED_TOGETHER = 4
"""Trials measured in one go, interleaved, beside the incumbent."""
PROPOSED = 2
"""Of them by the corrected model, and more where the study's own are pruned."""
PROPOSAL_TRIALS, BEST_TRIALS = 40, 5
"""Of the study of the corrected model, and measured ones that it starts from."""
LEAST_MARGIN, DOUBTS = 0.04, 2.0
"""A trial is pruned when it is predicted slower than the incumbent by more than this part, and by
more than this many standard deviations of the corrected prediction."""
OWN_ASKED = 3
"""Trials that the study is asked for at most, for each that is to be measured."""
MOST_EMPTY = 2
"""Batches in a row without a trial worth measuring end the loop."""


def _silent(_: str) -> None:
    """Progress nobody reads."""


def refine_on_hardware(
    family: Family,
    *,
    trials: int,
    seed: int,
    measure: Measure,
    storage: str | None = None,
    enqueue: Sequence[Mapping[str, Any]] = (),
    known: Sequence[Candidate] = (),
    tell: Callable[[str], None] = _silent,
    is_over: Callable[[], bool] = lambda: False,
    advance: Advance = nothing,
) -> tuple[Candidate, ...]:
    """Measure trials of the study, up to this many; every measured one is a candidate.

    Args:
        family: what to search.
        trials: measured ones in all, those of a resumed study included.
        seed: of the samplers.
        measure: times schedules on the GPU, interleaved in one sustained run.
        storage: an Optuna URL; None keeps the study in memory.
        enqueue: parameters to try first.
        known: candidates of the same batch, of which measured ones teach the model already.
        tell: told what the corrections are, in words.
        is_over: asked before each batch, for a budget of time.
        advance: told how many trials are measured.
    """
    study = open_study(family, seed, "hardware", storage, enqueue)
    loop = _Loop(
        family=replace(family, is_variant_free=True),
        study=study,
        seed=seed,
        measure=measure,
        enqueue=enqueue,
        learner=Learner(family.graph, family.cost_model, family.mix),
        tell=tell,
    )
    for candidate in known:
        if candidate.measured is not None:
            loop.learn(candidate.schedule, candidate.measured.period_us)
    candidates, empty = loop.resume(), 0
    while loop.num_measured < trials and empty < MOST_EMPTY and not is_over():
        advance(loop.num_measured, trials)
        found = loop.step(min(MEASURED_TOGETHER, trials - loop.num_measured))
        candidates += found
        empty = 0 if found else empty + 1
    ended = ", no other one is predicted near the fastest" if empty else ""
    corrections = loop.fit()
    tell(f"hardware in the loop: {loop.num_measured} trials measured{ended}; {corrections.told()}")
    return tuple(candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    trial: optuna.Trial
    schedule: Schedule
    predicted: Timing


@dataclass(slots=True, kw_only=True)
class _Loop:
    """One refinement under way."""

    family: Family
    study: optuna.Study
    seed: int
    measure: Measure
    enqueue: Sequence[Mapping[str, Any]]
    learner: Learner
    tell: Callable[[str], None] = _silent
    incumbent: tuple[Schedule, float] | None = None
    """The fastest measured schedule like those of the family, overlapped in two nano-batches, and
    its period."""
    grid: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Parameters that the model's studies start from."""
    num_measured: int = 0
    lost: list[Schedule] = field(default_factory=list[Schedule])
    """Those that found no memory."""
    seen: set[int] = field(default_factory=set[int])
    """Numbers of trials that were taken in."""

    def learn(self, schedule: Schedule, us: float) -> None:
        """Take in a measured period."""
        self.learner.add(schedule, us)
        is_alike = schedule.is_overlapped and len(schedule.nano_batches) == 2
        if is_alike and (self.incumbent is None or us < self.incumbent[1]):
            self.incumbent = schedule, us

    def resume(self) -> list[Candidate]:
        """Trials measured by an earlier run or by other workers: they teach, and are predicted."""
        found: list[Candidate] = []
        for trial in self.study.get_trials(deepcopy=False, states=(_states().COMPLETE,)):
            if trial.number in self.seen or trial.value is None:
                continue
            self.seen.add(trial.number)
            candidate = replayed(self.family, trial)
            if candidate is not None and not self.learner.knows(candidate.schedule):
                self.learn(candidate.schedule, trial.value)
                self.num_measured += 1
                found.append(candidate)
        return found

    def fit(self) -> Corrections:
        """The corrections so far; the study keeps them."""
        corrections = self.learner.fit() if len(self.learner) else NO_CORRECTIONS
        factors = {key: round(factor, 4) for key, factor in corrections.factors.items()}
        self.study.set_user_attr("corrections", factors)
        self.study.set_user_attr("corrected_error", round(corrections.error, 5))
        return corrections

    def step(self, count: int) -> list[Candidate]:
        """Choose some trials, measure them, tell the results."""
        self.resume()
        corrections = self.fit()
        model = CorrectedCostModel(self.family.cost_model, corrections)
        chosen: list[_Chosen] = []
        proposed = self.proposals(model, count) if len(self.learner) >= LEAST_PLANS else []
        self.put_first(proposed[:PROPOSED])
        self.choose(chosen, count, OWN_ASKED * count, model)
        if len(chosen) < count and proposed[PROPOSED:]:
            self.put_first(proposed[PROPOSED:])
            self.choose(chosen, count, len(proposed[PROPOSED:]), model)
        return self.take_turns(chosen) if chosen else []

    def put_first(self, proposed: Sequence[Mapping[str, Any]]) -> None:
        """Have the study ask for these next."""
        for parameters in proposed:
            why = {"proposed_by": "corrected cost model"}
            self.study.enqueue_trial(dict(parameters), user_attrs=why)

    def proposals(self, model: CorrectedCostModel, count: int) -> list[dict[str, Any]]:
        """Parameters of the schedules, not measured yet, that the corrected model likes best.

        A study of the model alone, which starts from the best members of a coarse grid (in the
        model as it was at first), from what was enqueued and from the best trials so far.
        """
        family = self.family
        if not self.grid:
            grid = best_of_grid(replace(family, cost_model=model, is_variant_free=False))
            self.grid = [family.parameters(choice) for choice, _ in grid]
        trials = self.study.get_trials(deepcopy=False, states=(_states().COMPLETE,))
        trials.sort(key=lambda trial: trial.value or 0.0)
        first = [*self.grid, *self.enqueue, *(trial.params for trial in trials[:BEST_TRIALS])]
        study = open_study(family, self.seed + len(self.learner), "model", None, first)
        best: dict[Any, tuple[float, dict[str, Any]]] = {}
        for _ in range(PROPOSAL_TRIALS):
            trial, schedule = ask(study, family)
            if schedule is None:
                continue
            us = predict(schedule, family.graph, model, family.mix).period_us
            study.tell(trial, us)
            if not self.learner.knows(schedule):
                best.setdefault((schedule.nano_batches, schedule.nano_ops), (us, trial.params))
        ranked = sorted(best.values(), key=lambda item: item[0])
        return [parameters for _, parameters in ranked[:count]]

    def choose(
        self,
        chosen: list[_Chosen],
        count: int,
        asked: int,
        model: CorrectedCostModel,
    ) -> None:
        """Ask for at most `asked` trials until `count` worth measuring are chosen."""
        states, family = _states(), self.family
        for _ in range(asked):
            if len(chosen) >= count:
                break
            trial, schedule = ask(self.study, family)
            self.seen.add(trial.number)
            if schedule is None:
                continue
            if self.learner.knows(schedule):
                self.study.tell(trial, self.learner.measured_us(schedule))
                continue
            us = predict(schedule, family.graph, model, family.mix).period_us
            trial.set_user_attr("corrected_us", round(us, 1))
            reason = self.why_not(schedule, us)
            if any(_is_same(schedule, other.schedule) for other in chosen):
                reason = "in this batch already"
            if any(_is_same(schedule, other) for other in self.lost):
                reason = "found no memory before"
            if reason:
                trial.set_user_attr("reason", reason)
                self.study.tell(trial, state=states.PRUNED)
                continue
            timing = predict(schedule, family.graph, family.cost_model, family.mix)
            trial.set_user_attr("predicted_us", round(timing.period_us, 1))
            chosen.append(_Chosen(trial=trial, schedule=schedule, predicted=timing))

    def why_not(self, schedule: Schedule, us: float) -> str:
        """Why a schedule of this corrected prediction is not worth measuring, if so."""
        if self.incumbent is None or us <= (1 + LEAST_MARGIN) * self.incumbent[1]:
            return ""
        doubt = self.learner.doubt(schedule, self.incumbent[0])
        if us <= (1 + DOUBTS * doubt) * self.incumbent[1]:
            return ""
        return (
            f"predicted {us / 1e3:.2f} ms with corrections, give or take {100 * doubt:.1f} %, "
            f"above the incumbent's {self.incumbent[1] / 1e3:.2f} ms"
        )

    def take_turns(self, chosen: Sequence[_Chosen]) -> list[Candidate]:
        """Measure the chosen ones beside the incumbent, and count at its pace.

        A trial that runs out of memory fails, and the search goes on.
        """
        incumbent = self.incumbent  # what is learned below may change it
        beside = [] if incumbent is None else [incumbent[0]]
        schedules = [item.schedule for item in chosen]
        turns = measure_what_fits(self.measure, beside, schedules, self.tell)
        found: list[Candidate] = []
        for item, turn in zip(chosen, turns, strict=True):
            timing = turn.timing
            if timing is None:
                item.trial.set_user_attr("reason", turn.lost)
                self.study.tell(item.trial, state=_states().FAIL)
                self.lost.append(item.schedule)
                continue
            pace = turn.base[0].period_us / incumbent[1] if incumbent else 1.0
            us = timing.period_us / pace
            self.study.tell(item.trial, us, skip_if_finished=True)
            self.num_measured += 1
            self.learn(item.schedule, us)
            found.append(
                Candidate(schedule=item.schedule, predicted=item.predicted, measured=timing)
            )
        return found


def _states() -> type[optuna.trial.TrialState]:
    """Optuna is imported where a study begins."""
    import optuna

    return optuna.trial.TrialState


def _is_same(a: Schedule, b: Schedule) -> bool:
    return (a.nano_batches, a.nano_ops) == (b.nano_batches, b.nano_ops)
