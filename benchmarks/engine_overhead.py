"""What the engine costs beside its kernels: figure `engine_overhead`, from a profiler trace.

    python benchmarks/engine_overhead.py --plan plan.yaml
    python benchmarks/engine_overhead.py --tiny                on the CPU, without a figure

Serves random requests with random weights of the plan's model on one GPU until as many of them
decode as in the plan's own bucket and prompts fill the rest of the dense batch. From then on steps
are timed without the profiler, recorded by it (kernels alone, all streams), and timed again. The
figure is the part of the recorded steps' time that lies outside of the union of their kernels;
copies count as idle. The profiler slows kernels' starts down: what it adds to a step is printed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ab import recorded_command
from figures import FIGURES, FigureRow, spread_of, summary, write_figures
from kernel_trace import TraceTimes, read_trace, times
from tiny_serving import tiny_model, tiny_plan

from nanoflow_tune.autotune.ablation import BOOKS, contender
from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.profiler.serving_case import ServingCase
from nanoflow_tune.runtime.launch import RankContext
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Plan
from nanoflow_tune.runtime.plan_io import load_plan
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

if TYPE_CHECKING:
    from nanoflow_tune.runtime.model_runner import Launched, Sampled
    from nanoflow_tune.runtime.sequence import Event
    from nanoflow_tune.runtime.step import StepInputs
    from nanoflow_tune.runtime.step_watch import Runner

REACH = "<= 2"
SETTLING, SKIPPED = 4, 2
"""Steps before the first that is timed, and recorded ones before the first that counts."""
SHOWN_GAPS, SHOWN_KERNELS = 10, 16
NAME_LENGTH = 60
PROMPT = 384
TINY_ROWS, TINY_PAGES, TINY_PROMPT = 64, 600, 24


def ramp_lengths(plan: Plan, prompt: int, steps: int) -> tuple[tuple[int, int], ...]:
    """Requests that bring a dense batch to the mix of the plan's own bucket and keep it there.

    The first ones become its decodes and then end one after the other, as fast as later ones get
    through their prompts.

    Args:
        plan: its first bucket is the dense batch.
        prompt: tokens of a prompt.
        steps: that the mix must hold for.
    """
    rows, decodes = plan.buckets[0].dense_batch_tokens, round(plan.buckets[0].decode_tokens)
    a_step = (rows - decodes) / prompt

    def decodes_from(index: int) -> float:
        """Step in which a request begins to decode, while those before take more and more rows."""
        return prompt * math.log(rows / (rows - index))

    full = decodes_from(decodes) + SETTLING
    first = [(full - decodes_from(index)) + index / a_step for index in range(decodes)]
    later = round(2 * a_step * (full + 4 * steps))
    return (
        *((prompt, math.ceil(answer)) for answer in first),
        *[(prompt, math.ceil(full) + 8 * steps)] * later,
    )


class Watched:
    """A runner that hands steps on, times them, and records some once enough requests decode."""

    def __init__(self, runner: Runner, decodes: int, steps: int, profiler: Any) -> None:  # noqa: ANN401
        """Watch nothing until a step has `decodes` decode rows.

        Args:
            runner: what runs the steps.
            decodes: of the mix that is waited for.
            steps: timed before, recorded, and timed after.
            profiler: of torch, not started.
        """
        self._runner, self._decodes, self._profiler = runner, decodes, profiler
        self._first = -1
        self._launched = 0
        self._begins = SETTLING + steps
        self._ends = self._begins + steps + SKIPPED + 2
        self._last = self._ends + SETTLING + steps
        self.ends_s: list[float] = []
        """Of the steps since the mix was reached."""
        self.rows: list[int] = []
        """Theirs."""
        self.done = threading.Event()

    @property
    def is_complete(self) -> bool:
        """Whether all steps were run."""
        return len(self.ends_s) == self._last

    @property
    def plain_step_s(self) -> list[float]:
        """Times of the steps without the profiler."""
        before = self.ends_s[SETTLING - 1 : self._begins - 1]
        after = self.ends_s[self._ends + SETTLING : self._last]
        return [end - start for ends in (before, after) for start, end in pairwise(ends)]

    def launch(self, inputs: StepInputs) -> Launched:
        """Queue a step; between two steps the profiler starts and stops."""
        if self._first < 0 and len(inputs.decode_slots_R) >= self._decodes:
            self._first = self._launched
        since = self._launched - self._first if self._first >= 0 else -1
        if since == self._begins:
            self._profiler.start()
        elif since == self._ends:
            self._profiler.stop()
        self._launched += 1
        if 0 <= since < self._last:
            self.rows.append(inputs.num_rows)
        return self._runner.launch(inputs)

    def collect(self, launched: Launched) -> Sampled:
        """What a step sampled."""
        sampled = self._runner.collect(launched)
        if self._first >= 0 and len(self.ends_s) < self._last:
            self.ends_s.append(time.perf_counter())
            if self.is_complete:
                self.done.set()
        return sampled

    def close(self) -> None:
        """Of the runner."""
        self.done.set()
        self._runner.close()


def serve(
    plan: Plan, case: ServingCase, book: str, device: str, steps: int, trace: Path
) -> Watched:
    """Serve until the steps have been recorded; leaves the trace in a file.

    Raises:
        RuntimeError: the requests ended, or the engine failed, before that.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nanoflow_tune.profiler import serving_run
    from nanoflow_tune.runtime.engine import Engine
    from nanoflow_tune.runtime.sequence import FinishEvent

    is_cuda = device != "cpu"
    # Graphs that were captured before CUPTI came up are not recorded: it comes up first, and stays.
    os.environ["DISABLE_CUPTI_LAZY_REINIT"], os.environ["TEARDOWN_CUPTI"] = "1", "0"
    activities = [ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]
    if is_cuda:
        torch.cuda.set_device(device)
    with profile(activities=activities):
        torch.zeros(1, device=device).add_(1)
    profiler = profile(activities=activities)
    context = RankContext(0, 1, device)
    graph = OpGraph.build(case.model, plan.num_gpus)
    chosen = contender(book, graph, plan, case.hardware)
    loaded = serving_run.load_case(context, case)
    watched: list[Watched] = []

    def make() -> Watched:
        if is_cuda:
            torch.cuda.set_device(device)  # of this thread
        runner = serving_run.make_runner(context, case, loaded, chosen)
        gc.freeze()  # as servers do behind their warm-up, which would take longer than this run
        watched.append(Watched(runner, round(plan.buckets[0].decode_tokens), steps, profiler))
        return watched[0]

    engine = Engine(serving_run.engine_config(case, loaded, chosen), chosen.book, make)
    engine.start()
    requests = serving_run.requests_of(case)
    left = [len(requests)]

    def on_event(event: Event) -> None:
        left[0] -= isinstance(event, FinishEvent)
        if left[0] == 0:
            watched[0].done.set()

    for request in requests:
        engine.submit(request, on_event)
    watched[0].done.wait()
    engine.close(0.0)
    if engine.failure is not None:
        raise RuntimeError("the engine failed") from engine.failure
    if not watched[0].is_complete:
        raise RuntimeError(
            f"of the steps with the wanted mix only {len(watched[0].ends_s)} ran: give the cache "
            "more pages, or shorter prompts (--prompt)"
        )
    profiler.export_chrome_trace(str(trace))
    return watched[0]


