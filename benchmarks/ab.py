"""Interleaved A/B on one GPU, sustained: what the benchmark scripts share.

Contenders take turns of half a second, warmed up first, on random data and on their SM partitions;
the order turns round from round to round. A ratio is formed within each round and its median and
range are reported, with the clocks and watts of both sides. Timing is the profiler's.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

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
WARM_S, TURN_WARM_S, TURN_S = 0.5, 0.1, 0.5
PICK_S = 0.085
"""One burst measurement of one variant, with its preparation."""
START_S = 45.0
"""Partitions, their audit, static watts, and the compiler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One contender's turns."""

    name: str
    times_us: tuple[float, ...]
    """Median time of one call, by round."""
    sm_clock_mhz: float
    watts: float

    @property
    def median_us(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row of a benchmark's table."""

    id: str
    case: str
    values: tuple[float, ...]
    """By round."""
    unit: str
    reach: float
    """What the figure should be at least; 0 where nothing is asked of it."""
    subject: Turns
    baseline: Turns | None = None

    @property
    def value(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """Lowest and highest round."""
        return f"{min(self.values):.3f}-{max(self.values):.3f}"

    @property
    def is_reached(self) -> bool:
        """Whether the value is at least the reach."""
        return self.value >= self.reach


def ratio(
    figure_id: str,
    case: str,
    reach: float,
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
    "subject_watts",
    "baseline",
    "baseline_us",
    "baseline_mhz",
    "baseline_watts",
    "rounds",
)


def cells(figure: Figure) -> list[str]:
    """A figure as CSV cells."""

    def of(turns: Turns | None) -> list[str]:
        if turns is None:
            return [""] * 4
        clock, watts = f"{turns.sm_clock_mhz:.0f}", f"{turns.watts:.0f}"
        return [turns.name, f"{turns.median_us:.2f}", clock, watts]

    return [
        figure.id,
        figure.case,
        f"{figure.value:.4f}",
        figure.unit,
        f"{figure.reach:g}" if figure.reach else "",
        figure.spread,
        *of(figure.subject),
        *of(figure.baseline),
        str(len(figure.values)),
    ]


def table(figures: Sequence[Figure]) -> str:
    """The figures as aligned text, then the worst case of each id that has a reach."""
    lines = [list(_COLUMNS), *(cells(figure) for figure in figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    for figure_id in dict.fromkeys(figure.id for figure in figures if figure.reach):
        mine = [figure for figure in figures if figure.id == figure_id]
        worst = min(mine, key=lambda figure: figure.value)
        reached = sum(figure.is_reached for figure in mine)
        text.append(
            f"{figure_id}: worst {worst.value:.3f} {worst.unit} ({worst.case}), median "
            f"{statistics.median(figure.value for figure in mine):.3f}; {reached} of {len(mine)} "
            f"cases reach {worst.reach:g}"
        )
    return "\n".join(text)


def write_table(path: Path, figures: Iterable[Figure], header: Mapping[str, str]) -> None:
    """Write `results/NAME.csv`: a YAML header in comment lines, then the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1000)
        file.writelines(f"# {line}\n" for line in text.splitlines())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(cells(figure) for figure in figures)


_FIGURE_COLUMNS = (
    "id",
    "case",
    "value",
    "unit",
    "reach",
    "spread",
    "command",
    "commit",
    "gpu",
    "date",
)


def update_figures(path: Path, figures: Iterable[Figure], header: Mapping[str, str]) -> None:
    """Put the figures that have a reach into `figures.csv`; a case's former row is replaced."""
    rows: dict[tuple[str, str], list[str]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for old in list(csv.reader(file))[1:]:
                rows[old[0], old[1]] = old
    for figure in figures:
        if figure.reach:
            origin = [header[name] for name in ("command", "commit", "gpu", "date")]
            rows[figure.id, figure.case] = [*cells(figure)[:6], *origin]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_FIGURE_COLUMNS)
        writer.writerows(rows[key] for key in sorted(rows))


def take_turns(timer: Timer, batches: Mapping[str, Batch], rounds: int) -> dict[str, Turns]:
    """Time the batches in turns; the card is warm and on its power cap before the first."""
    burst_us = {name: timer.sample(batch).median_us for name, batch in batches.items()}
    for name, batch in batches.items():
        timer.sustain(batch, burst_us[name], WARM_S / len(batches), TURN_WARM_S)
    times: dict[str, list[float]] = {name: [] for name in batches}
    clocks: dict[str, list[float]] = {name: [] for name in batches}
    watts: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds):
        names = list(batches)
        for name in names if turn % 2 == 0 else names[::-1]:
            samples = timer.sustain(batches[name], burst_us[name], TURN_WARM_S, TURN_S)
            times[name].append(samples.median_us)
            clocks[name].append(samples.sm_clock_mhz)
            watts[name].append(timer.meter.watts)
    return {
        name: Turns(
            name=name,
            times_us=tuple(times[name]),
            sm_clock_mhz=statistics.mean(clocks[name]),
            watts=statistics.mean(watts[name]),
        )
        for name in batches
    }


def predicted_s(num_picked: int, num_turns: int) -> float:
    """Seconds of `num_picked` bursts and `num_turns` turns, warming up left out."""
    return num_picked * PICK_S + num_turns * (TURN_S + TURN_WARM_S)


def gemm_shapes() -> dict[str, str]:
    """Shape key -> where it comes from, for each GEMM of the models' layers."""
    found: dict[str, str] = {}
    for model, tp_degree in MODELS:
        for op in OpGraph.build(load_model(model), tp_degree).layer:
            if op.kind == "gemm":
                found.setdefault(op.shape, f"{model} TP{tp_degree} {op.name}")
    return found


def gemm_point(shape: str, variant: str, tokens: int, num_sms: int) -> Point:
    """A GEMM of the profile."""
    return Point(
        kind="gemm", shape=shape, variant=variant, tokens=tokens, kv_len=0, num_sms=num_sms
    )


def gpu_variants(kind: str) -> tuple[str, ...]:
    """Registered CUDA variants of a kind, but for torch's own."""
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry

    kernels.load("cuda")
    kernels.load("experimental")
    names = registry.variants(kind, "cuda")  # type: ignore[arg-type]
    return tuple(name for name in names if name != "torch")


class Bench:
    """One benchmark run: its options, and on a GPU the sweep and the operands."""

    def __init__(self, name: str, doc: str, tokens: Sequence[int] = ()) -> None:
        parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=doc)
        parser.add_argument("--gpu", default="h200", help="hardware spec (default: h200)")
        parser.add_argument("--commit", default="", help="of the source; default: git's")
        parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
        parser.add_argument("--out", type=Path, default=Path(f"results/{name}.csv"))
        parser.add_argument("--figures", type=Path, default=Path("results/figures.csv"))
        parser.add_argument("--only", default="", help="measure cases that hold this text")
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
        self._figures_path: Path = options.figures
        self._commit: str = options.commit or this_commit()
        self._command = shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
        self._figures: list[Figure] = []

    def chosen(self, cases: Iterable[str]) -> list[str]:
        """The cases that `--only` leaves."""
        return [case for case in cases if self._only in case]

    def print_plan(self, cases: Sequence[str], seconds: float) -> None:
        """What `--dry-run` shows."""
        for case in cases:
            print(case)
        print(f"{len(cases)} cases, about {START_S + seconds + WARM_S * len(cases):.0f} s")

    def start(self, kv_pool_bytes: float = 0.0) -> None:
        """Make partitions and operands; from here on a GPU is needed."""
        import torch

        from nanoflow_tune.profiler.cases import CaseFactory
        from nanoflow_tune.profiler.power import PowerMeter
        from nanoflow_tune.profiler.sweep import Sweep

        torch.cuda.set_device(0)
        self.sweep: Sweep = Sweep(self.hardware, PowerMeter(0), kv_pool_bytes)
        device = torch.device("cuda", 0)
        self.cases: CaseFactory = CaseFactory(torch.bfloat16, device, kv_pool_bytes)
        self._header = {
            **self.sweep.header(self._commit, self._command, self.sweep.static_watts(), {}),
            "regime": f"sustained: {WARM_S} s warm-up, {self.rounds} turns of {TURN_S} s each, "
            "interleaved, random normal data; spread is the lowest and highest turn",
        }

    def batch(self, point: Point) -> Batch:
        """A captured batch of a profile point on its partition."""
        stream = self.sweep.stream(point.num_sms)
        return self.sweep.timer.batch(self.cases.calls(point), stream)

    def fastest(self, points: Iterable[Point]) -> Point:
        """The fastest of some points in a burst; says which could not run."""
        best_us, best = float("inf"), None
        for point in points:
            row = self.sweep.measure(point, with_joules=False)
            if row.error:
                print(f"{point.variant} on {point.num_sms} SMs: {row.error}", file=sys.stderr)
            elif row.median_us < best_us:
                best_us, best = row.median_us, point
        if best is None:
            raise RuntimeError("no variant ran: see the messages above")
        return best

    def add(self, figures: Iterable[Figure]) -> None:
        """Show figures as they come, and keep the files up to date: a killed run leaves them."""
        for figure in figures:
            print(", ".join(cells(figure)), file=sys.stderr, flush=True)
            self._figures.append(figure)
        write_table(self._out, self._figures, self._header)

    def finish(self) -> None:
        """Print the table and bring `figures.csv` up to date."""
        print(table(self._figures))
        update_figures(self._figures_path, self._figures, self._header)
