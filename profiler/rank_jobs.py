"""What the parent process asks of its GPU ranks: profile a grid, time schedules, verify.

The functions here travel to the ranks by name; they import torch only there, so that the parent
(command line, search) stays free of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.op_graph import OpGraph, RowMix
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .grid import Grid, make_grid, sustained_points
from .store import read_pairs, read_rows

if TYPE_CHECKING:
    from ..runtime.executor import Resources
    from ..runtime.launch import RankContext
    from ..runtime.plan import Schedule, Timing

KV_POOL_BYTES = 24e9
"""Pages that attention points draw from: more than the largest point needs, far beyond L2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationCase:
    """What is held fixed while schedules are compared."""

    model: ModelSpec
    hardware: HardwareSpec
    tp_degree: int
    mix: RowMix
    page_size: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileJob:
    """A profile run: which graph, into which file, and what need not be measured again."""

    model: ModelSpec
    hardware: HardwareSpec
    tp_degree: int
    path: Path
    """`NAME.csv`; rows in it are taken up, so that a killed run resumes."""
    known: tuple[Path, ...]
    """Other `NAME.csv` files whose rows count as measured, e.g. the shipped ones."""
    commit: str
    command: str


def left_to_measure(job: ProfileJob, variants: dict[str, tuple[str, ...]]) -> Grid:
    """The job's grid without what its file and the known files hold."""
    graph = OpGraph.build(job.model, job.tp_degree)
    grid = make_grid(graph, job.hardware.num_sms, variants, with_collectives=job.tp_degree > 1)
    files = [path for path in (job.path, *job.known) if path.exists()]
    solo = {row.point for path in files for row in read_rows(path)[1]}
    pair_files = [p for p in (path.with_suffix(".pairs.csv") for path in files) if p.exists()]
    pairs = {(pair.a, pair.b) for path in pair_files for pair in read_pairs(path)[1]}
    return grid.without(solo, pairs)


def _variants() -> dict[str, tuple[str, ...]]:
    """GPU variants of each kind; embedding and sampling have torch's own only."""
    from ..runtime import kernels
    from ..runtime.kernels import registry

    kernels.load("cuda")
    kinds = (
        "gemm",
        "gemm_silu",
        "norm",
        "rope_append",
        "decode_attention",
        "prefill_attention",
        "all_reduce",
    )
    named: dict[str, tuple[str, ...]] = {
        kind: tuple(name for name in registry.variants(kind, "cuda") if name != "torch")
        for kind in kinds
    }
    return {**named, "embedding": ("torch",), "sampling": ("torch",)}


def look_around(ctx: RankContext) -> list[str]:
    """What may spoil measurements on this rank's GPU, in words."""
    from .power import PowerMeter

    meter, notes = PowerMeter(ctx.rank), list[str]()
    if meter.other_processes:
        notes.append(f"GPU {ctx.rank}: {meter.other_processes} other processes use it")
    if not meter.has_energy_counter:
        notes.append(f"GPU {ctx.rank} has no energy counter: watts and joules stay unknown")
    return notes


def plan_profile(ctx: RankContext, job: ProfileJob) -> Grid:
    """What is left of a job, for `run_profile`."""
    return left_to_measure(job, _variants())


def run_profile(ctx: RankContext, job: ProfileJob, left: Grid) -> None:
    """Measure what is left of a job; rank 0 writes, all ranks take part in collectives.

    All ranks are given the same grid: they must run the same collectives.
    """
    import gc
    import sys

    import torch

    from ..runtime import kernels
    from ..runtime.device import lane_groups
    from .power import PowerMeter
    from .sweep import Sweep, run_collectives, run_sweep

    kernels.load("cuda")
    torch.cuda.set_device(ctx.rank)
    groups = lane_groups(ctx, ())
    sweep = Sweep(
        job.hardware,
        PowerMeter(ctx.rank),
        KV_POOL_BYTES,
        groups["network"] if groups is not None else None,
    )
    header = read_rows(job.path)[0] if job.path.exists() else dict[str, str]()
    if ctx.rank == 0 and not header:
        graph = OpGraph.build(job.model, job.tp_degree)
        points = sustained_points(graph, job.hardware.num_sms, _variants())
        sustained = sweep.sustained_gemm(points)
        header = sweep.header(job.commit, job.command, sweep.static_watts(), sustained)

    def progress(done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            print(f"profile   {done} of {total} points", file=sys.stderr, flush=True)

    if ctx.rank == 0:
        run_sweep(sweep, left, job.path, header, progress)
    if ctx.world_size > 1:
        run_collectives(sweep, left, job.path, header, rank=ctx.rank)
    del sweep
    gc.collect()
    torch.cuda.empty_cache()


def measure_schedules(
    ctx: RankContext,
    case: IterationCase,
    schedules: Sequence[Schedule],
    rounds: int,
    turn_s: float,
) -> list[Timing]:
    """Time whole iterations, interleaved; see `iteration.py`."""
    from . import iteration

    return iteration.measure_schedules(ctx, case, schedules, rounds, turn_s)


def release_memory(ctx: RankContext) -> None:
    """Drop the model that `measure_schedules` keeps."""
    from . import iteration

    iteration.unload_model(ctx)


def resources_for(ctx: RankContext, schedules: Sequence[Schedule]) -> Resources:
    """Partitions and groups for a verification; `remember_case` says for what."""
    from ..runtime.device import device_resources

    case: IterationCase = ctx.state["case"]
    graph = OpGraph.build(case.model, case.tp_degree)
    return device_resources(ctx, graph, case.hardware, schedules)


def remember_case(ctx: RankContext, case: IterationCase) -> None:
    """Keep the case on the rank for `resources_for`."""
    ctx.state["case"] = case
