"""A profile run on this machine's ranks: several models, one file each, within its minutes.

Rank 0 measures kernels, joules and co-runs alone while the others wait; all ranks measure
collectives, and GEMMs beside them, in step. Shapes that several models share are measured once,
into the file of the first one that has them. Rows are stored at once, so that a killed run resumes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.gpu_failures import is_out_of_memory
from ..runtime.launch import RankContext
from ..runtime.op_graph import OpGraph
from . import interference
from .campaign import (
    CHUNK,
    SECONDS_PER_JOULE_POINT,
    SECONDS_PER_PAIR,
    Budget,
    measure_curves,
    measure_joules,
    stage_ends,
)
from .grid import (
    Family,
    Variants,
    collective_joule_points,
    collective_points,
    families,
    sustained_points,
)
from .interference import Fastest, Together
from .power import PowerMeter
from .profile import PairRow, Point, Row, TripleRow
from .progress import BudgetBar, HandBar, stderr_console
from .rank_jobs import KV_POOL_BYTES, ProfileJob, ProfileRun, gpu_variants
from .store import PAIRS, TRIPLES, ProfileWriter, read_pairs, read_rows, read_triples, tidy
from .sweep import Sweep, failed_row

TRIPLE_JOBS, TRIPLES_OF_JOB = 2, 3
"""Jobs with three-way checks, and how many each."""
_Entry = tuple[Path, Together]
"""A co-run and the `NAME.csv` of its job."""


def _alone(value: Any) -> Any:  # noqa: ANN401
    """What one rank agrees with itself on."""
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Which file each kernel's rows go to."""

    graphs: tuple[OpGraph, ...]
    families: tuple[Family, ...]
    path_of: dict[tuple[str, str], Path]
    """By (kind, shape)."""


class _Files:
    """Open profile files of a run, header first."""

    def __init__(self, header: dict[str, str]) -> None:
        self._header = header
        self._writers: dict[Path, ProfileWriter] = {}
        self._added: dict[Path, int] = {}
        """Rows put into files of another run."""

    def append(self, path: Path, row: Any) -> None:  # noqa: ANN401 - Row, PairRow or TripleRow
        if path not in self._writers:
            if path.exists() and not self._is_of_this_run(path):
                self._added[path] = 0
            make = ProfileWriter.solo
            if path.name.endswith(PAIRS):
                make = ProfileWriter.pairs
            elif path.name.endswith(TRIPLES):
                make = ProfileWriter.triples
            self._writers[path] = make(path, self._header_of(path))
        self._writers[path].append(row)
        if path in self._added:
            self._added[path] += 1

    def _is_of_this_run(self, path: Path) -> bool:
        """Whether a file of kernels alone names this run's commit and command."""
        if path.name.endswith((PAIRS, TRIPLES)):
            return True
        header = read_rows(path)[0]
        return all(header.get(key) == self._header.get(key) for key in ("commit", "command"))

    def additions(self, path: Path) -> dict[str, str]:
        """What the header of another run's file must say of the rows that this run put in."""
        if not self._added.get(path):
            return {}
        before = read_rows(path)[0].get("added", "")
        named = (f"{key} {self._header.get(key, 'unknown')}" for key in ("date", "gpu", "driver"))
        text = (
            f"{self._added[path]} rows, {', '.join(named)}, commit {self._header['commit']}: "
            f"{self._header['command']}; {self._header.get('regime', '')}"
        )
        return {"added": f"{before} | {text}" if before else text}

    def _header_of(self, path: Path) -> dict[str, str]:
        """That of the solo file beside a new file of co-runs, else this run's."""
        name = path.name.removesuffix(PAIRS).removesuffix(TRIPLES).removesuffix(".csv")
        solo = path.with_name(f"{name}.csv")
        return read_rows(solo)[0] if solo != path and solo.exists() else self._header

    def close(self) -> None:
        for writer in self._writers.values():
            writer.__exit__(None, None, None)
        self._writers.clear()


