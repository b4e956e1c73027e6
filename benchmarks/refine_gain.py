"""What the hardware in the loop gains over the solver's plan: `refine_gain`.

    python benchmarks/refine_gain.py --case 8b --search-only 8b.yaml     here, without a GPU
    python benchmarks/refine_gain.py --case 8b --schedules 8b.yaml --profile results/profiles/h200

The search (simulator only) stores its race. There its schedules are measured, then trials around
the MILP's structure (`autotune/hardware_loop.py`), within `--seconds`. Afterwards the MILP's plan
and the fastest that was measured take turns in one fresh run; the figure is the ratio of their
layers. Where nothing beat the MILP's plan it meets itself. Needs Optuna.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from figures import FigureRow, spread_of, summary, write_figures
from layer_cases import (
    MIX,
    LayerCase,
    Prediction,
    Predictor,
    add_arguments,
    case_of,
    gpu_ranks,
    load_forecast,
    measure_turns,
    origin_of,
    say,
)

from nanoflow_tune.autotune.hardware_loop import refine_on_hardware
from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.autotune.race import distinct
from nanoflow_tune.autotune.refine import Family, placed_of
from nanoflow_tune.profiler import rank_jobs
from nanoflow_tune.runtime.launch import RankGroup
from nanoflow_tune.runtime.plan import Candidate, Schedule, Timing
from nanoflow_tune.search_spaces.loader import load_space

SOLVER = ("single_batch_milp", "nano_only_milp", "overlapped_milp")
"""Names of what the MILP found."""
RACE_SIZE = 10
ROUNDS, TURN_S = 2, 0.3
FINAL_ROUNDS, FINAL_TURN_S = 8, 0.6
SECONDS = 90.0
MOST_TRIALS = 200


def race_of(predictor: Predictor) -> list[Schedule]:
    """The MILP's schedules, then the fastest predicted of each other kind, then the rest.

    Raises:
        ValueError: the solver found nothing.
    """
    race = distinct(predictor.search().race)
    ranked = sorted(race, key=lambda candidate: candidate.predicted.period_us)
    solved = [c.schedule for c in ranked if c.schedule.name in SOLVER]
    if not solved:
        raise ValueError(
            "the figure compares with the solver's plan, but it found none: give it more time "
            "(`milp_time_limit_s` of the space)"
        )
    first: dict[str, Schedule] = {}
    for candidate in ranked:
        first.setdefault(candidate.schedule.name, candidate.schedule)
    others = [s for name, s in first.items() if name not in SOLVER]
    more = [c.schedule for c in ranked if c.schedule not in others and c.schedule not in solved]
    return [*solved, *others, *more][:RACE_SIZE]


def solvers_plan(predictions: Sequence[Prediction]) -> Schedule:
    """The best predicted schedule of the solver."""
    solved = [p for p in predictions if p.schedule.name in SOLVER]
    return min(solved, key=lambda prediction: prediction.layer_us).schedule


def family_of(predictor: Predictor, predictions: Sequence[Prediction]) -> Family:
    """What the trials search: around the solver's structure of two nano-batches, if it has one."""
    ranked = sorted(predictions, key=lambda prediction: prediction.layer_us)
    structure = next(
        (
            p.schedule
            for p in ranked
            if p.schedule.name == "overlapped_milp" and len(p.schedule.nano_batches) == 2
        ),
        None,
    )
    return Family(
        graph=predictor.graph,
        cost_model=predictor.cost_model,
        space=load_space("full"),
        mix=MIX,
        structure=placed_of(structure, predictor.graph) if structure else (),
    )


@dataclass(slots=True)
class Measuring:
    """Whole iterations on the ranks, for the loop."""

    ranks: RankGroup
    predictor: Predictor

    def __call__(self, schedules: Sequence[Schedule]) -> list[Timing]:
        """Interleaved turns; times of the first rank."""
        found = self.ranks.call(
            rank_jobs.measure_schedules,
            self.predictor.iteration,
            tuple(schedules),
            ROUNDS,
            TURN_S,
        )[0]
        for schedule, timing in zip(schedules, found, strict=True):
            say(
                f"{schedule.name}: {timing.period_us / 1e3:.3f} ms, {timing.watts:.0f} W, "
                f"{timing.sm_clock_mhz:.0f} MHz"
            )
        return found


