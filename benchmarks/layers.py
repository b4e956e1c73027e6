"""One layer, sequential against overlapped, on the real executor: `layer_8b`, `layer_70b_tp2`.

    python benchmarks/layers.py --case 8b --search-only 8b.yaml      here, without a GPU
    python benchmarks/layers.py --case 8b --schedules 8b.yaml        there: about 80 s

The search makes schedules from the profile (`--search-only` needs no GPU and stores them for
`--schedules`). All sequential and the best overlapped ones, the latter also with GEMMs of both
nano-batches joined where that is predicted to pay, take turns as CUDA graphs of 16 and of 4 layers;
a layer is a twelfth of the difference. The two best of each kind meet once more in a longer run;
the figure is the ratio of the best there.

`layer_limit` sets the winner's period against what the power cap allows: dynamic joules of its ops
alone, measured in the same run and brought to the plan's clock, over the watts that the cap leaves
beside static power. The ops' kernels run round and round, each alone on the whole GPU, for seconds
at the cap: that gives their joules at a clock near the plan's. A second row of that figure has no
reach: there each op is measured for a third of a second at whatever clock it then has.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import log, prod
from typing import TYPE_CHECKING

from figures import FigureRow, spread_of, summary, write_figures
from layer_cases import (
    MIX,
    PROMPT,
    LayerCase,
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
)

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.autotune.race import distinct, overlaps
from nanoflow_tune.profiler.profile import Point, Row
from nanoflow_tune.profiler.rank_jobs import IterationCase
from nanoflow_tune.runtime.launch import RankContext, RankGroup
from nanoflow_tune.runtime.op_graph import GEMM_KINDS, Op, OpGraph
from nanoflow_tune.runtime.op_shapes import shape_numbers
from nanoflow_tune.runtime.plan import Candidate, Schedule
from nanoflow_tune.runtime.schedule import row_mix
from nanoflow_tune.search_spaces.schema import HardwareSpec

if TYPE_CHECKING:
    from nanoflow_tune.profiler.layer_turns import LayerTurns
    from nanoflow_tune.profiler.timing import InTurn

RACE_ROUNDS, RACE_TURN_S = 2, 0.25
FINAL_ROUNDS, FINAL_TURN_S = 5, 0.5
FINALISTS = 2
"""Of each kind: the race is too short to tell neighbours apart."""
OVERLAPPED_IN_RACE, SEQUENTIAL_IN_RACE = 6, 3
LIBRARY = "cublas"
SMALL_SHARE = 0.48
"""Part of the SMs on which the largest GEMM runs at higher clocks, for joules over clock."""
FIGURES = {"8b": ("layer_8b", ">= 0.99"), "70b": ("layer_70b_tp2", ">= 1.00")}
"""Id and reach by case."""
LIMIT_REACH = "<= 1.05"


@dataclass(frozen=True, slots=True, kw_only=True)
class Solo:
    """A plan's kernels alone on the whole GPU, on one rank."""

    rows: list[Row]
    """One by one, with joules."""
    small: Row
    """The largest GEMM on few SMs."""
    in_turn: InTurn
    static_w: float
    cap_w: float


def contenders(race: Sequence[Candidate], graph: OpGraph) -> list[Schedule]:
    """The few fastest predicted of each kind, sequential first; each schedule once."""
    ranked = sorted(distinct(race), key=lambda candidate: candidate.predicted.period_us)
    base = [c.schedule for c in ranked if c.schedule.name == "sequential"]
    overlapped = [c.schedule for c in ranked if overlaps(c.schedule, graph)]
    others = [c.schedule for c in ranked if not overlaps(c.schedule, graph)]
    library = [with_gemms(schedule, graph, LIBRARY) for schedule in base]
    chosen = [*base, *library, *others[:SEQUENTIAL_IN_RACE], *overlapped[:OVERLAPPED_IN_RACE]]
    return once_each(chosen)


def fastest(turns: Sequence[LayerTurns], indices: Iterable[int]) -> int:
    """Which of some schedules had the shortest layer."""
    return min(indices, key=lambda index: statistics.median(turns[index].layer_us))


def solo_points(schedule: Schedule, graph: OpGraph, num_sms: int) -> list[Point]:
    """Each nano-op of a layer on the whole GPU, in its variant and with its rows."""
    points: list[Point] = []
    for nano_op in schedule.nano_ops:
        op = graph.op(nano_op.op)
        mix = row_mix(
            schedule, nano_op.tokens, MIX.decode_context_tokens, MIX.prefill_context_tokens
        )
        rows = round(op.rows(mix))
        if rows:
            points.append(_point(op, nano_op.variant, rows, num_sms))
    return points


