"""Interleaved A/B on one GPU, sustained: what the benchmark scripts share.

The card is driven for half a second once, then contenders take turns of 80 ms, case after case
without a pause, so that it stays on its power cap; the order turns round from round to round. A
ratio is formed within each round; its median and range are reported, with clocks and watts. Data
are random, each contender runs on its own SM partition, and timing is the profiler's.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from figures import FIGURES, FigureRow, spread_of, summary, write_figures

from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.profiler.profile import Point
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

if TYPE_CHECKING:
    from nanoflow_tune.profiler.cases import CaseFactory
    from nanoflow_tune.profiler.sweep import Sweep
    from nanoflow_tune.profiler.timing import Batch, Timer

MODELS = (("llama3-8b", 1), ("llama2-70b", 2))
"""Models and tensor-parallel degrees whose layers are measured."""
WARM_S, TURN_WARM_S, TURN_S = 0.5, 0.015, 0.065
PICK_S = 0.03
"""One burst measurement of one variant, with its preparation."""
START_S = 40.0
"""Partitions, their audit, static watts, and the compilers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One contender's turns."""

    name: str
    times_us: tuple[float, ...]
    """Median time of one call, by round."""
    clocks_mhz: tuple[float, ...]
    """SM clock in the middle of each turn."""
    watts: float
    """Of the whole case, all contenders: a turn is too short for the energy counter."""

    @property
    def median_us(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times_us)

    @property
    def sm_clock_mhz(self) -> float:
        """Mean over the rounds."""
        return statistics.mean(self.clocks_mhz)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of a benchmark's table."""

    id: str
    case: str
    values: tuple[float, ...]
    """By round."""
    unit: str
    reach: str
    """As in `FigureRow`; "" where nothing is asked of it."""
    subject: Turns
    baseline: Turns | None = None

    @property
    def value(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)


def ratio(
    figure_id: str,
    case: str,
    reach: str,
    subject: Turns,
    baseline: Turns,
    scale: float = 1.0,
) -> Figure:
    """Speed of `subject` in units of `scale` x the speed of `baseline`, by round."""
    pairs = zip(subject.times_us, baseline.times_us, strict=True)
    values = tuple(other / (mine * scale) for mine, other in pairs)
    return Figure(
        id=figure_id,
        case=case,
        values=values,
        unit="x",
        reach=reach,
        subject=subject,
        baseline=baseline,
    )


def figure_row(figure: Figure, header: Mapping[str, str]) -> FigureRow:
    """The figure as a row of `figures.csv`; the header says what measured it."""
    return FigureRow(
        id=figure.id,
        case=figure.case,
        value=figure.value,
        unit=figure.unit,
        reach=figure.reach,
        spread=spread_of(figure.values),
        **{name: header[name] for name in ("command", "commit", "gpu", "date")},
    )


_COLUMNS = (
    "id",
    "case",
    "value",
    "unit",
    "reach",
    "spread",
    "subject",
    "subject_us",
    "subject_mhz",
    "baseline",
    "baseline_us",
    "baseline_mhz",
    "watts",
    "rounds",
)


def cells(figure: Figure) -> list[str]:
    """A figure as CSV cells of the details table."""

    def of(turns: Turns | None) -> list[str]:
        if turns is None:
            return [""] * 3
        return [turns.name, f"{turns.median_us:.2f}", f"{turns.sm_clock_mhz:.0f}"]

    return [
        figure.id,
        figure.case,
        f"{figure.value:.4f}",
        figure.unit,
        figure.reach,
        spread_of(figure.values),
        *of(figure.subject),
        *of(figure.baseline),
        f"{figure.subject.watts:.0f}",
        str(len(figure.values)),
    ]