def run(ctx: RankContext, order: ProfileRun) -> None:
    """Measure what the run's jobs lack; called on every rank.

    Raises:
        RuntimeError: a kernel took the CUDA context with it; its row is stored, run again.
    """
    from ..runtime import kernels
    from ..runtime.device import lane_groups

    started_s, seconds = time.monotonic(), 60 * order.minutes
    budget = Budget(clock=time.monotonic, start_s=started_s, seconds=seconds)
    kernels.load("cuda")
    torch.cuda.set_device(ctx.rank)
    groups = lane_groups(ctx, ())
    hardware = order.jobs[0].hardware
    sweep = Sweep(
        hardware,
        PowerMeter(ctx.rank),
        KV_POOL_BYTES,
        groups["network"] if groups is not None else None,
    )
    variants = gpu_variants()
    places = _places(order.jobs, variants)
    rows = _known_rows(order.jobs)
    first, sustained = order.jobs[0], dict[str, str]()
    header = sweep.header(first.commit, first.command, sweep.static_watts(), {})
    files = _Files(header)
    in_step = ctx.world_size > 1 and "collectives" in order.parts
    is_first = "compute" not in order.parts  # else kernels beside collectives are chosen by curves
    try:
        with HandBar(stderr_console() if ctx.rank == 0 else None) as hand:
            hand.started_s = started_s
            bar = BudgetBar(bar=hand, seconds=seconds)
            if in_step and is_first:
                _measure_in_step(ctx, sweep, order, rows, variants, budget, files, bar)
            if ctx.rank == 0:
                _measure_alone(sweep, order, places, rows, variants, budget, files, bar)
                if "compute" in order.parts and not _have_sustained(order.jobs):
                    bar.enter("GEMMs for seconds")
                    points = sustained_points(places.graphs, hardware.num_sms, variants)
                    sustained = sweep.sustained_gemm(points)
            if in_step and not is_first:
                _measure_in_step(ctx, sweep, order, rows, variants, budget, files, bar)
    finally:
        files.close()
    if ctx.rank == 0:
        for path in {job.path for job in order.jobs if job.path.exists()}:
            tidy(path, {**sustained, **files.additions(path)})
    del sweep
    gc.collect()
    torch.cuda.empty_cache()


def _have_sustained(jobs: Sequence[ProfileJob]) -> bool:
    paths = [job.path for job in jobs if job.path.exists()]
    return all("sustained_gemm" in read_rows(path)[0] for path in paths)


def _places(jobs: Sequence[ProfileJob], variants: Variants) -> _Places:
    found: dict[tuple[str, str, int], Family] = {}
    path_of: dict[tuple[str, str], Path] = {}
    graphs = tuple(OpGraph.build(job.model, job.tp_degree) for job in jobs)
    for job, graph in zip(jobs, graphs, strict=True):
        hardware = job.hardware
        for family in families(graph, hardware.num_sms, hardware.sm_granularity, variants):
            key = family.kind, family.shape, family.kv_len
            if key not in found or (family.edge and not found[key].edge):
                found[key] = family  # a layer's op at every share before an epilogue's on all SMs
            path_of.setdefault(key[:2], job.path)
    return _Places(graphs=graphs, families=tuple(found.values()), path_of=path_of)


def _known_rows(jobs: Sequence[ProfileJob]) -> dict[Point, Row]:
    """Rows of the jobs' own files and of those that count as measured."""
    paths = dict.fromkeys(path for job in jobs for path in (*job.known, job.path))
    return {row.point: row for path in paths if path.exists() for row in read_rows(path)[1]}


def _measure_alone(
    sweep: Sweep,
    order: ProfileRun,
    places: _Places,
    rows: dict[Point, Row],
    variants: Variants,
    budget: Budget,
    files: _Files,
    bar: BudgetBar,
) -> None:
    """Curves, joules and co-runs of one GPU."""

    def store(row: Row) -> Row:
        point = row.point
        if is_out_of_memory(row.error):  # not the kernel's fault: another run measures it again
            _say(bar, f"left out for now: {row.error}")
            return row
        files.append(places.path_of[point.kind, point.shape], row)
        if row.error and sweep.has_lost_context():
            raise RuntimeError(
                f"{point} took the CUDA context with it ({row.error}); its row is stored, so that "
                "the same command goes on behind it"
            )
        return row

    def measure(point: Point, with_joules: bool) -> Row:
        row = store(sweep.measure(point, with_joules))
        bar.count()
        return row

    def on_chunk(done: int, left: Sequence[Point]) -> None:
        sweep.compile_ahead(left[:CHUNK])
        if not bar.bar.is_shown:
            took_s = budget.clock() - budget.start_s
            _say(bar, f"{done} rows, {len(left)} more points are worth it, {took_s:.0f} s")

    curves_until, joules_until = stage_ends(order.parts)

    if "compute" in order.parts:
        missing = [
            family.point(variant, family.tokens[0], family.num_sms)
            for family in places.families
            for variant in family.variants
        ]
        bar.enter("compiling kernels")
        lost = sweep.compile(point for point in missing if point not in rows)
        if lost is not None:
            store(failed_row(lost, "took the CUDA context with it"))
        bar.enter("curves")
        is_whole = measure_curves(
            places.families,
            rows,
            lambda point: measure(point, False),
            budget,
            on_chunk,
            curves_until,
        )
        _say(bar, "every curve is known" if is_whole else "the time for curves is over")
    if "joules" in order.parts:
        bar.enter("joules")
        measure_joules(
            places.families,
            rows,
            lambda point: measure(point, True),
            budget,
            on_chunk,
            joules_until,
        )
    if "pairs" in order.parts:
        hardware, fastest = sweep.hardware, Fastest(rows.values(), variants)
        size = hardware.num_sms, hardware.sm_granularity
        jobs = list(zip(order.jobs, places.graphs, strict=True))
        wanted = [
            _left(job, interference.triples(graph, fastest, *size)[:TRIPLES_OF_JOB])
            for job, graph in jobs[:TRIPLE_JOBS]
        ]
        wanted += [_left(job, interference.pairs(graph, fastest, *size)) for job, graph in jobs]
        _co_run(sweep, interference.in_turn(wanted), files, budget, bar)


