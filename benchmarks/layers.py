"""One layer, sequential against overlapped, on the real executor: `layer_8b`, `layer_70b_tp2`.

    python benchmarks/layers.py --case 8b --profile results/profiles/h200
    python benchmarks/layers.py --case 70b --profile results/profiles/h200

The search makes schedules from the profile (`--search-only` needs no GPU and stores them for
`--schedules`). All sequential and the best overlapped ones take turns as CUDA graphs of 16 and of 4
layers; a layer is a twelfth of the difference. The two best of each kind meet once more in a longer
run; the figure is the ratio of the best there. `layer_limit` sets the winner's period against what
the power cap allows: dynamic joules of its ops alone, measured in the same run and brought to the
plan's clock, over the watts that the cap leaves beside static power.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import log, prod
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from ab import recorded_command
from figures import FIGURES, FigureRow, spread_of, summary, write_figures

from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.gpu_stage import find_devices
from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.autotune.search import distinct, overlaps, search
from nanoflow_tune.profiler.profile import Point, Row
from nanoflow_tune.profiler.rank_jobs import IterationCase
from nanoflow_tune.profiler.store import load_profile, profile_files
from nanoflow_tune.runtime.launch import RankContext, RankGroup
from nanoflow_tune.runtime.op_graph import GEMM_KINDS, Op, OpGraph, RowMix
from nanoflow_tune.runtime.op_shapes import shape_numbers
from nanoflow_tune.runtime.plan import Candidate, Schedule
from nanoflow_tune.runtime.schedule import row_mix
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_space
from nanoflow_tune.search_spaces.records import from_mapping, to_mapping
from nanoflow_tune.search_spaces.schema import HardwareSpec

if TYPE_CHECKING:
    from nanoflow_tune.profiler.iteration import LayerTurns

LAYERS, FEW_LAYERS = 16, 4
RACE_ROUNDS, RACE_TURN_S = 2, 0.25
FINAL_ROUNDS, FINAL_TURN_S = 6, 0.5
FINALISTS = 2
"""Of each kind: the race is too short to tell neighbours apart."""
OVERLAPPED_IN_RACE, SEQUENTIAL_IN_RACE = 6, 3
LIBRARY = "cublas"
PROMPT = 512
SMALL_SHARE = 0.48
"""Part of the SMs on which the largest GEMM runs at higher clocks, for joules over clock."""
VOCABULARY = 2048
"""Of the measured model: its LM head cancels out, and should take little time before it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCase:
    """One figure's model, ranks and reach."""

    id: str
    model: str
    tp_degree: int
    reach: str

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.model} TP{self.tp_degree} layer, 1024 decodes at 768 keys + 1024 prefill"


CASES = {
    "8b": LayerCase(id="layer_8b", model="llama3-8b", tp_degree=1, reach=">= 0.99"),
    "70b": LayerCase(id="layer_70b_tp2", model="llama2-70b", tp_degree=2, reach=">= 1.00"),
}
LIMIT_REACH = "<= 1.05"
MIX = RowMix(
    decode_tokens=1024,
    prefill_tokens=1024,
    decode_context_tokens=768,
    prefill_context_tokens=(PROMPT + 1) / 2,
)


