"""Predicted against measured layers of many plans: `predict_median`, `_worst`, `_rank`.

    python benchmarks/predict.py --case 8b --search-only 8b.yaml     here, without a GPU
    python benchmarks/predict.py --case 8b --schedules 8b.yaml       there: about 100 s
    python benchmarks/predict.py --draw                              the scatter of both cases

Plans are what the search tried, good and bad, and sequential ones with other kernels, chosen so
that their predicted periods spread. The predictions stored before the measurement are compared. All
plans take turns as CUDA graphs in one sustained run, so that clocks and heat hit all alike. The
table of `--details` has each plan's period, watts and clock, predicted and measured.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from figures import FigureRow, summary, write_figures
from layer_cases import (
    MIX,
    Forecast,
    LayerCase,
    Prediction,
    Predictor,
    add_arguments,
    case_of,
    gpu_ranks,
    iteration_case,
    load_forecast,
    measure_turns,
    once_each,
    origin_of,
    say,
    with_gemms,
    with_kernels,
)

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.plan import Schedule
from nanoflow_tune.runtime.schedule import IllegalScheduleError
from nanoflow_tune.search_spaces.loader import load_space
from nanoflow_tune.search_spaces.schema import HardwareSpec

if TYPE_CHECKING:
    from nanoflow_tune.profiler.layer_turns import LayerTurns

NUM_PLANS, LEAST_PLANS = 24, 20
SLOWEST = 1.4
"""Times the fastest predicted layer: slower plans are nobody's choice."""
LEAST_SPAN = 0.2
"""Of the predicted and of the measured periods, slowest over fastest less one."""
ROUNDS, MEASURE_S, FEW_PART, WARM_PART = 3, 50.0, 0.25, 0.125
"""Rounds, seconds of them in all, and what few layers and warming add to a turn."""
DETAILS = Path("results/predictions.csv")
PICTURE = Path("results/predictions.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One plan: a row of the table of details."""

    case: str
    plan: str
    predicted_us: float
    """Of one layer, as `measured_us`."""
    measured_us: float
    low_us: float
    """Shortest round."""
    high_us: float
    error: float
    """Predicted over measured, less one, in percent."""
    predicted_w: float
    measured_w: float
    predicted_mhz: float
    measured_mhz: float
    source: str
    profile_commit: str
    predicted_commit: str
    measured_commit: str
    gpu: str
    date: str


COLUMNS = tuple(field.name for field in fields(Comparison))
_NUMBERS = tuple(field.name for field in fields(Comparison) if field.type == "float")


def make_forecast(predictor: Predictor, commit: str, count: int = NUM_PLANS) -> Forecast:
    """Plans of evenly spread predicted periods.

    Raises:
        ValueError: there are too few, or their predictions lie too close.
    """
    forecast = predictor.forecast(plans(predictor), commit)
    chosen = spread(forecast.predictions, count)
    periods = [prediction.layer_us for prediction in chosen]
    span = max(periods) / min(periods) - 1
    if len(chosen) < min(count, LEAST_PLANS) or span < LEAST_SPAN:
        raise ValueError(
            f"predictions are judged on at least {LEAST_PLANS} plans that span {LEAST_SPAN:.0%}, "
            f"but {len(chosen)} of {len(forecast.predictions)} were found that span {span:.0%}: "
            "widen the search space"
        )
    return replace(forecast, predictions=tuple(chosen))


def plans(predictor: Predictor) -> list[Schedule]:
    """All that the search tried, its round robins, and sequential plans with other kernels."""
    from nanoflow_tune.autotune.many_batches import round_robins

    graph, cost_model = predictor.graph, predictor.cost_model
    hardware, space = cost_model.hardware, load_space("quick")
    result = predictor.search()
    tried = [candidate.schedule for candidate in result.race]
    for count in result.space_bound.counts[1:]:
        found = round_robins(graph, cost_model, space, MIX, count)
        tried += [candidate.schedule for candidate in found]
    base, attention = result.sequential.schedule, graph.op("decode_attention")
    gemm = max((op for op in graph.layer if op.kind == "gemm"), key=lambda op: op.flops(MIX))
    for variant in cost_model.variants(gemm, hardware.num_sms):
        tried.append(with_gemms(base, graph, variant))
    for variant in cost_model.variants(attention, hardware.num_sms):
        tried.append(with_kernels(base, graph, (attention.kind,), variant, "decode_"))
    return [s for s in once_each(tried) if _is_legal(s, predictor)]


def _is_legal(schedule: Schedule, predictor: Predictor) -> bool:
    hardware = predictor.cost_model.hardware
    try:
        check(schedule, predictor.graph, hardware.num_sms, hardware.sm_granularity)
    except IllegalScheduleError:
        return False
    return True


def spread(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """At most `count`, the fastest of each kind first, then whatever is farthest from the chosen.

    Kinds (names of schedules) take turns, so that none crowds out the others. Returned by period.
    """
    fastest = min(prediction.layer_us for prediction in predictions)
    within = [p for p in predictions if p.layer_us <= SLOWEST * fastest]
    kinds: dict[str, list[Prediction]] = {}
    for prediction in sorted(within, key=lambda p: p.layer_us):
        kinds.setdefault(prediction.schedule.name, []).append(prediction)
    chosen: list[Prediction] = []
    while len(chosen) < count and any(kinds.values()):
        for left in kinds.values():
            if left and len(chosen) < count:
                best = max(left, key=lambda p: _distance(p, chosen))  # the first of equal ones
                left.remove(best)
                chosen.append(best)
    return sorted(chosen, key=lambda p: p.layer_us)


def _distance(prediction: Prediction, chosen: Iterable[Prediction]) -> float:
    return min((abs(log(prediction.layer_us / p.layer_us)) for p in chosen), default=0.0)


def plan_labels(schedules: Sequence[Schedule]) -> list[str]:
    """A short name of each: kind, rows of the nano-batches, shares; numbered where they repeat."""
    labels: list[str] = []
    for schedule in schedules:
        rows = "+".join(str(batch.num_tokens) for batch in schedule.nano_batches)
        shares = "/".join(map(str, sorted({n.num_sms for n in schedule.nano_ops}, reverse=True)))
        label = f"{schedule.name} {rows} on {shares}"
        count = sum(known.partition(" #")[0] == label for known in labels)
        labels.append(f"{label} #{count + 1}" if count else label)
    return labels


def compare(
    case: LayerCase, forecast: Forecast, measured: Sequence[LayerTurns], origin: dict[str, str]
) -> list[Comparison]:
    """One row for each plan that ran."""
    labels = plan_labels([prediction.schedule for prediction in forecast.predictions])
    found: list[Comparison] = []
    for label, prediction, turns in zip(labels, forecast.predictions, measured, strict=True):
        if turns.error:
            say(f"{label}: left out, {turns.error}")
            continue
        us = statistics.median(turns.layer_us)
        row = Comparison(
            case=case.label,
            plan=label,
            predicted_us=prediction.layer_us,
            measured_us=us,
            low_us=min(turns.layer_us),
            high_us=max(turns.layer_us),
            error=100 * (prediction.layer_us / us - 1),
            predicted_w=prediction.watts,
            measured_w=turns.watts,
            predicted_mhz=prediction.sm_clock_mhz,
            measured_mhz=turns.sm_clock_mhz,
            source=prediction.source,
            profile_commit=forecast.profile_commit,
            predicted_commit=forecast.commit,
            measured_commit=origin["commit"],
            gpu=origin["gpu"],
            date=origin["date"],
        )
        found.append(row)
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, ties at their mean rank."""
    return statistics.correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values
    ]


def figures(rows: Sequence[Comparison], origin: dict[str, str]) -> list[FigureRow]:
    """The three figures of one case.

    Raises:
        ValueError: too few plans ran, or they do not span enough.
    """
    periods = [row.measured_us for row in rows]
    if len(rows) < LEAST_PLANS or max(periods) / min(periods) - 1 < LEAST_SPAN:
        raise ValueError(
            f"predictions are judged on at least {LEAST_PLANS} plans whose measured periods span "
            f"{LEAST_SPAN:.0%}, but got {len(rows)} plans from {min(periods, default=0):.0f} to "
            f"{max(periods, default=0):.0f} us: the table holds them, but no figure is written"
        )
    errors = [abs(row.error) for row in rows]
    rank = rank_correlation([row.predicted_us for row in rows], periods)
    case = rows[0].case
    span = f"{len(rows)} plans; periods {min(periods):.0f}-{max(periods):.0f} us"
    signed = f"{min(r.error for r in rows):+.1f} to {max(r.error for r in rows):+.1f}; {span}"
    return [
        FigureRow(id=name, case=case, value=value, unit=unit, reach=reach, spread=kept, **origin)
        for name, value, unit, reach, kept in (
            ("predict_median", statistics.median(errors), "%", "<= 5", signed),
            ("predict_worst", max(errors), "%", "<= 10", signed),
            ("predict_rank", rank, "x", ">= 0.9", span),
        )
    ]


def read_details(path: Path) -> list[Comparison]:
    """The rows of a table of details; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Comparison(**{k: float(v) if k in _NUMBERS else v for k, v in cells.items()})  # type: ignore[arg-type]
            for cells in csv.DictReader(file)
        ]


def write_details(rows: Sequence[Comparison], path: Path) -> None:
    """Put the rows into the table; former ones of their cases are replaced."""
    cases = {row.case for row in rows}
    kept = [row for row in read_details(path) if row.case not in cases]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in (*kept, *rows):
            writer.writerow([f"{c:.2f}" if isinstance(c, float) else c for c in astuple(row)])


def draw(rows: Sequence[Comparison], path: Path) -> None:
    """Measured over predicted periods, a panel for each case, with the band of 5 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = pyplot.subplots(
        1, len(cases), figsize=(5.6 * len(cases), 5.2), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[0], cases, strict=True):
        mine = [row for row in rows if row.case == case]
        ends = [min(min(r.predicted_us, r.low_us) for r in mine) * 0.98]
        ends.append(max(max(r.predicted_us, r.high_us) for r in mine) * 1.02)
        axis.plot(ends, ends, color="0.4", linewidth=1, label="measured = predicted")
        low, high = ([us * factor for us in ends] for factor in (0.95, 1.05))
        axis.fill_between(ends, low, high, color="0.9", label="within 5 %")
        for kind, marker, color in _KINDS:
            group = [row for row in mine if _kind(row) == kind]
            x, y = [row.predicted_us for row in group], [row.measured_us for row in group]
            below = [row.measured_us - row.low_us for row in group]
            above = [row.high_us - row.measured_us for row in group]
            axis.errorbar(
                x, y, yerr=(below, above), fmt=marker, color=color, capsize=2, markersize=5,
                linewidth=0.8, label=kind,
            )  # fmt: skip
        axis.set(xlim=ends, ylim=ends, aspect="equal", title=case.partition(",")[0])
        axis.set_xlabel("predicted period of a layer (us)")
        axis.set_ylabel("measured period of a layer (us)")
        axis.legend(loc="upper left", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


_KINDS = (
    ("sequential", "o", "#1f77b4"),
    ("nano-batches in turn", "s", "#2ca02c"),
    ("overlapped", "^", "#d62728"),
)


def _kind(row: Comparison) -> str:
    if row.plan.startswith(("sequential", "single_batch")):
        return "sequential"
    return "nano-batches in turn" if row.plan.startswith("nano_only") else "overlapped"


def measure(
    case: LayerCase, hardware: HardwareSpec, forecast: Forecast, seconds: float
) -> list[LayerTurns]:
    """All plans in turns on this machine's GPUs, about so many seconds of replays."""
    schedules = tuple(prediction.schedule for prediction in forecast.predictions)
    parts = ROUNDS * (1 + FEW_PART) * (1 + WARM_PART)
    turn_s = seconds / (len(schedules) * parts)
    say(f"{len(schedules)} plans, {ROUNDS} turns of {turn_s:.2f} s each")
    with gpu_ranks(case) as ranks:
        iteration = iteration_case(case, hardware)
        return ranks.call(measure_turns, iteration, schedules, ROUNDS, turn_s)[0]


def main() -> None:
    if "--draw" in sys.argv[1:]:
        picture = argparse.ArgumentParser(prog="benchmarks/predict.py")
        picture.add_argument("--draw", action="store_true")
        picture.add_argument("--details", type=Path, default=DETAILS)
        picture.add_argument("--picture", type=Path, default=PICTURE)
        options = picture.parse_args()
        draw(read_details(options.details), options.picture)
        return
    parser = argparse.ArgumentParser(
        prog="benchmarks/predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--plans", type=int, default=NUM_PLANS, help=f"default: {NUM_PLANS}")
    parser.add_argument("--seconds", type=float, default=MEASURE_S, help="of replays in all")
    parser.add_argument("--details", type=Path, default=DETAILS, help="table, rows replaced")
    options = parser.parse_args()
    case, hardware = case_of(options)
    if options.schedules:
        forecast = load_forecast(options.schedules, case)
    else:
        predictor = Predictor(case, hardware, options.profile, options.lacking)
        forecast = make_forecast(predictor, options.commit or this_commit(), options.plans)
    labels = plan_labels([prediction.schedule for prediction in forecast.predictions])
    for label, prediction in zip(labels, forecast.predictions, strict=True):
        say(f"{label}: predicted {prediction.layer_us:.1f} us a layer")
    if options.search_only:
        forecast.save(options.search_only)
        return
    origin = origin_of(options, "predict")
    rows = compare(case, forecast, measure(case, hardware, forecast, options.seconds), origin)
    for row in rows:
        say(f"{row.plan}: {row.measured_us:.1f} us a layer, predicted {row.error:+.1f} %")
    write_details(rows, options.details)
    found = figures(rows, origin)
    write_figures(found, options.out)
    print(summary(found))


if __name__ == "__main__":
    main()
