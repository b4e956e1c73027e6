"""Layers of the whole-iteration benchmarks: which models, which batch, which schedules, how timed.

`layers.py`, `predict.py` and `refine_gain.py` all take schedules from a `Forecast`: made without a
GPU, each with what the cost model said of it then, stored as YAML, measured later. A layer is a
twelfth of the difference between CUDA graphs of 16 and of 4 layers, in the prediction as well.
Neither Optuna nor a solver is imported before a search begins.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from ab import recorded_command
from figures import FIGURES

from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.gpu_stage import find_devices
from nanoflow_tune.autotune.joining import joined_gemms
from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.autotune.race import overlaps
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.profiler.rank_jobs import IterationCase
from nanoflow_tune.profiler.store import load_profile, profile_files
from nanoflow_tune.runtime.launch import RankGroup
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import GEMM_KINDS, OpGraph, RowMix
from nanoflow_tune.runtime.plan import Schedule, Timing
from nanoflow_tune.search_spaces.loader import load_hardware, load_model, load_space
from nanoflow_tune.search_spaces.records import from_mapping, to_mapping
from nanoflow_tune.search_spaces.schema import HardwareSpec

if TYPE_CHECKING:
    from nanoflow_tune.autotune.search import SearchResult
    from nanoflow_tune.profiler.layer_turns import LayerTurns
    from nanoflow_tune.runtime.launch import RankContext

RANK_TIMEOUT_S = 300.0
LAYERS, FEW_LAYERS = 16, 4
MOST_JOINED = 2
"""Overlapped schedules that are also measured with joined GEMMs."""
VOCABULARY = 2048
"""Of the measured model: its LM head cancels out, and should take little time before it does."""
PROMPT = 512
MIX = RowMix(
    decode_tokens=1024,
    prefill_tokens=1024,
    decode_context_tokens=768,
    prefill_context_tokens=(PROMPT + 1) / 2,
)
PROFILES = Path("results/profiles/h200")
_STARTED_S = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCase:
    """One model on its ranks."""

    name: str
    """As `--case` takes it."""
    model: str
    tp_degree: int

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.model} TP{self.tp_degree} layer, 1024 decodes at 768 keys + 1024 prefill"


CASES = {
    "8b": LayerCase(name="8b", model="llama3-8b", tp_degree=1),
    "70b": LayerCase(name="70b", model="llama2-70b", tp_degree=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A schedule and what the cost model said of it before anything was measured."""

    schedule: Schedule
    layer_us: float
    """Of one layer within many, at the power cap."""
    watts: float
    """Mean of one GPU."""
    sm_clock_mhz: float
    source: str
    """`predicted` or `roofline`, see `Timing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Schedules of one case with their predictions, and what these were made from."""

    case: str
    commit: str
    """Of the source that predicted."""
    profile: str
    """Names of its files."""
    profile_commit: str
    """Of the source that measured the profile."""
    date: str
    predictions: tuple[Prediction, ...]

    def save(self, path: Path) -> None:
        """Write YAML."""
        path.write_text(yaml.safe_dump(to_mapping(self), sort_keys=False), encoding="utf-8")