def write_table(path: Path, figures: Iterable[Figure], header: Mapping[str, str]) -> None:
    """Write the details: a YAML header in comment lines, then one row a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1000)
        file.writelines(f"# {line}\n" for line in text.splitlines())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(cells(figure) for figure in figures)


def take_turns(timer: Timer, batches: Mapping[str, Batch], rounds: int) -> dict[str, Turns]:
    """Time the batches in turns on a card that is warm already."""
    from nanoflow_tune.profiler.timing import timed_replays

    names = list(batches)
    calls = {name: batch.num_calls for name, batch in batches.items()}
    once_us = {name: timer.replay_us(batch) for name, batch in batches.items()}
    times: dict[str, list[float]] = {name: [] for name in batches}
    clocks: dict[str, list[float]] = {name: [] for name in batches}
    with timer.meter as meter:
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                replay = batches[name].replay
                for _ in range(max(1, round(TURN_WARM_S * 1e6 / once_us[name]))):
                    replay()
                count = max(3, round(TURN_S * 1e6 / once_us[name]))
                found_us, clock = timed_replays(replay, count, meter)
                times[name].append(statistics.median(found_us) / calls[name])
                clocks[name].append(clock)
    return {
        name: Turns(
            name=name,
            times_us=tuple(times[name]),
            clocks_mhz=tuple(clocks[name]),
            watts=timer.meter.watts,
        )
        for name in batches
    }


def predicted_s(num_picked: int, num_turns: int) -> float:
    """Seconds of `num_picked` bursts and `num_turns` turns, warming up left out."""
    return num_picked * PICK_S + num_turns * (TURN_S + TURN_WARM_S + 0.01)


def gemm_shapes() -> dict[str, str]:
    """Shape key -> where it comes from, for each GEMM of the models' layers."""
    found: dict[str, str] = {}
    for model, tp_degree in MODELS:
        for op in OpGraph.build(load_model(model), tp_degree).layer:
            if op.kind in ("gemm", "gemm_silu"):
                found.setdefault(op.shape, f"{model} TP{tp_degree} {op.name}")
    return found


