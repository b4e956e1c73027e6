"""The main job: specs -> profile -> search -> verify -> plan, report and pictures.

    resolve   which model on how many of which GPU, and the batch that fits
    profile   measured here, read from a file, shipped, or none (roofline)
    search    structure, shares and kernels; on a GPU candidates are measured
    book      quick searches at other batch sizes, mixes and KV lengths
    verify    the planned run against the unsplit one, on the GPU or scaled down on the CPU
    emit      plan.yaml, report.json, report.html, timeline.png, sm_curves.png, trace.json

With a GPU stage (`gpu_stage.py`) the same steps measure; without one they predict.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiler.profile import Profile
from ..profiler.progress import bar, clock
from ..runtime.plan import Bucket, Candidate, Plan
from ..runtime.schedule import IllegalScheduleError
from .book import Book, build_book
from .book_grid import FULL, QUICK, Traffic
from .book_store import FILE as POINTS
from .book_store import BookStore, kept_points
from .bounds import power_limit_of
from .corrections import corrected, learned
from .cost_model import CostModel
from .emit import draw, play, play_measured, shown, write
from .gpu_stage import GpuStage
from .job import (
    Job,
    ProfileChoice,
    TuneOptions,
    choose_profile,
    default_folder,
    input_hashes,
    resolve,
)
from .op_table import gemm_peak, op_rows
from .output_folder import claim, held, staging
from .point_search import PointSearch
from .provenance import commit, created_by, provenance
from .report import Report
from .resize import row_order_of, shortened
from .resume import KeptRun, Measure, check_resumable, kept_run
from .search import SearchResult, pick_winner, search
from .search_progress import search_bar
from .search_result import best_of_each_kind
from .sensitivity import sensitivity
from .study_storage import open_storage
from .trace import Track
from .verification import verify
from .what_if import what_ifs

if TYPE_CHECKING:
    from rich.console import Console

FINAL_ROUNDS, FINAL_TURN_S = 4, 1.0
"""The finalists' interleaved run: turns each, and seconds of one."""
PAGE_SIZE = 16
"""Tokens of one KV-cache page."""


class NoFeasiblePlanError(RuntimeError):
    """Nothing in the search space can run."""


def tune(options: TuneOptions, console: Console) -> Report:
    """Run the whole job and write its output folder.

    Args:
        options: what to tune.
        console: progress goes here.

    Raises:
        ValueError: input that breaks a rule (specs, capacity, profile, output folder).
        NoFeasiblePlanError: nothing in the search space can run.
        VerificationError: the plan computes something else.
    """
    started = time.monotonic()
    job = resolve(options, lambda text: say(console, "gpu", text))
    with closing(job.stage) if job.stage else nullcontext():
        return _run(options, job, console, started)


def _run(options: TuneOptions, job: Job, console: Console, started: float) -> Report:
    what = f"{job.model.name} on {job.num_gpus} x {job.hardware.name}, workload {job.workload.name}"
    say(console, "job", f"{what}, {job.batch.tokens} tokens a batch")
    folder = options.output_dir or default_folder(job)
    with held(folder):
        return _run_in(folder, options, job, console, started)


def _run_in(
    folder: Path, options: TuneOptions, job: Job, console: Console, started: float
) -> Report:
    replaced = claim(folder, _identity(job), is_measured=job.stage is not None)
    if options.storage is not None:
        open_storage(options.storage)  # before anything is measured
    chosen = choose_profile(options, job)
    say(console, "profile", chosen.title)
    cost_model = CostModel(
        chosen.profile, job.hardware, job.model.torch_dtype, lacking=chosen.lacking
    )
    key = point_key(options, job, chosen)
    if options.is_resumed:
        points_kept = len(BookStore(folder / POINTS, key).points)
        check_resumable(folder, points=points_kept, kept=KeptRun(folder, key))
    with (
        kept_run(folder, key) as kept,
        kept_points(folder / POINTS, key) as points,
        staging(folder) as aside,
    ):
        result = _searched(options, job, cost_model, aside, kept, console)
        plan = _plan(job, chosen.profile, result)
        corrections = learned(job.graph, cost_model, job.batch.mix, result.race)
        book_costs = corrected(cost_model, corrections)
        book = _book(options, job, book_costs, plan, points, console)
        if book is not None:
            plan = replace(plan, buckets=book.buckets, break_even=book.break_even)
        measured = _measured(job, plan.buckets[0], console)
        if not options.is_search_only:
            what = "winner and best overlapped" + (", and a sample of the book" if book else "")
            say(console, "verify", f"{what}, on {job.num_gpus} rank(s)")
            with bar(console, "verifying, batches") as advance:
                plan = verify(plan, job.model, job.hardware, options.seed, job.stage, advance)
        tracks = play(plan.buckets[0], job.graph, cost_model, job.batch.mix)
        report = _report(options, job, chosen, cost_model, result, plan, tracks, measured)
        facts = dict(report.provenance)
        if corrections.num_plans:
            facts["corrections of the plan book"] = corrections.told()
        shown_book = book and replace(book, buckets=plan.buckets)
        report = replace(report, book=shown_book, provenance=facts)
        pictures = None
        if not options.is_search_only:
            say(console, "report", "figures, trace, page")
            pictures = draw(report, job.graph, cost_model, tracks, measured)
        report = replace(
            report, plan_path=str(folder / "plan.yaml"), elapsed_s=time.monotonic() - started
        )
        write(report, pictures, aside)
    say(console, "output", f"{folder}" + (f" ({replaced})" if replaced else ""))
    return report