def describe_plain(watched: Watched) -> str:
    """Steps without the profiler."""
    plain_ms = [1e3 * s for s in watched.plain_step_s]
    return (
        f"a step of {min(watched.rows)} to {max(watched.rows)} rows without the profiler: "
        f"{statistics.median(plain_ms):.3f} ms ({min(plain_ms):.3f} to {max(plain_ms):.3f}, "
        f"{len(plain_ms)} steps)"
    )


def describe(found: TraceTimes, watched: Watched) -> str:
    """Recorded steps, the longest gaps, and where the time goes."""
    plain_ms = statistics.median(1e3 * s for s in watched.plain_step_s)
    recorded_ms = [1e-3 * step.wall_us for step in found.steps]
    kernel_ms = statistics.median(1e-3 * step.kernel_us for step in found.steps)
    lines = [
        f"recorded: {statistics.median(recorded_ms):.3f} ms ({min(recorded_ms):.3f} to "
        f"{max(recorded_ms):.3f}, {len(recorded_ms)} steps), of which kernels {kernel_ms:.3f} ms",
        f"outside of kernels {found.overhead_percent:.3f} %, of kernels and copies "
        f"{found.idle_percent:.3f} %; by the time without the profiler "
        f"{100 * (1 - kernel_ms / plain_ms):.3f} %",
        f"the longest of {len(found.gaps)} gaps, us:",
    ]
    for gap in found.gaps[:SHOWN_GAPS]:
        copies = f" [{', '.join(gap.copies)}]" if gap.copies else ""
        before, after = gap.before[:NAME_LENGTH], gap.after[:NAME_LENGTH]
        lines.append(f"{gap.length_us:10.2f}  {before} -> {after}{copies}")
    lines.append("kernels of a step, ms and launches:")
    for kernel in found.kernels[:SHOWN_KERNELS]:
        steps = len(found.steps)
        ms, count = 1e-3 * kernel.total_us / steps, kernel.count / steps
        lines.append(f"{ms:10.3f} {count:7.1f}  {kernel.name[: 2 * NAME_LENGTH]}")
    return "\n".join(lines)


