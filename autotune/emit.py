"""Plays the shown schedules out, draws them, and writes the files of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Bucket, Candidate
from ..runtime.plan_io import dump_plan
from .cost_model import CostModel
from .document import document
from .figures import sm_curves_png, timeline_png
from .history_figure import history_png
from .html import render
from .op_table import curves, roof_points
from .output_folder import DOCUMENT
from .pair_figure import pairs_png
from .report import Report
from .roofline_figure import roofline_png
from .simulator import simulate
from .trace import PlayedOp, Track, trace_json, track

_WINDOW_LAYERS = 2
_WARM_LAYERS = 4
"""Layers played before the window, so that it shows the steady state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What is drawn of a plan."""

    timeline_png: bytes
    sm_curves_png: bytes
    roofline_png: bytes | None
    """None where every time is the datasheet's."""
    pairs_png: bytes | None
    """None where no pair was measured."""
    history_png: bytes | None
    """None where nothing was tried."""
    trace_json: str

    def images(self) -> dict[str, bytes]:
        """The pictures that there are, by name."""
        drawn = {
            "timeline": self.timeline_png,
            "sm_curves": self.sm_curves_png,
            "roofline": self.roofline_png,
            "pairs": self.pairs_png,
            "history": self.history_png,
        }
        return {name: png for name, png in drawn.items() if png is not None}


def shown(bucket: Bucket) -> dict[str, Candidate]:
    """The winner, and beside it the best overlapped and the sequential plan where they differ."""
    roles = {"winner": bucket.winner}
    if bucket.best_overlapped.schedule != bucket.winner.schedule:
        roles["best overlapped"] = bucket.best_overlapped
    if bucket.sequential.schedule != bucket.winner.schedule:
        roles["sequential"] = bucket.sequential
    return roles


def play(bucket: Bucket, graph: OpGraph, cost_model: CostModel, mix: RowMix) -> dict[str, Track]:
    """The shown schedules played out by the simulator over a whole iteration."""
    tracks: dict[str, Track] = {}
    for role, candidate in shown(bucket).items():
        timeline = simulate(candidate.schedule, graph, cost_model, mix, graph.num_layers)
        timing = candidate.predicted
        name = candidate.schedule.name.replace("_", " ")
        tracks[role] = track(
            candidate.schedule,
            graph,
            timeline.events,
            title=name if name == role else f"{name} ({role})",
            source=timing.source,
            period_us=timing.period_us,
            measured_us=candidate.measured.period_us if candidate.measured else 0.0,
        )
    return tracks


def play_measured(
    bucket: Bucket, graph: OpGraph, timelines: Mapping[str, Sequence[PlayedOp]]
) -> dict[str, Track]:
    """The shown schedules as they ran on the GPU.

    Args:
        bucket: whose schedules these are.
        graph: of one rank.
        timelines: by role, when each nano-op ran in each layer.
    """
    tracks: dict[str, Track] = {}
    for role, candidate in shown(bucket).items():
        if role in timelines and candidate.measured is not None:
            name = candidate.schedule.name.replace("_", " ")
            tracks[role] = track(
                candidate.schedule,
                graph,
                timelines[role],
                title=name if name == role else f"{name} ({role})",
                source="measured",
                period_us=candidate.measured.period_us,
            )
    return tracks


def draw(
    report: Report,
    graph: OpGraph,
    cost_model: CostModel,
    tracks: Mapping[str, Track],
    measured: Mapping[str, Track],
) -> Pictures:
    """The figures and the trace of a report.

    Args:
        report: of the job.
        graph: of one rank.
        cost_model: for the curves.
        tracks: the shown schedules as planned.
        measured: those of them that ran on the GPU.
    """
    plan, bucket = report.plan, report.bucket
    job = f"{plan.model} on {plan.num_gpus} x {report.hardware.device_name}"
    batch = (
        f"workload {plan.workload}, {bucket.dense_batch_tokens} tokens: {bucket.decode_tokens} "
        f"decodes at {bucket.decode_context_tokens:.0f} keys; times from {report.profile}"
    )
    first = min(_WARM_LAYERS, max(0, graph.num_layers - _WINDOW_LAYERS - 1))
    both = [
        played
        for role in tracks
        for played in (tracks[role], measured.get(role))
        if played is not None
    ]
    first_two = [
        played.window(first, _WINDOW_LAYERS)
        for role in list(tracks)[:2]
        for played in (tracks[role], measured.get(role))
        if played is not None
    ]
    schedules = {role: candidate.schedule for role, candidate in shown(bucket).items()}
    drawn = curves(graph, cost_model, report.batch.mix, schedules)
    is_guessed = any(curve.is_roofline for curve in drawn)
    return Pictures(
        timeline_png=timeline_png(
            first_two, title=job, subtitle=batch, num_sms=report.hardware.num_sms
        ),
        sm_curves_png=sm_curves_png(
            drawn,
            title=f"{job}: throughput against SM share",
            subtitle=f"lines: all {bucket.dense_batch_tokens} tokens, best kernel at each share"
            f"{', dashed: datasheet' if is_guessed else ''}; dots: measured; marks: nano-ops, on "
            "their own rows",
        ),
        roofline_png=roofline_png(
            roof_points(report.op_tables["winner"]),
            report.hardware,
            plan.dtype,
            sustained_flops_per_s=report.gemm_peak.flops_per_s,
            sustained=report.gemm_peak.source.partition(" (")[0],
            title=f"{job}: roofline",
            subtitle="the winner's ops as they run in the plan; percent: of what peak and "
            "bandwidth of the whole GPU allow at that intensity",
        ),
        pairs_png=pairs_png(
            cost_model.profile.pairs if cost_model.profile else (),
            title=f"Two kernels side by side on {report.hardware.device_name}",
            subtitle="time beside the other / time alone on the same SMs, first | second; 1.00: no "
            "slowdown; median where several kernels were measured",
        ),
        history_png=history_png(
            report.history,
            winner=bucket.winner.schedule.name,
            levels=_levels(report),
            title=f"{job}: search history",
            subtitle="period of every schedule tried for the workload's own batch, in order; line: "
            f"best so far; {'predicted, then measured' if report.is_measured else 'predicted'}",
        ),
        trace_json=trace_json(both),
    )


def _levels(report: Report) -> dict[str, float]:
    """What to hold the history against, in us."""
    space = report.certificate.get("space", {})
    levels = {
        "best sequential": report.bucket.sequential.best_known.period_us,
        "power limit (an estimate)": report.bucket.power_limit_us,
        "bound of the space": float(space.get("bound_us", 0.0)),
    }
    return {name: us for name, us in levels.items() if us > 0}


def write(report: Report, pictures: Pictures | None, folder: Path) -> None:
    """Write plan, report and pictures into a folder."""
    dump_plan(report.plan, folder / "plan.yaml")
    values = document(report)
    images: dict[str, bytes] = {}
    if pictures is not None:
        images = pictures.images()
        for name, png in images.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / "trace.json").write_text(pictures.trace_json, encoding="utf-8")
    (folder / "report.html").write_text(render(values, images), encoding="utf-8")
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / DOCUMENT).write_text(text + "\n", encoding="utf-8")