def gemm_cases(tokens: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Case -> (shape, tokens): every GEMM shape of every layer at each number of tokens."""
    return {
        f"{origin} {shape} {rows} tokens": (shape, rows)
        for shape, origin in gemm_shapes().items()
        for rows in tokens
    }


def gemm_point(shape: str, variant: str, tokens: int, num_sms: int) -> Point:
    """A GEMM of the profile."""
    return Point(
        kind="gemm", shape=shape, variant=variant, tokens=tokens, kv_len=0, num_sms=num_sms
    )


def is_cublas(variant: str) -> bool:
    """Whether a GEMM variant is cuBLAS; on the whole GPU it is told nothing of SMs."""
    return variant.startswith("cublas")


def recorded_command(script: str, arguments: Sequence[str]) -> str:
    """The command of a figure, without where this run put its files."""
    kept = list(arguments)
    for option in ("--out", "--details", "--figures"):
        while option in kept:
            del kept[kept.index(option) : kept.index(option) + 2]
    return shlex.join(["python", f"benchmarks/{script}.py", *kept])


def gpu_variants(kind: str) -> tuple[str, ...]:
    """Registered CUDA variants of a kind, but for torch's own."""
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry

    kernels.load("cuda")
    names = registry.variants(cast(Any, kind), "cuda")
    return tuple(name for name in names if name != "torch")


class Bench:
    """One benchmark run: its options, and on a GPU the sweep and the operands."""

    def __init__(self, name: str, doc: str, tokens: Sequence[int] = ()) -> None:
        parser = argparse.ArgumentParser(
            prog=f"benchmarks/{name}.py",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--gpu", default="h200", help="hardware spec (default: h200)")
        parser.add_argument("--commit", default="", help="of the source; default: git's")
        parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
        parser.add_argument("--out", type=Path, default=FIGURES, help="figures, rows replaced")
        parser.add_argument("--details", type=Path, help=f"default: {name}.csv beside --out")
        parser.add_argument("--only", default="", help="measure cases that hold this text")
        parser.add_argument("--minutes", type=float, default=0.0, help="start no case after these")
        parser.add_argument("--dry-run", action="store_true", help="print cases and seconds")
        if tokens:
            parser.add_argument("--tokens", type=int, nargs="+", default=list(tokens))
        options = parser.parse_args()
        self.tokens: list[int] = options.tokens if tokens else []
        self.hardware = load_hardware(options.gpu)
        self.num_sms = self.hardware.num_sms
        self.rounds: int = options.rounds
        self.is_dry_run: bool = options.dry_run
        self._only: str = options.only
        self._out: Path = options.out
        self._details: Path = options.details or options.out.with_name(f"{name}.csv")
        self._commit: str = options.commit or this_commit()
        self._command = recorded_command(name, sys.argv[1:])
        self._figures: list[Figure] = []
        self._seconds: float = options.minutes * 60 or float("inf")

    def chosen(self, cases: Iterable[str]) -> list[str]:
        """The cases that `--only` leaves."""
        return [case for case in cases if self._only in case]

    def print_plan(self, cases: Sequence[str], seconds: float) -> None:
        """What `--dry-run` shows."""
        for case in cases:
            print(case)
        print(f"{len(cases)} cases, about {START_S + seconds:.0f} s")

    def start(self, kv_pool_bytes: float = 0.0) -> None:
        """Make partitions and operands and warm the card; from here on a GPU is needed."""
        import torch

        from nanoflow_tune.profiler.cases import CaseFactory
        from nanoflow_tune.profiler.power import PowerMeter
        from nanoflow_tune.profiler.sweep import Sweep

        torch.cuda.set_device(0)
        self.sweep: Sweep = Sweep(self.hardware, PowerMeter(0), kv_pool_bytes)
        device = torch.device("cuda", 0)
        self.cases: CaseFactory = CaseFactory(torch.bfloat16, device, kv_pool_bytes)
        self.header = {
            **self.sweep.header(self._commit, self._command, self.sweep.static_watts(), {}),
            "regime": f"sustained: {WARM_S} s warm-up, then {self.rounds} turns of "
            f"{1e3 * TURN_S:.0f} ms each without a pause, interleaved, random normal data; spread "
            "is the lowest and highest turn; clocks are read within turns, watts over the case",
        }
        self._started_s = time.monotonic()

    def warm(self, points: Iterable[Point] = ()) -> None:
        """Compile what points need, then drive the card for half a second.

        Raises:
            RuntimeError: a kernel took the CUDA context with it.
        """
        lost = self.sweep.compile(points)
        if lost is not None:
            raise RuntimeError(f"{lost} took the CUDA context with it: take that variant out")
        self.sweep.timer.heat(1e3 * WARM_S)

    @property
    def is_over(self) -> bool:
        """Whether `--minutes` have passed since the start."""
        return time.monotonic() - self._started_s > self._seconds

    def batch(self, point: Point) -> Batch:
        """A captured batch of a profile point on its partition."""
        stream = self.sweep.stream(point.num_sms)
        return self.sweep.timer.batch(self.cases.calls(point), stream)

    def ranked(self, points: Iterable[Point], within: float = float("inf")) -> list[Point]:
        """Points by their time in a burst, fastest first; says which could not run.

        Args:
            points: to measure.
            within: times the fastest one's time; slower ones are left out.

        Raises:
            RuntimeError: none of them ran.
        """
        times: list[tuple[float, int, Point]] = []
        for number, point in enumerate(points):
            row = self.sweep.measure(point, with_joules=False)
            if row.error:
                print(f"{point.variant} on {point.num_sms} SMs: {row.error}", file=sys.stderr)
            else:
                times.append((row.median_us, number, point))
        if not times:
            raise RuntimeError("no variant ran: see the messages above")
        times.sort(key=lambda item: item[:2])
        return [point for us, _, point in times if us <= within * times[0][0]]

    def fastest(self, points: Iterable[Point]) -> Point:
        """The fastest of some points in a burst; see `ranked`."""
        return self.ranked(points)[0]

    def add(self, figures: Iterable[Figure]) -> None:
        """Show figures as they come, and keep both files up to date: a killed run leaves them."""
        for figure in figures:
            print(", ".join(cells(figure)), file=sys.stderr, flush=True)
            self._figures.append(figure)
        write_table(self._details, self._figures, self.header)
        write_figures(self._rows(), self._out)

    def _rows(self) -> list[FigureRow]:
        return [figure_row(figure, self.header) for figure in self._figures if figure.reach]

    def finish(self) -> None:
        """Print the worst case of each figure."""
        print(summary(self._rows()))
