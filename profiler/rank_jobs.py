"""What the parent process asks of its GPU ranks: profile a grid, time schedules, verify.

The functions here travel to the ranks by name; they import torch only there, so that the parent
(command line, search) stays free of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.gpu_failures import memory_for
from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.op_shapes import RESOURCE_OF_KIND
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .grid import collective_points, families
from .profile import ALL_PARTS, Point, ProfilePart, Row
from .refinement import coarse_points
from .store import read_rows

if TYPE_CHECKING:
    from ..runtime.executor import Resources
    from ..runtime.launch import RankContext
    from ..runtime.plan import Schedule, Timing

KV_POOL_BYTES = 24e9
"""Pages that attention points draw from: more than the largest point needs, far beyond L2."""
NO_MEMORY = (
    "end what else runs on the GPU; measured rows are kept, and the same command goes on from them"
)


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
class OpTime:
    """When one instance of a nano-op ran, measured."""

    index: int
    """Position of the nano-op in `Schedule.nano_ops`."""
    layer: int
    start_us: float
    """From the start of the iteration's first nano-op."""
    end_us: float
    slowdown: float = 0.0
    """Against the nano-op alone, which a timeline does not tell: 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileJob:
    """One file of a profile run: which graph, and what need not be measured again."""

    model: ModelSpec
    hardware: HardwareSpec
    tp_degree: int
    path: Path
    """`NAME.csv`; rows in it are taken up, so that a killed run resumes."""
    known: tuple[Path, ...]
    """Other `NAME.csv` files whose rows count as measured, e.g. the shipped ones."""
    commit: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRun:
    """Jobs of one run on one kind of GPU, and the time they have."""

    jobs: tuple[ProfileJob, ...]
    minutes: float
    parts: tuple[ProfilePart, ...] = ALL_PARTS
    """Kernels alone, their joules, co-runs, and collectives (which need all ranks)."""

    def __post_init__(self) -> None:
        if not self.jobs or self.minutes <= 0:
            raise ValueError(
                "a profile run needs a job and more than 0 minutes, but got "
                f"{len(self.jobs)} jobs and minutes={self.minutes}"
            )


def gpu_variants() -> dict[str, tuple[str, ...]]:
    """GPU variants of each kind; torch's own where there are no others."""
    from ..runtime import kernels
    from ..runtime.kernels import registry

    kernels.load("cuda")
    named: dict[str, tuple[str, ...]] = {}
    for kind in RESOURCE_OF_KIND:
        names = tuple(name for name in registry.variants(kind, "cuda") if name != "torch")
        named[kind] = names or ("torch",)
    return named


def variants_here(ctx: RankContext) -> dict[str, tuple[str, ...]]:
    """`gpu_variants` of this rank's machine: FlashInfer's, say, are where it is installed."""
    return gpu_variants()


def look_around(ctx: RankContext) -> list[str]:
    """What may spoil measurements on this rank's GPU, in words."""
    from .power import PowerMeter

    meter, notes = PowerMeter(ctx.rank), list[str]()
    if meter.other_processes:
        notes.append(f"GPU {ctx.rank}: {meter.other_processes} other processes use it")
    if not meter.has_energy_counter:
        notes.append(f"GPU {ctx.rank} has no energy counter: watts and joules stay unknown")
    return notes


def num_missing(ctx: RankContext, order: ProfileRun) -> int:
    """Coarse points and collectives that no file of the run's jobs holds."""
    variants = gpu_variants()
    paths = {path for job in order.jobs for path in (job.path, *job.known) if path.exists()}
    rows = {row.point: row for path in paths for row in read_rows(path)[1]}
    missing = 0
    for job in order.jobs:
        graph, hardware = OpGraph.build(job.model, job.tp_degree), job.hardware
        kinds = families(graph, hardware.num_sms, hardware.sm_granularity, variants)
        missing += len(coarse_points(kinds, rows))
        if ctx.world_size == job.tp_degree > 1:
            points = collective_points(graph, hardware.num_sms, variants)
            missing += sum(point not in rows for point in points)
    return missing


def run_profile(ctx: RankContext, order: ProfileRun) -> None:
    """Measure what the run's jobs lack; see `profile_run.py`."""
    from . import profile_run

    with memory_for("profiling", NO_MEMORY):
        profile_run.run(ctx, order)


def measure_again(ctx: RankContext, hardware: HardwareSpec, points: Sequence[Point]) -> list[Row]:
    """Rows of some points, measured on this rank's GPU now; see `calibration.py`."""
    import torch

    from ..runtime import kernels
    from .power import PowerMeter
    from .sweep import Sweep

    kernels.load("cuda")
    sweep = Sweep(hardware, PowerMeter(ctx.rank), KV_POOL_BYTES)
    sweep.compile(points)
    sweep.timer.heat(1000.0)
    with memory_for("measuring rows again", NO_MEMORY):
        rows = [sweep.measure(point, with_joules=False) for point in points]
    torch.cuda.empty_cache()
    return rows


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


def measure_timelines(
    ctx: RankContext, case: IterationCase, schedules: Sequence[Schedule], runs: int
) -> list[list[OpTime]]:
    """When each nano-op of each schedule runs; see `op_timeline.py`."""
    from . import op_timeline

    return op_timeline.measure_timelines(ctx, case, schedules, runs)


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