def _point(op: Op, variant: str, rows: int, num_sms: int) -> Point:
    kv_len = 0
    if op.kv_elements_per_key:
        is_decode = op.kind == "decode_attention"
        kv_len = round(MIX.decode_context_tokens) if is_decode else PROMPT
    return Point(
        kind=op.kind, shape=op.shape, variant=variant, tokens=rows, kv_len=kv_len, num_sms=num_sms
    )


def clock_exponent(large: Row, small: Row, static_w: float) -> float:
    """How dynamic joules of one kernel rise with its clock, from two shares of the same GEMM.

    0 to 3: beyond that it is noise.
    """
    clocks = log(small.sm_clock_mhz / large.sm_clock_mhz)
    if clocks < 0.05:
        return 0.0
    joules = log(dynamic_joules(small, static_w) / dynamic_joules(large, static_w))
    return min(3.0, max(0.0, joules / clocks))


def dynamic_joules(row: Row, static_w: float) -> float:
    """Joules of one call beyond static power for as long as it took while they were measured."""
    return row.joules - static_w * row.joules / row.watts


def limit_us(
    rows: Sequence[Row], exponent: float, clock_mhz: float, static_w: float, cap_w: float
) -> float:
    """Least time that the cap allows for these calls at a clock, in us.

    Raises:
        ValueError: a row has no joules.
    """
    missing = [row.point for row in rows if not row.has_measured_joules]
    if missing:
        raise ValueError(f"the power limit needs joules of every op, but {missing[0]} has none")
    joules = sum(
        dynamic_joules(row, static_w) * (clock_mhz / row.sm_clock_mhz) ** exponent for row in rows
    )
    return 1e6 * joules / (cap_w - static_w)


def measure_solo(
    ctx: RankContext, case: IterationCase, points: tuple[Point, ...], small: Point
) -> Solo:
    """Kernels alone, one by one and in turn; runs on every rank, collectives in step."""
    import torch
    import torch.distributed as dist

    from nanoflow_tune.profiler.grid import is_collective
    from nanoflow_tune.profiler.power import PowerMeter
    from nanoflow_tune.profiler.rank_jobs import KV_POOL_BYTES, release_memory
    from nanoflow_tune.profiler.sweep import Sweep
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.device import lane_groups

    release_memory(ctx)
    kernels.load("cuda")
    torch.cuda.set_device(ctx.rank)
    groups = lane_groups(ctx, ())
    network = groups["network"] if groups is not None else None
    sweep = Sweep(case.hardware, PowerMeter(ctx.rank), KV_POOL_BYTES, network)
    sweep.timer.heat(1000.0)
    static_w = sweep.static_watts()  # of a hot card, which leaks more
    sweep.timer.heat(500.0)

    def agree(values: list[int]) -> list[int]:
        box = [values]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    rows = [
        sweep.measure_collective_joules(point, agree)
        if is_collective(point.kind)
        else sweep.measure(point, with_joules=True)
        for point in (*points, small)
    ]
    in_turn = sweep.measure_in_turn(points, agree if groups is not None else list)
    return Solo(
        rows=rows[:-1],
        small=rows[-1],
        in_turn=in_turn,
        static_w=static_w,
        cap_w=sweep.meter.power_cap_w,
    )


def _limits(
    ranks: RankGroup, case: IterationCase, schedule: Schedule, turns: LayerTurns, graph: OpGraph
) -> tuple[float, float]:
    """Power-limited times of a layer of the schedule, on the first rank: in turn, by rows."""
    num_sms = case.hardware.num_sms
    points = solo_points(schedule, graph, num_sms)
    gemms = [point for point in points if point.kind in GEMM_KINDS]
    large = max(gemms, key=lambda point: point.tokens * prod(shape_numbers(point.shape)))
    sizes = case.hardware.sm_granularity
    small = replace(large, num_sms=sizes * round(SMALL_SHARE * num_sms / sizes))
    solo = ranks.call(measure_solo, case, tuple(points), small)[0]
    for row in (*solo.rows, solo.small):
        say(f"{row.point.kind} {row.point.variant}: {row.joules:.4f} J, {row.sm_clock_mhz:.0f} MHz")
    exponent = clock_exponent(solo.rows[points.index(large)], solo.small, solo.static_w)
    say(
        f"dynamic joules rise with clock^{exponent:.2f}; static {solo.static_w:.0f} W, cap "
        f"{solo.cap_w:.0f} W"
    )
    in_turn = solo.in_turn
    say(
        f"in turn: {in_turn.us:.1f} us, {in_turn.watts:.0f} W, {in_turn.sm_clock_mhz:.0f} MHz, "
        f"{in_turn.dynamic_joules(solo.static_w):.4f} J beyond static; the plan "
        f"{(turns.watts - solo.static_w) * statistics.median(turns.layer_us) * 1e-6:.4f} J at "
        f"{turns.sm_clock_mhz:.0f} MHz"
    )
    at_plan = in_turn.dynamic_joules(solo.static_w) * (
        (turns.sm_clock_mhz / in_turn.sm_clock_mhz) ** exponent
    )
    by_rows = limit_us(solo.rows, exponent, turns.sm_clock_mhz, solo.static_w, solo.cap_w)
    return 1e6 * at_plan / (solo.cap_w - solo.static_w), by_rows


