"""What the search reaches: time, gap, exactness, never worse, the paper's pipeline. Needs no GPU.

    python benchmarks/search_reach.py exact         the MILP against brute force, 500 instances
    python benchmarks/search_reach.py time          four searches from the shipped profile, and gaps
    python benchmarks/search_reach.py never-worse   all models, GPUs and workloads, on rooflines
    python benchmarks/search_reach.py paper         `--paper` against the paper's figure 6

Each writes rows of `results/figures.csv`. `time` reports the wall clock, so run it on an idle
machine; the CPU seconds of all threads stand in the spread. `never-worse` searches with little
effort: more effort only adds candidates.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from figures import FIGURES, FigureRow, summary, write_figures

from nanoflow_tune.autotune.brute_force import random_instance, shortest_period_us
from nanoflow_tune.autotune.capacity import DoesNotFitError, dense_batch, num_gpus_default
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.job import TuneOptions, choose_profile, resolve
from nanoflow_tune.autotune.milp import Model
from nanoflow_tune.autotune.paper_mode import run_paper
from nanoflow_tune.autotune.search import SearchResult, search
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.search_spaces.loader import (
    known,
    load_hardware,
    load_model,
    load_space,
    load_workload,
)

TIMED = (("llama2-70b", 8), ("llama2-70b", 2), ("llama3-8b", 1), ("qwen2-72b", 2))
BASELINES = ("sequential", "nano_only", "equal_split")
NOT_SHIPPED_MODELS = ("tiny-llama",)
EXACT_INSTANCES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row comes from."""

    command: str
    commit: str
    models: tuple[str, ...] = ()
    """Of `never-worse`; all when empty."""
    gpus: tuple[str, ...] = ()

    def row(
        self, figure: str, case: str, value: float, unit: str, reach: str, spread: str = ""
    ) -> FigureRow:
        """A row of today."""
        return FigureRow(
            id=figure,
            case=case,
            value=value,
            unit=unit,
            reach=reach,
            spread=spread,
            command=self.command,
            commit=self.commit,
            gpu="none",
            date=date.today().isoformat(),
        )


def exact_rows(origin: Origin) -> Iterator[FigureRow]:
    """Largest relative difference between the MILP's period and the best of all structures."""
    worst = 0.0
    for seed in range(EXACT_INSTANCES):
        instance = random_instance(seed)
        exact_us = shortest_period_us(instance)
        _, certificate = Model(instance).solve(60.0, 1e-6, 0)
        worst = max(worst, abs(certificate.period_us - exact_us) / exact_us)
    case = f"{EXACT_INSTANCES} random instances of up to four nodes"
    yield origin.row("search_exact", case, worst, "x", "<= 0.001")


def time_rows(origin: Origin) -> Iterator[FigureRow]:
    """Seconds of the default search, and its gap to the bound of the declared space."""
    for model, num_gpus in TIMED:
        options = TuneOptions(model=model, gpu="h200", num_gpus=num_gpus, profile="shipped")
        job = resolve(options, print)
        profile = choose_profile(options, job).profile
        wall, cpu = time.perf_counter(), time.process_time()
        costs = CostModel(profile, job.hardware, job.model.torch_dtype)
        found = search(job.graph, costs, job.hardware, job.space, job.batch.mix, seed=0)
        seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        case = f"{model} TP{num_gpus} h200 {job.batch.tokens} tokens"
        print(f"{case}: {seconds:.1f} s wall, {cpu_s:.1f} s CPU", *found.stages, sep="\n  ")
        yield origin.row("search_time", case, seconds, "s", "<= 60", f"{cpu_s:.1f} CPU")
        yield origin.row("search_gap", case, 100 * found.space_bound.gap, "%", "<= 1")


def never_worse_rows(origin: Origin) -> Iterator[FigureRow]:
    """The winner over the best of the three baselines, worst workload of each model and GPU."""
    models = [name for name in known("models") if name not in NOT_SHIPPED_MODELS]
    for model in origin.models or models:
        for gpu in origin.gpus or known("hardware"):
            ratios: dict[str, float] = {}
            for workload in known("workloads"):
                found = roofline_search(model, gpu, workload)
                if found is not None:
                    ratios[workload] = ratio_to_baselines(found)
            if ratios:
                case = f"{model} {gpu} {len(ratios)} workloads"
                print(case, max(ratios.values()), flush=True)
                yield origin.row("search_never_worse", case, max(ratios.values()), "x", "<= 1.0")


def roofline_search(model_name: str, gpu: str, workload_name: str) -> SearchResult | None:
    """A short search on the datasheet; None where the model does not fit on this GPU's nodes."""
    model, hardware, workload = (
        load_model(model_name),
        load_hardware(gpu),
        load_workload(workload_name),
    )
    space = replace(load_space("quick"), milp_time_limit_s=0.5, simulator_trials=6)
    if model.torch_dtype not in hardware.peak_flops_per_s:  # V100: half precision of the same width
        model = replace(model, torch_dtype="float16")
    try:
        num_gpus = num_gpus_default(model, hardware)
        batch = dense_batch(model, hardware, workload, space, num_gpus)
        graph = OpGraph.build(model, num_gpus)
    except (DoesNotFitError, ValueError):
        return None
    if batch.tokens < 2 * space.token_granularity:
        return None
    costs = CostModel(None, hardware, model.torch_dtype)
    return search(graph, costs, hardware, space, batch.mix, seed=0, most_batches=1)


def ratio_to_baselines(found: SearchResult) -> float:
    """Period of the winner over the shortest of sequential, nano-only and equal split."""
    periods = [c.predicted.period_us for c in found.race if c.schedule.name in BASELINES]
    return found.winner.predicted.period_us / min(periods)


def paper_rows(origin: Origin) -> Iterator[FigureRow]:
    """The found plan's period over that of the paper's pipeline, in the paper's cost model."""
    for workload in ("512/512", "1024/512", "512/1024"):
        result = run_paper(workload, seed=0, on_progress=print)
        ratio = result.search_us / result.figure_6_us
        yield origin.row("paper_mode", f"llama2-70b 8 x a100-80 {workload}", ratio, "x", "<= 1.00")


KINDS = {
    "exact": exact_rows,
    "time": time_rows,
    "never-worse": never_worse_rows,
    "paper": paper_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--commit", default="", help="what the rows are of; default: HEAD")
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--models", nargs="*", default=[], help="of never-worse; default: all")
    parser.add_argument("--gpus", nargs="*", default=[], help="of never-worse; default: all")
    arguments = parser.parse_args()
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = (
        arguments.commit
        or subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    )
    origin = Origin(
        command=f"python benchmarks/search_reach.py {arguments.kind}",
        commit=commit,
        models=tuple(arguments.models),
        gpus=tuple(arguments.gpus),
    )
    rows: list[FigureRow] = []
    for row in KINDS[arguments.kind](origin):
        write_figures([row], arguments.out)  # at once, so that a killed run leaves what it has
        rows.append(row)
    print(summary(rows))


if __name__ == "__main__":
    main()