def say(console: Console, stage: str, text: str) -> None:
    """One line of progress."""
    console.print(f"[bold cyan]{stage:<9}[/] ", end="")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _identity(job: Job) -> dict[str, object]:
    return {
        "model": job.model.name,
        "hardware": job.hardware.name,
        "workload": job.workload.name,
        "num_gpus": job.num_gpus,
    }


def _searched(
    options: TuneOptions,
    job: Job,
    cost_model: CostModel,
    aside: Path,
    kept: KeptRun,
    console: Console,
) -> SearchResult:
    """The search of this run, or of an interrupted one."""
    study = aside / "search.db"
    if kept.result is not None:
        say(console, "search", "the finished search of an interrupted run is taken over")
        kept.take_study(study)
        return kept.result
    if kept.num_measured:
        taken = f"{kept.num_measured} measured schedules of an interrupted run are taken over"
        say(console, "search", taken)
    measure = kept.measuring(job.stage.measure) if job.stage else None
    result = _search(options, job, cost_model, study, measure, console)
    kept.keep_search(result, study)
    return result


def _search(
    options: TuneOptions,
    job: Job,
    cost_model: CostModel,
    study: Path,
    measure: Measure | None,
    console: Console,
) -> SearchResult:
    least = 2 * job.space.token_granularity
    if job.batch.tokens < least:
        raise NoFeasiblePlanError(
            f"a plan needs two nano-batches of {job.space.token_granularity} tokens, but only "
            f"{job.batch.tokens} tokens fit; use more GPUs"
        )
    try:
        with search_bar(console, job.space, has_gpu=measure is not None) as on_stage:
            result = search(
                job.graph,
                cost_model,
                job.hardware,
                job.space,
                job.batch.mix,
                seed=options.seed,
                storage=options.storage or f"sqlite:///{study}",
                on_progress=lambda text: say(console, "search", text),
                on_stage=on_stage,
                measure=measure,
            )
    except IllegalScheduleError as err:
        raise NoFeasiblePlanError(
            f"no schedule of the search space runs on {job.hardware.name}: {err}"
        ) from err
    if job.stage is None:
        return result
    with clock(console, "longer turns of the finalists"):
        settled = _settled(result, job.stage)
    clock_mhz = settled.winner.best_known.sm_clock_mhz
    power_us = power_limit_of(job.graph, job.batch.mix, cost_model, clock_mhz)
    return replace(settled, power_limit_us=power_us)


def _settled(result: SearchResult, stage: GpuStage) -> SearchResult:
    """Time the finalists once more in one longer interleaved run, and let that decide."""
    finalists = (result.sequential, result.best_overlapped, result.winner)
    schedules = list(dict.fromkeys(candidate.schedule for candidate in finalists))
    timings = stage.measure(schedules, rounds=FINAL_ROUNDS, turn_s=FINAL_TURN_S)
    timed = dict(zip(schedules, timings, strict=True))

    def again(candidate: Candidate) -> Candidate:
        measured = timed.get(candidate.schedule, candidate.measured)
        return replace(candidate, measured=measured)

    base = again(result.sequential)
    return replace(
        result,
        winner=pick_winner(base, [again(result.best_overlapped), again(result.winner)]),
        sequential=base,
        best_overlapped=again(result.best_overlapped),
        race=tuple(map(again, result.race)),
    )


def point_key(options: TuneOptions, job: Job, chosen: ProfileChoice) -> str:
    """Names everything that the points of a book are made from."""
    inputs = input_hashes(job, chosen.profile), chosen.kernels
    made = (inputs, job.num_gpus, options.seed, options.effort, job.stage is None, created_by())
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]