def measure(
    case: LayerCase, hardware: HardwareSpec, schedules: Sequence[Schedule], origin: dict[str, str]
) -> list[FigureRow]:
    """Race, final and limit of one case on this machine's GPUs.

    Raises:
        ValueError: of one kind of schedule none could run.
    """
    iteration = iteration_case(case, hardware)
    graph = OpGraph.build(iteration.model, case.tp_degree)
    with gpu_ranks(case) as ranks:
        say(f"{len(schedules)} schedules on {case.tp_degree} GPU(s)")
        race = ranks.call(measure_turns, iteration, tuple(schedules), RACE_ROUNDS, RACE_TURN_S)[0]
        for schedule, turns in zip(schedules, race, strict=True):
            say(f"{schedule.name}: {_told(turns)}")
        ran = [index for index, turns in enumerate(race) if not turns.error]
        ranked = sorted(ran, key=lambda i: statistics.median(race[i].layer_us))
        beside = [i for i in ranked if overlaps(schedules[i], graph)][:FINALISTS]
        alone = [i for i in ranked if not overlaps(schedules[i], graph)][:FINALISTS]
        if not alone or not beside:
            raise ValueError(
                "the figure compares sequential and overlapped schedules, but of one kind none "
                "ran (see above): search with --lacking for the variants that are not here"
            )
        finalists = tuple(schedules[i] for i in (*alone, *beside))
        final = ranks.call(measure_turns, iteration, finalists, FINAL_ROUNDS, FINAL_TURN_S)[0]
        for schedule, turns in zip(finalists, final, strict=True):
            say(f"final {schedule.name}: {_told(turns)}")
        best = fastest(final, range(len(alone)))
        rival = fastest(final, range(len(alone), len(finalists)))
        winner = fastest(final, (best, rival))
        limit, by_rows = _limits(ranks, iteration, finalists[winner], final[winner], graph)
    ratios = [a / b for a, b in zip(final[best].layer_us, final[rival].layer_us, strict=True)]
    won_us = final[winner].layer_us
    say(f"power limit {limit:.1f} us a layer in turn, {by_rows:.1f} us by single rows")
    figure_id, reach = FIGURES[case.name]
    label = f"{case.label}, {finalists[winner].name}"
    return [
        _figure(figure_id, case.label, ratios, reach, origin),
        _figure("layer_limit", label, [us / limit for us in won_us], LIMIT_REACH, origin),
        _figure(
            "layer_limit", f"{label}, single rows", [us / by_rows for us in won_us], "", origin
        ),
    ]


def _told(turns: LayerTurns) -> str:
    if turns.error:
        return f"left out, {turns.error}"
    median_us = statistics.median(turns.layer_us)
    return f"{median_us:.1f} us a layer, {turns.watts:.0f} W, {turns.sm_clock_mhz:.0f} MHz"


def _figure(
    figure_id: str, label: str, values: Sequence[float], reach: str, origin: dict[str, str]
) -> FigureRow:
    return FigureRow(
        id=figure_id,
        case=label,
        value=statistics.median(values),
        unit="x",
        reach=reach,
        spread=spread_of(values),
        **origin,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/layers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    options = parser.parse_args()
    case, hardware = case_of(options)
    if options.schedules:
        forecast = load_forecast(options.schedules, case)
    else:
        predictor = Predictor(case, hardware, options.profile, options.lacking)
        schedules = contenders(predictor.search().race, predictor.graph)
        schedules = once_each([*schedules, *predictor.joined(schedules)])
        forecast = predictor.forecast(schedules, options.commit or this_commit())
    for prediction in forecast.predictions:
        say(f"{prediction.schedule.name}: predicted {prediction.layer_us:.1f} us a layer")
    if options.search_only:
        forecast.save(options.search_only)
        return
    schedules = [prediction.schedule for prediction in forecast.predictions]
    rows = measure(case, hardware, schedules, origin_of(options, "layers"))
    write_figures(rows, options.out)
    print(summary(rows))


if __name__ == "__main__":
    main()