def load_forecast(path: Path, case: LayerCase) -> Forecast:
    """A stored forecast.

    Raises:
        ValueError: it is of another case, or damaged.
    """
    forecast = from_mapping(Forecast, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    if forecast.case != case.name:
        raise ValueError(
            f"{path} holds schedules of case {forecast.case}, not of {case.name}: pass its own "
            "file, or make it with --search-only"
        )
    return forecast


def iteration_case(case: LayerCase, hardware: HardwareSpec) -> IterationCase:
    """The model cut to some layers and a small vocabulary."""
    model = replace(load_model(case.model), num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    return IterationCase(model=model, hardware=hardware, tp_degree=case.tp_degree, mix=MIX)


class Predictor:
    """The cost model of one case, from a profile; searches and predicts layers, without a GPU."""

    def __init__(
        self, case: LayerCase, hardware: HardwareSpec, profile: Path, lacking: Sequence[str] = ()
    ) -> None:
        """Read the profile.

        Args:
            case: which model.
            hardware: the GPU.
            profile: a file or folder.
            lacking: beginnings of variant names that the machine to measure on does not have.
        """
        self.case, self.iteration = case, iteration_case(case, hardware)
        self.graph = OpGraph.build(self.iteration.model, case.tp_degree)
        few = replace(self.iteration.model, num_hidden_layers=FEW_LAYERS)
        self._few_graph = OpGraph.build(few, case.tp_degree)
        self._files = profile_files(profile)
        self._measured = load_profile(self._files)
        self.cost_model = CostModel(self._measured, hardware, lacking=lacking)

    def search(self) -> SearchResult:
        """The whole search, on the simulator."""
        from nanoflow_tune.autotune.search import search

        space, hardware = load_space("quick"), self.iteration.hardware
        return search(self.graph, self.cost_model, hardware, space, MIX, seed=0, on_progress=say)

    def timing(self, schedule: Schedule) -> Timing:
        """What a whole iteration of a schedule takes."""
        return predict(schedule, self.graph, self.cost_model, MIX)

    def joined(self, schedules: Sequence[Schedule]) -> list[Schedule]:
        """The two best of some overlapped schedules with GEMMs joined, where that pays."""
        found = [
            joined_gemms(schedule, self.graph, self._period_us)
            for schedule in schedules
            if overlaps(schedule, self.graph)
        ]
        paying = [schedule for schedule in found if schedule is not None]
        paying.sort(key=lambda schedule: self.timing(schedule).period_us)
        return paying[:MOST_JOINED]

    def _period_us(self, schedule: Schedule) -> float | None:
        hardware = self.iteration.hardware
        try:
            check(schedule, self.graph, hardware.num_sms, hardware.sm_granularity)
        except ValueError:
            return None
        return self.timing(schedule).period_us

    def predict(self, schedule: Schedule) -> Prediction:
        """What a layer of a schedule takes."""
        whole = self.timing(schedule)
        few = predict(schedule, self._few_graph, self.cost_model, MIX)
        return Prediction(
            schedule=schedule,
            layer_us=(whole.period_us - few.period_us) / (LAYERS - FEW_LAYERS),
            watts=whole.watts,
            sm_clock_mhz=whole.sm_clock_mhz,
            source=whole.source,
        )

    def forecast(self, schedules: Sequence[Schedule], commit: str) -> Forecast:
        """Predictions of some schedules, with their origin."""
        return Forecast(
            case=self.case.name,
            commit=commit,
            profile=", ".join(file.name for file in self._files),
            profile_commit=str(self._measured.header.get("commit", "")),
            date=today(),
            predictions=tuple(self.predict(schedule) for schedule in schedules),
        )


def with_kernels(
    schedule: Schedule, graph: OpGraph, kinds: Sequence[str], variant: str, prefix: str = ""
) -> Schedule:
    """The schedule with one variant for every op of some kinds, named after it."""
    nano_ops = tuple(
        replace(nano_op, variant=variant) if graph.op(nano_op.op).kind in kinds else nano_op
        for nano_op in schedule.nano_ops
    )
    return replace(schedule, nano_ops=nano_ops, name=f"{schedule.name}_{prefix}{variant}")


def with_gemms(schedule: Schedule, graph: OpGraph, variant: str) -> Schedule:
    """The schedule with one kernel for every GEMM: cuBLAS is what a user without own ones has."""
    return with_kernels(schedule, graph, GEMM_KINDS, variant)


def once_each(schedules: Sequence[Schedule]) -> list[Schedule]:
    """Schedules that differ in more than their names, in order."""
    once: dict[object, Schedule] = {}
    for schedule in schedules:
        once.setdefault((schedule.nano_batches, schedule.nano_ops), schedule)
    return list(once.values())


def measure_turns(
    ctx: RankContext,
    case: IterationCase,
    schedules: tuple[Schedule, ...],
    rounds: int,
    turn_s: float,
) -> list[LayerTurns]:
    """Runs on every rank; the first one says how far it is."""
    from nanoflow_tune.profiler import layer_turns

    def tell(text: str) -> None:
        if ctx.rank == 0:
            say(f"(rank 0) {text}")

    return layer_turns.measure_layers(ctx, case, schedules, rounds, turn_s, FEW_LAYERS, tell)


def gpu_ranks(case: LayerCase) -> RankGroup:
    """One rank for each GPU of the case; a hung one ends the run while device time is left."""
    return RankGroup(case.tp_degree, device="cuda", timeout_s=RANK_TIMEOUT_S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of layers takes."""
    parser.add_argument("--case", choices=tuple(CASES), required=True)
    parser.add_argument("--gpu", default="h200", help="hardware spec (default: h200)")
    parser.add_argument("--profile", type=Path, default=PROFILES)
    parser.add_argument("--schedules", type=Path, help="measure these instead of searching")
    parser.add_argument("--search-only", type=Path, metavar="FILE", help="store them, measure none")
    parser.add_argument(
        "--lacking", nargs="*", default=[], metavar="PREFIX", help="variants not to choose"
    )
    parser.add_argument("--out", type=Path, default=FIGURES, help="figures, rows replaced")
    parser.add_argument("--commit", default="", help="of the source; default: git's")


def case_of(options: argparse.Namespace) -> tuple[LayerCase, HardwareSpec]:
    """The case and the GPU that were asked for."""
    return CASES[options.case], load_hardware(options.gpu)


def origin_of(options: argparse.Namespace, script: str) -> dict[str, str]:
    """Command, commit, GPU and date of a measured figure."""
    return {
        "command": recorded_command(script, sys.argv[1:]),
        "commit": options.commit or this_commit(),
        "gpu": find_devices().name,
        "date": today(),
    }


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"{time.monotonic() - _STARTED_S:6.1f} s  {text}", file=sys.stderr, flush=True)