def _book(
    options: TuneOptions,
    job: Job,
    cost_model: CostModel,
    plan: Plan,
    points: BookStore,
    console: Console,
) -> Book | None:
    grid = FULL if options.effort == "full" else QUICK
    if options.buckets is not None:
        grid = replace(grid, tokens=options.buckets)
    if not grid.tokens:
        return None
    point_search = PointSearch(
        graph=job.graph, cost_model=cost_model, space=job.space, starts=grid.starts
    )
    traffic = Traffic(
        model=job.model, hardware=job.hardware, workload=job.workload, num_gpus=job.num_gpus
    )
    with bar(console, "plan book, points") as advance:
        return build_book(
            plan,
            point_search,
            traffic,
            grid,
            seed=options.seed,
            store=points,
            on_progress=lambda text: say(console, "book", text),
            advance=advance,
        )


def _plan(job: Job, profile: Profile | None, result: SearchResult) -> Plan:
    mix = job.batch.mix
    bucket = Bucket(
        dense_batch_tokens=job.batch.tokens,
        decode_tokens=job.batch.decode_tokens,
        decode_context_tokens=mix.decode_context_tokens,
        prefill_context_tokens=mix.prefill_context_tokens,
        row_order=row_order_of(result.winner.schedule),
        winner=_rounded(result.winner),
        sequential=_rounded(result.sequential),
        best_overlapped=_rounded(result.best_overlapped),
        lower_bound_us=round(result.lower_bound_us, 1),
        power_limit_us=round(result.power_limit_us, 1),
        bound=result.bound,
    )
    return Plan(
        model=job.model.name,
        hardware=job.hardware.name,
        workload=job.workload.name,
        num_gpus=job.num_gpus,
        dtype=job.model.torch_dtype,
        kv_dtype=job.model.torch_dtype,
        page_size=PAGE_SIZE,
        inputs=input_hashes(job, profile),
        created_by=created_by(),
        buckets=(bucket,),
    )


def _measured(job: Job, bucket: Bucket, console: Console) -> dict[str, Track]:
    """The shown schedules as they run on the GPU; none without one."""
    if job.stage is None:
        return {}
    roles = shown(bucket)
    with clock(console, "timeline of every nano-op"):
        schedules = [candidate.schedule for candidate in roles.values()]
        timelines = job.stage.timelines(schedules)
    return play_measured(bucket, job.graph, dict(zip(roles, timelines, strict=True)))


def _rounded(candidate: Candidate) -> Candidate:
    """Figures with as many digits as people read: 0.1 us, 1 mJ, 0.1 W."""
    measured = None if candidate.measured is None else shortened(candidate.measured)
    return replace(candidate, predicted=shortened(candidate.predicted), measured=measured)


def _report(
    options: TuneOptions,
    job: Job,
    chosen: ProfileChoice,
    cost_model: CostModel,
    result: SearchResult,
    plan: Plan,
    tracks: Mapping[str, Track],
    measured: Mapping[str, Track],
) -> Report:
    candidates, mix = shown(plan.buckets[0]), job.batch.mix
    settings = {"effort": options.effort, "seed": options.seed, "kernels": chosen.kernels}
    plans = {
        "sequential": result.sequential.schedule,
        "best overlapped": result.best_overlapped.schedule,
        "winner": result.winner.schedule,
    }
    return Report(
        plan=plan,
        plan_path="",
        model=job.model,
        hardware=job.hardware,
        batch=job.batch,
        race=best_of_each_kind(result),
        certificate=certificate_of(result),
        history=result.history,
        op_tables={
            role: op_rows(
                candidates[role].schedule,
                job.graph,
                cost_model,
                mix,
                played.bars,
                measured[role].bars if role in measured else (),
            )
            for role, played in tracks.items()
        },
        gemm_peak=gemm_peak(chosen.profile, job.hardware, job.model.torch_dtype),
        profile=chosen.title,
        power_limit_error=cost_model.energy.relative_error if cost_model.energy else 0.0,
        sensitivity=sensitivity(cost_model, job.graph, mix, plans, seed=options.seed),
        what_ifs=what_ifs(result.winner.schedule, job.graph, cost_model, mix),
        provenance=provenance(plan.inputs, chosen.profile, settings),
        reasons=job.reasons,
        commit=commit(),
    )


def certificate_of(result: SearchResult) -> dict[str, Any]:
    """What solver and space bound proved, and what each stage decided and rejected."""
    space = asdict(result.space_bound)
    return {
        **asdict(result.certificate),
        "num_tried": len(result.history),
        "space": {**space, "gap": result.space_bound.gap},
        "stages": list(result.stages),
    }