def iteration_case(case: LayerCase, hardware: HardwareSpec) -> IterationCase:
    """The model cut to some layers and a small vocabulary."""
    model = replace(load_model(case.model), num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    return IterationCase(model=model, hardware=hardware, tp_degree=case.tp_degree, mix=MIX)


def find_schedules(case: LayerCase, hardware: HardwareSpec, profile: Path) -> list[Schedule]:
    """What the search makes of a profile: sequential ones and the best overlapped ones."""
    iteration = iteration_case(case, hardware)
    graph = OpGraph.build(iteration.model, case.tp_degree)
    cost_model = CostModel(load_profile(profile_files(profile)), hardware)
    result = search(graph, cost_model, hardware, load_space("quick"), MIX, seed=0, on_progress=_say)
    return contenders(result.race, graph)


def contenders(race: Sequence[Candidate], graph: OpGraph) -> list[Schedule]:
    """The few fastest predicted of each kind, sequential first; each schedule once."""
    ranked = sorted(distinct(race), key=lambda candidate: candidate.predicted.period_us)
    base = [c.schedule for c in ranked if c.schedule.name == "sequential"]
    overlapped = [c.schedule for c in ranked if overlaps(c.schedule, graph)]
    others = [c.schedule for c in ranked if not overlaps(c.schedule, graph)]
    library = [with_gemms(schedule, graph, LIBRARY) for schedule in base]
    chosen = [*base, *library, *others[:SEQUENTIAL_IN_RACE], *overlapped[:OVERLAPPED_IN_RACE]]
    once: dict[object, Schedule] = {}
    for schedule in chosen:
        once.setdefault((schedule.nano_batches, schedule.nano_ops), schedule)
    return list(once.values())


def with_gemms(schedule: Schedule, graph: OpGraph, variant: str) -> Schedule:
    """The schedule with one kernel for every GEMM: what a user without own kernels has."""
    nano_ops = tuple(
        replace(nano_op, variant=variant) if graph.op(nano_op.op).kind in GEMM_KINDS else nano_op
        for nano_op in schedule.nano_ops
    )
    return replace(schedule, nano_ops=nano_ops, name=f"{schedule.name}_{variant}")


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
    missing = [row.point for row in rows if row.joules_source != "measured"]
    if missing:
        raise ValueError(f"the power limit needs joules of every op, but {missing[0]} has none")
    joules = sum(
        dynamic_joules(row, static_w) * (clock_mhz / row.sm_clock_mhz) ** exponent for row in rows
    )
    return 1e6 * joules / (cap_w - static_w)


def measure_turns(
    ctx: RankContext,
    case: IterationCase,
    schedules: tuple[Schedule, ...],
    rounds: int,
    turn_s: float,
) -> list[LayerTurns]:
    """Runs on every rank."""
    from nanoflow_tune.profiler import iteration

    return iteration.measure_layers(ctx, case, schedules, rounds, turn_s, FEW_LAYERS)


def measure_solo(
    ctx: RankContext, case: IterationCase, points: tuple[Point, ...]
) -> tuple[list[Row], float, float]:
    """Rows with joules, static watts and the cap; runs on every rank, collectives in step."""
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
    static_w = sweep.static_watts()
    sweep.timer.heat(1000.0)

    def agree(values: list[int]) -> list[int]:
        box = [values]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    rows = [
        sweep.measure_collective_joules(point, agree)
        if is_collective(point.kind)
        else sweep.measure(point, with_joules=True)
        for point in points
    ]
    return rows, static_w, sweep.meter.power_cap_w


def _limit(
    ranks: RankGroup, case: IterationCase, schedule: Schedule, turns: LayerTurns, graph: OpGraph
) -> float:
    """Power-limited time of a layer of the schedule, on the first rank."""
    num_sms = case.hardware.num_sms
    points = solo_points(schedule, graph, num_sms)
    gemms = [point for point in points if point.kind in GEMM_KINDS]
    large = max(gemms, key=lambda point: point.tokens * prod(shape_numbers(point.shape)))
    sizes = case.hardware.sm_granularity
    small = replace(large, num_sms=sizes * round(SMALL_SHARE * num_sms / sizes))
    found = ranks.call(measure_solo, case, (*points, small))
    rows, static_w, cap_w = found[0]
    for row in rows:
        _say(
            f"{row.point.kind} {row.point.variant}: {row.joules:.4f} J, {row.sm_clock_mhz:.0f} MHz"
        )
    exponent = clock_exponent(rows[points.index(large)], rows[-1], static_w)
    _say(
        f"dynamic joules rise with clock^{exponent:.2f}; static {static_w:.0f} W, cap {cap_w:.0f} W"
    )
    return limit_us(rows[:-1], exponent, turns.sm_clock_mhz, static_w, cap_w)


def measure(
    case: LayerCase, hardware: HardwareSpec, schedules: Sequence[Schedule], origin: dict[str, str]
) -> list[FigureRow]:
    """Race, final and limit of one case on this machine's GPUs."""
    iteration = iteration_case(case, hardware)
    graph = OpGraph.build(iteration.model, case.tp_degree)
    with RankGroup(case.tp_degree, device="cuda") as ranks:
        race = ranks.call(measure_turns, iteration, tuple(schedules), RACE_ROUNDS, RACE_TURN_S)[0]
        for schedule, turns in zip(schedules, race, strict=True):
            _say(f"{schedule.name}: {statistics.median(turns.layer_us):.1f} us a layer")
        is_overlapped = [overlaps(schedule, graph) for schedule in schedules]
        ranked = sorted(range(len(race)), key=lambda i: statistics.median(race[i].layer_us))
        alone = [i for i in ranked if not is_overlapped[i]][:FINALISTS]
        beside = [i for i in ranked if is_overlapped[i]][:FINALISTS]
        finalists = tuple(schedules[i] for i in (*alone, *beside))
        final = ranks.call(measure_turns, iteration, finalists, FINAL_ROUNDS, FINAL_TURN_S)[0]
        for schedule, turns in zip(finalists, final, strict=True):
            _say(
                f"final {schedule.name}: {statistics.median(turns.layer_us):.1f} us a layer, "
                f"{turns.watts:.0f} W, {turns.sm_clock_mhz:.0f} MHz"
            )
        best = fastest(final, range(len(alone)))
        rival = fastest(final, range(len(alone), len(finalists)))
        winner = fastest(final, (best, rival))
        limit = _limit(ranks, iteration, finalists[winner], final[winner], graph)
    ratios = [a / b for a, b in zip(final[best].layer_us, final[rival].layer_us, strict=True)]
    beyond = [us / limit for us in final[winner].layer_us]
    _say(f"power limit {limit:.1f} us a layer")
    return [
        _figure(case.id, case.label, ratios, case.reach, origin),
        _figure(
            "layer_limit", f"{case.label}, {finalists[winner].name}", beyond, LIMIT_REACH, origin
        ),
    ]


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/layers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", choices=tuple(CASES), required=True)
    parser.add_argument("--gpu", default="h200", help="hardware spec (default: h200)")
    parser.add_argument("--profile", type=Path, default=Path("results/profiles/h200"))
    parser.add_argument("--schedules", type=Path, help="take these instead of searching")
    parser.add_argument("--search-only", type=Path, metavar="FILE", help="store them, measure none")
    parser.add_argument("--out", type=Path, default=FIGURES, help="figures, rows replaced")
    parser.add_argument("--commit", default="", help="of the source; default: git's")
    options = parser.parse_args()
    case, hardware = CASES[options.case], load_hardware(options.gpu)
    if options.schedules:
        found = yaml.safe_load(options.schedules.read_text(encoding="utf-8"))
        schedules = [from_mapping(Schedule, entry, str(options.schedules)) for entry in found]
    else:
        schedules = find_schedules(case, hardware, options.profile)
    if options.search_only:
        text = yaml.safe_dump([to_mapping(schedule) for schedule in schedules], sort_keys=False)
        options.search_only.write_text(text, encoding="utf-8")
        return
    origin = {
        "command": recorded_command("layers", sys.argv[1:]),
        "commit": options.commit or this_commit(),
        "gpu": find_devices().name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    rows = measure(case, hardware, schedules, origin)
    write_figures(rows, options.out)
    print(summary(rows))


if __name__ == "__main__":
    main()
