"""How much of an all-reduce hides behind GEMMs: every transport beside three llama2-70b TP2 layers.

    python benchmarks/all_reduce_hidden.py --gemm sm90 --commit $(git rev-parse --short HEAD)

Six all-reduces of 1024 rows run beside six pairs of GEMMs (kqv and o_proj, up_gate and down, three
times), each pair behind a residual + RMSNorm. `pipelined`: pairs belong to two nano-batches in
turn, as a plan has them; all-reduce p starts when pair p - 1, its producer, is done, runs beside
pair p of the other nano-batch and must be done before the norm of pair p + 1, its consumer (the
first one belongs to the replay before). `independent`: the six all-reduces run in a row on a second
stream and nobody waits for them. Cost = (together - GEMMs alone) / (the fastest all-reduces alone).
Norms run on both sides; after `copy_engine` they also sum what was received, so that every cost
holds the reduction. `copy_engine_halves` splits the rows of an all-reduce and its norm over the
ranks (`all_reduce_workload.py`); plans cannot use it yet, so that the best of the others is told
as well. With `--share N` all-reduces run on N SMs of their own, GEMMs on the others.

All contenders have a first round of turns; those that may win have the other rounds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ab import recorded_command
from all_reduce_workload import (
    GEMMS,
    HALVES,
    HIDDEN,
    MAX_DOUBLINGS,
    NUM_CALLS,
    NUM_PAIRS,
    SUMS_LATER,
    Options,
    Workload,
)
from figures import FIGURES, FigureRow, spread_of, summary, write_figures

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.runtime.launch import RankContext, RankGroup

if TYPE_CHECKING:
    import torch

    from nanoflow_tune.profiler.power import PowerMeter

ARRANGEMENTS = ("pipelined", "independent")
ALONE_MIB = (4, 16, 32)
REACH = "<= 0.5"
WARM_S, TURN_WARM_S, TURN_S = 0.6, 0.1, 0.4
TRANSPORTS = (
    "nccl", "nccl_8", "nccl_16",
    "symm_one_shot_8", "symm_one_shot_16", "symm_one_shot_32",
    "symm_two_shot_8", "symm_two_shot_16", "symm_two_shot_32",
    "copy_engine", "copy_engine_add", HALVES,
)  # fmt: skip
CONTENDERS, ALONE_CONTENDERS = 3, 2
"""Transports of an arrangement, and alone, that have more than one round."""
Times = dict[str, dict[str, Any]]
"""By contender: `us` (one value a round), `mhz`, `watts`."""


def measure(ctx: RankContext, options: Options) -> tuple[Times, dict[str, list[float]], str]:
    """On every rank: turns of all contenders, each transport alone by size, and the GPU's name."""
    import torch

    from nanoflow_tune.profiler.power import PowerMeter

    meter = PowerMeter(ctx.rank)
    load = Workload(ctx, options)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def add(name: str, transport: str, arrangement: str) -> None:
        for pair in range(NUM_PAIRS):
            load.run(transport, pair, arrangement)
        torch.cuda.synchronize()
        graphs[name] = load.capture(transport, arrangement)

    add(GEMMS, "", GEMMS)
    for transport in options.transports:
        for arrangement in (*ARRANGEMENTS, "alone"):
            add(f"{transport} {arrangement}", transport, arrangement)
    sizes = {
        transport: [
            _burst_us(load.capture_calls(transport, mib * 2**20 // (2 * HIDDEN)).replay)
            for mib in ALONE_MIB
        ]
        for transport in options.transports
    }
    times = _turns(graphs, load, meter, options.rounds)
    return times, sizes, torch.cuda.get_device_name()


def _burst_us(replay: Callable[[], None]) -> float:
    """Median time of one call of a graph of `NUM_CALLS`, in a short burst."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
    for _ in range(3):
        replay()
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    steps = [a.elapsed_time(b) for a, b in pairwise(events)]
    return 1e3 * statistics.median(steps) / NUM_CALLS


def _turns(
    graphs: dict[str, torch.cuda.CUDAGraph], load: Workload, meter: PowerMeter, rounds: int
) -> Times:
    """Interleaved turns of all graphs; the ranks replay equally often."""
    import torch
    import torch.distributed as dist

    from nanoflow_tune.profiler.timing import timed_replays

    def count_of(graph: torch.cuda.CUDAGraph, seconds: float) -> int:
        """Replays that take so long, the same number on all ranks."""
        load.refresh()
        once_s = _burst_us(graph.replay) * NUM_CALLS * 1e-6
        box = [max(5, round(seconds / once_s))]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    counts = {name: count_of(graph, TURN_S) for name, graph in graphs.items()}
    warm = count_of(graphs[GEMMS], TURN_WARM_S)
    times: Times = {name: {"us": [], "mhz": [], "watts": []} for name in graphs}
    for _ in range(round(WARM_S / TURN_WARM_S) * warm):
        graphs[GEMMS].replay()
    names = list(graphs)
    for turn in range(rounds):
        if turn == 1:  # all ranks must agree
            box = [contenders(times)]
            dist.broadcast_object_list(box, src=0)
            names = box[0]
        for name in names if turn % 2 == 0 else names[::-1]:
            timed = counts[name]
            samples: list[float] = []
            clocks: list[float] = []
            for _ in range(warm):  # as hot as in a server
                graphs[GEMMS].replay()
            with meter:
                while len(samples) < timed:  # refreshed in time: sums must stay finite
                    part = min(timed - len(samples), MAX_DOUBLINGS)
                    load.refresh()
                    torch.cuda.synchronize()
                    dist.barrier()
                    some, clock = timed_replays(graphs[name].replay, part, meter)
                    samples += some
                    clocks.append(clock)
            times[name]["us"].append(statistics.median(samples))
            times[name]["mhz"].append(statistics.mean(clocks))
            times[name]["watts"].append(meter.watts)
    return times


def contenders(times: Times) -> list[str]:
    """The GEMMs and whatever may be the best after one round, in the order of `times`."""
    kept = {GEMMS}
    for arrangement in (*ARRANGEMENTS, "alone"):
        names = [name for name in times if name.partition(" ")[2] == arrangement]
        if arrangement == "alone":
            names = [name for name in names if name.partition(" ")[0] not in SUMS_LATER] or names
        names.sort(key=lambda name: times[name]["us"][0])
        kept |= set(names[: ALONE_CONTENDERS if arrangement == "alone" else CONTENDERS])
        kept |= {name for name in names if name.startswith("copy_engine ")}
    return [name for name in times if name in kept]


def slowest_rank(results: Iterable[Times]) -> Times:
    """Of each round the slowest rank's time; clocks and watts of all ranks."""
    every = list(results)
    return {
        name: {
            "us": [max(us) for us in zip(*(times[name]["us"] for times in every), strict=True)],
            "mhz": [value for times in every for value in times[name]["mhz"]],
            "watts": [value for times in every for value in times[name]["watts"]],
        }
        for name in every[0]
    }


def costs(times: Times, transports: Iterable[str]) -> dict[tuple[str, str], list[float]]:
    """(transport, arrangement) -> (together - GEMMs alone) / (fastest all-reduces alone), by round.

    The fastest all-reduces are those of one transport that does its own sum: `copy_engine` alone
    moves rows only, so it is no candidate. Whoever had one round is compared with that round.
    """
    names = [name for name in transports if name not in SUMS_LATER] or list(transports)
    alone_us = [times[f"{name} alone"]["us"] for name in names]
    most = max(map(len, alone_us))
    fastest = min((us for us in alone_us if len(us) == most), key=statistics.median)
    return {
        (name, arrangement): [
            (together - gemms) / alone
            for together, gemms, alone in zip(
                times[f"{name} {arrangement}"]["us"], times[GEMMS]["us"], fastest, strict=False
            )
        ]
        for name in transports
        for arrangement in ARRANGEMENTS
    }


_COLUMNS = ("contender", "us", "cost", "spread", "mhz", "watts", *(f"us_{m}MiB" for m in ALONE_MIB))


def table(
    times: Times, found: dict[tuple[str, str], list[float]], sizes: dict[str, list[float]]
) -> list[list[str]]:
    """Rows of the table: the GEMMs, then each transport alone and in both arrangements."""
    lines = [list(_COLUMNS)]
    for name, turn in times.items():
        transport, _, arrangement = name.partition(" ")
        cost = found.get((transport, arrangement), [])
        alone = sizes[transport] if arrangement == "alone" else []
        lines.append(
            [
                name,
                f"{statistics.median(turn['us']):.1f}",
                f"{statistics.median(cost):.3f}" if cost else "",
                spread_of(cost) if cost else "",
                f"{statistics.mean(turn['mhz']):.0f}",
                f"{statistics.mean(turn['watts']):.0f}",
                *(f"{us:.1f}" for us in alone or [float("nan")] * len(ALONE_MIB)),
            ]
        )
    return [[cell if cell != "nan" else "" for cell in line] for line in lines]


def best(
    found: dict[tuple[str, str], list[float]], arrangement: str, transports: Iterable[str]
) -> tuple[str, str]:
    """The key of the least cost; of transports that had all rounds, where some had one only."""
    keys = [(transport, arrangement) for transport in transports]
    most = max(len(found[key]) for key in keys)
    whole = [key for key in keys if len(found[key]) == most]
    return min(whole, key=lambda key: statistics.median(found[key]))


def _row(case: str, values: list[float], origin: dict[str, str], reach: str = REACH) -> FigureRow:
    return FigureRow(
        id="ar_hidden",
        case=case,
        value=statistics.median(values),
        unit="x",
        reach=reach,
        spread=spread_of(values),
        **origin,
    )


def main() -> None:
    """Measure, print the table, write it and the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks/all_reduce_hidden.py", description=__doc__)
    parser.add_argument("--gemm", default="cublas", help="GEMM variant (default: cublas)")
    parser.add_argument("--transports", nargs="+", default=list(TRANSPORTS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--share", type=int, default=0, help="SMs of the all-reduces' own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit", default="", help="of the source; default: git's")
    parser.add_argument("--out", type=Path, default=Path("results/all_reduce_hidden.csv"))
    parser.add_argument("--figures", type=Path, default=FIGURES)
    given = parser.parse_args()
    options = Options(
        gemm=given.gemm,
        transports=tuple(given.transports),
        tokens=given.tokens,
        share=given.share,
        rounds=given.rounds,
    )
    with RankGroup(2, device="cuda", timeout_s=560.0) as ranks:
        results = ranks.call(measure, options)
    times = slowest_rank(result[0] for result in results)
    sizes, gpu = results[0][1], results[0][2]
    found = costs(times, options.transports)
    lines = table(times, found, sizes)
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    command = recorded_command("all_reduce_hidden", sys.argv[1:])
    origin = {
        "command": command,
        "commit": given.commit or this_commit(),
        "gpu": f"2 x {gpu}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    rows: list[FigureRow] = []
    for arrangement in ARRANGEMENTS:
        name = best(found, arrangement, options.transports)
        rows.append(_row(f"{arrangement}, best transport, {options.gemm}", found[name], origin))
        print(f"{arrangement}: {name[0]} hides best, cost {rows[-1].value:.3f}")
        planned = [transport for transport in options.transports if transport != HALVES]
        if planned and name[0] == HALVES:
            name = best(found, arrangement, planned)
            case = f"{arrangement}, best transport of plans, {options.gemm}"
            rows.append(_row(case, found[name], origin, reach=""))
            print(f"{arrangement}: {name[0]} hides best of those in plans, {rows[-1].value:.3f}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {command}\n# commit {rows[0].commit}, {rows[0].gpu}, {rows[0].date}\n")
        csv.writer(file, lineterminator="\n").writerows(lines)
    write_figures(rows, given.figures)
    print(summary(rows))


if __name__ == "__main__":
    main()