def measure_race(measure: Measuring, predictions: Sequence[Prediction]) -> list[Candidate]:
    """The stored race with measured periods."""
    schedules = [prediction.schedule for prediction in predictions]
    timings = measure(schedules)
    return [
        Candidate(schedule=s, predicted=measure.predictor.timing(s), measured=timing)
        for s, timing in zip(schedules, timings, strict=True)
    ]


def figure(
    case: LayerCase,
    gains: Sequence[float],
    winner: Schedule,
    num_trials: int,
    origin: dict[str, str],
) -> FigureRow:
    """The row of one case."""
    return FigureRow(
        id="refine_gain",
        case=case.label,
        value=statistics.median(gains),
        unit="x",
        reach=">= 1.00",
        spread=f"{spread_of(gains)}; {num_trials} trials; fastest: {winner.name}",
        **origin,
    )


def run(
    case: LayerCase,
    predictor: Predictor,
    predictions: Sequence[Prediction],
    seconds: float,
    origin: dict[str, str],
) -> FigureRow:
    """Race, loop and final on this machine's GPUs."""
    solved, family = solvers_plan(predictions), family_of(predictor, predictions)
    with gpu_ranks(case) as ranks:
        measure = Measuring(ranks, predictor)
        known = measure_race(measure, predictions)
        until_s = time.monotonic() + seconds
        found = refine_on_hardware(
            family,
            trials=MOST_TRIALS,
            seed=0,
            measure=measure,
            enqueue=[p for p in (structure_parameters(family, predictions),) if p],
            known=known,
            tell=say,
            is_over=lambda: time.monotonic() > until_s,
        )
        ranked = sorted((*known, *found), key=lambda c: c.best_known.period_us)
        winner = ranked[0].schedule
        say(f"fastest in the loop: {winner.name}; the solver's plan: {solved.name}")
        turns = ranks.call(
            measure_turns, predictor.iteration, (solved, winner), FINAL_ROUNDS, FINAL_TURN_S
        )[0]
    for schedule, mine in zip((solved, winner), turns, strict=True):
        if mine.error:
            raise ValueError(f"{schedule.name} ran in the loop but not in the final: {mine.error}")
        say(f"final {schedule.name}: {statistics.median(mine.layer_us):.1f} us a layer")
    gains = [a / b for a, b in zip(turns[0].layer_us, turns[1].layer_us, strict=True)]
    return figure(case, gains, winner, len(found), origin)


def structure_parameters(
    family: Family, predictions: Sequence[Prediction]
) -> dict[str, object] | None:
    """The solver's overlapped schedule as parameters of a trial, if it is of the family."""
    if not family.structure:
        return None
    schedule = next(
        p.schedule
        for p in sorted(predictions, key=lambda prediction: prediction.layer_us)
        if p.schedule.name == "overlapped_milp" and len(p.schedule.nano_batches) == 2
    )
    return family.structure_parameters(schedule)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/refine_gain.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of the loop (default: {SECONDS:g})"
    )
    options = parser.parse_args()
    case, hardware = case_of(options)
    predictor = Predictor(case, hardware, options.profile, options.lacking)
    if options.schedules:
        forecast = load_forecast(options.schedules, case)
    else:
        forecast = predictor.forecast(race_of(predictor), options.commit or this_commit())
    for prediction in forecast.predictions:
        say(f"{prediction.schedule.name}: predicted {prediction.layer_us:.1f} us a layer")
    if options.search_only:
        forecast.save(options.search_only)
        return
    row = run(
        case, predictor, forecast.predictions, options.seconds, origin_of(options, "refine_gain")
    )
    write_figures([row], options.out)
    print(summary([row]))


if __name__ == "__main__":
    main()