def _measure_in_step(
    ctx: RankContext,
    sweep: Sweep,
    order: ProfileRun,
    rows: dict[Point, Row],
    variants: Variants,
    budget: Budget,
    files: _Files,
    bar: BudgetBar,
) -> None:
    """Collectives and GEMMs beside them, on all ranks; rank 0 decides, counts and writes."""
    import torch.distributed as dist

    def agree(values: Any) -> Any:  # noqa: ANN401 - whatever rank 0 has
        box = [values]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    num_sms, size = sweep.hardware.num_sms, sweep.hardware.sm_granularity
    wanted: list[list[_Entry]] = []
    for job in order.jobs:
        if job.tp_degree != ctx.world_size:
            continue
        graph = OpGraph.build(job.model, job.tp_degree)
        points = collective_points(graph, num_sms, variants)
        bar.enter("collectives")
        for point in agree([point for point in points if point not in rows]):
            dist.barrier()
            rows[point] = sweep.measure_collective(point)
            if ctx.rank == 0:
                files.append(job.path, rows[point])
                bar.count()
        if "joules" in order.parts:
            bar.enter("joules of collectives")
            points = collective_joule_points(graph, num_sms, variants)
            for point in agree([p for p in points if p in rows and _lacks_joules(rows[p])]):
                if not agree(budget.has_room(SECONDS_PER_JOULE_POINT, 1.0)):
                    break
                dist.barrier()
                rows[point] = sweep.measure_collective_joules(point, agree)
                if ctx.rank == 0:
                    files.append(job.path, rows[point])
                    bar.count()
        fastest = Fastest(rows.values(), variants)
        pairs = interference.network_pairs(graph, fastest, num_sms, variants)
        threes = interference.network_triples(graph, fastest, num_sms, size, variants)
        wanted += [_left(job, pairs), _left(job, threes)]
    if "pairs" in order.parts:
        entries = agree(interference.in_turn(wanted))
        _co_run(sweep, entries, files if ctx.rank == 0 else None, budget, bar, agree)


def _lacks_joules(row: Row) -> bool:
    return not row.error and not row.has_measured_joules


def _co_run(
    sweep: Sweep,
    entries: Sequence[_Entry],
    files: _Files | None,
    budget: Budget,
    bar: BudgetBar,
    agree: Callable[[Any], Any] = _alone,
) -> None:
    """Measure co-runs until the run is over; `files` None: another rank writes."""
    bar.enter("co-runs", f"of {len(entries)}")
    for done, (path, together) in enumerate(entries):
        if not agree(budget.has_room(SECONDS_PER_PAIR, 1.0)):
            _say(bar, f"the time for co-runs is over: {done} of {len(entries)}")
            return
        try:
            row = sweep.measure_together(together, agree)
        except (RuntimeError, ValueError) as err:
            if isinstance(err, RuntimeError) and (agree is not _alone or sweep.has_lost_context()):
                raise  # ranks may have parted, or nothing can run any more
            _say(bar, f"left out {' beside '.join(p.variant for p in together)}: {err}")
            continue
        if files is not None:
            files.append(path.with_suffix(TRIPLES if isinstance(row, TripleRow) else PAIRS), row)
        bar.count()


def _left(job: ProfileJob, wanted: Sequence[Together]) -> list[_Entry]:
    """What no file of the job holds, with the file it goes to."""
    known: list[PairRow | TripleRow] = []
    for path in dict.fromkeys((*job.known, job.path)):
        if path.with_suffix(PAIRS).exists():
            known += read_pairs(path.with_suffix(PAIRS))[1]
        if path.with_suffix(TRIPLES).exists():
            known += read_triples(path.with_suffix(TRIPLES))[1]
    return [(job.path, together) for together in interference.left(wanted, known)]


def _say(bar: BudgetBar, text: str) -> None:
    """A line on the terminal of rank 0; other ranks keep silent."""
    bar.bar.say(f"profile   {text}")