def figure(found: TraceTimes, case: str, origin: dict[str, str]) -> FigureRow:
    """All recorded steps together; the spread is over single ones."""
    return FigureRow(
        id="engine_overhead",
        case=case,
        value=found.overhead_percent,
        unit="%",
        reach=REACH,
        spread=spread_of([step.overhead_percent for step in found.steps]),
        **origin,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/engine_overhead.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny model on the CPU: nothing is recorded of it")
    add("--plan", type=Path, help="for one GPU")
    add("--model", help="default: the plan's")
    add("--gpu", default="h200", help="hardware spec (%(default)s)")
    add("--book", default="winner", choices=BOOKS, help="which schedules (%(default)s)")
    add("--prompt", type=int, help=f"tokens of a prompt ({PROMPT}; tiny {TINY_PROMPT})")
    add("--steps", type=int, default=20, help="recorded, and timed before and after (%(default)s)")
    add("--num-pages", type=int, help="of the KV cache (default: what fits)")
    add("--seed", type=int, default=0)
    add("--trace", type=Path, help="keep the trace here")
    add("--commit", default="", help="of the source; default: git's")
    add("--out", type=Path, default=FIGURES, help="figures, rows replaced; on a GPU only")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tiny == (options.plan is not None):
        parser.error("give --plan, or --tiny for a try on the CPU")
    began_s = time.monotonic()
    hardware = load_hardware(options.gpu)
    if options.tiny:
        model = tiny_model()
        plan = tiny_plan(OpGraph.build(model), TINY_ROWS)
    else:
        plan = load_plan(options.plan)
        model = load_model(options.model or plan.model)
    if plan.num_gpus != 1:
        parser.error(f"the plan must be for one GPU, but is for {plan.num_gpus}")
    prompt = options.prompt or (TINY_PROMPT if options.tiny else PROMPT)
    case = ServingCase(
        model=model,
        hardware=hardware,
        tp_degree=1,
        lengths=ramp_lengths(plan, prompt, options.steps),
        page_size=plan.page_size,
        num_pages=options.num_pages or (TINY_PAGES if options.tiny else None),
        seed=options.seed,
    )
    device = "cpu" if options.tiny else "cuda:0"
    with tempfile.TemporaryDirectory() as folder:
        trace = options.trace or Path(folder) / "trace.json"
        watched = serve(plan, case, options.book, device, options.steps, trace)
        print(describe_plain(watched), flush=True)
        if options.tiny:
            return
        found = times(read_trace(trace), SKIPPED)
    print(describe(found, watched))
    from nanoflow_tune.autotune.gpu_stage import find_devices

    bucket = plan.buckets[0]
    label = (
        f"{model.name} TP1, {options.book}, {bucket.decode_tokens:g} decodes + "
        f"{bucket.dense_batch_tokens - bucket.decode_tokens:g} prefill rows"
    )
    origin = {
        "command": recorded_command("engine_overhead", arguments or sys.argv[1:]),
        "commit": options.commit or this_commit(),
        "gpu": find_devices().name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    row = figure(found, label, origin)
    write_figures([row], options.out)
    print(summary([row]))
    print(f"{time.monotonic() - began_s:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
