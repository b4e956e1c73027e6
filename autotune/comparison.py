"""Two plans or runs side by side: times, energy, schedules, and what each was made from.

A side is a plan file, or the folder of a finished job, whose `report.json` adds verification and
provenance. Figures are compared like with like: measured with measured where both sides have it,
else predicted with predicted, and each says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..runtime.plan import Bucket, Candidate, Plan, Schedule, Timing
from ..runtime.plan_io import load_plan
from .output_folder import DOCUMENT, read_document

ROLES = ("winner", "sequential", "best_overlapped")
_JOB = ("model", "hardware", "num_gpus", "workload")
"""What two plans must share for their figures to be about one thing."""
Basis = Literal["measured", "predicted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two."""

    path: Path
    plan: Plan
    document: dict[str, Any]
    """`report.json`; empty for a plan file alone."""

    @property
    def bucket(self) -> Bucket:
        """The workload's own bucket."""
        return self.plan.buckets[0]


def read_side(path: Path) -> Side:
    """A plan file, or the folder of a finished job.

    Raises:
        ValueError: neither, or damaged.
    """
    if path.is_dir():
        document = read_document(path) if (path / DOCUMENT).exists() else {}
        if not (path / "plan.yaml").exists():
            raise ValueError(
                f"a side of a comparison must be a plan file or a folder with one, but {path} has "
                "no plan.yaml; name another"
            )
        return Side(path=path, plan=load_plan(path / "plan.yaml"), document=document)
    return Side(path=path, plan=load_plan(path), document={})


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Everything about two sides, as `compare.json` holds it."""
    basis = _basis(a, b)
    figures = {role: _figures(a, b, role, basis) for role in ROLES}
    warnings = _warnings(a, b)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "verdict": _verdict(a, b, figures["winner"], basis),
        "warnings": warnings,
        "basis": basis,
        "facts": _facts(a, b),
        "figures": figures,
        "inputs": _inputs(a.plan, b.plan),
        "schedules": {role: schedule_difference(*_schedules(a, b, role)) for role in ROLES},
    }


def _basis(a: Side, b: Side) -> Basis:
    is_measured = all(getattr(side.bucket, role).measured for side in (a, b) for role in ROLES[:2])
    return "measured" if is_measured else "predicted"


def _timing(candidate: Candidate, basis: Basis) -> Timing:
    return candidate.measured if basis == "measured" and candidate.measured else candidate.predicted


def _schedules(a: Side, b: Side, role: str) -> tuple[Schedule, Schedule]:
    return getattr(a.bucket, role).schedule, getattr(b.bucket, role).schedule


def _figures(a: Side, b: Side, role: str, basis: Basis) -> dict[str, Any]:
    sides = {"a": _side_figures(a, role, basis), "b": _side_figures(b, role, basis)}
    ratios = {
        key: round(sides["b"][key] / sides["a"][key], 4)
        for key in ("period_us", "tokens_per_s_per_gpu", "joules_per_token", "watts")
        if sides["a"][key] and sides["b"][key]
    }
    return {**sides, "b_over_a": ratios}


def _side_figures(side: Side, role: str, basis: Basis) -> dict[str, Any]:
    candidate: Candidate = getattr(side.bucket, role)
    timing, tokens = _timing(candidate, basis), side.bucket.dense_batch_tokens
    return {
        "schedule": candidate.schedule.name,
        "source": timing.source,
        "period_us": timing.period_us,
        "p10_us": timing.p10_us or timing.period_us,
        "p90_us": timing.p90_us or timing.period_us,
        "tokens_per_s_per_gpu": round(tokens / timing.period_us * 1e6 / side.plan.num_gpus, 1),
        "joules_per_token": float(f"{timing.joules / tokens:.4g}") or None,
        "watts": timing.watts or None,
        "sm_clock_mhz": timing.sm_clock_mhz or None,
    }


def _facts(a: Side, b: Side) -> dict[str, dict[str, Any]]:
    """Facts of each side by name, equal or not."""

    def of(side: Side) -> dict[str, Any]:
        bucket, plan = side.bucket, side.plan
        return {
            "model": plan.model,
            "hardware": f"{plan.num_gpus} x {plan.hardware}",
            "workload": plan.workload,
            "dense batch": f"{bucket.dense_batch_tokens} tokens, {bucket.decode_tokens} decodes",
            "dtype": f"{plan.dtype}, KV {plan.kv_dtype}",
            "binds": bucket.bound,
            "lower bound": f"{bucket.lower_bound_us / 1e3:.2f} ms",
            "power limit": f"{bucket.power_limit_us / 1e3:.2f} ms",
            "buckets": len(plan.buckets),
            "verified": _verified(side),
            "created by": plan.created_by,
            "profile": side.document.get("profile", ""),
        }

    first, second = of(a), of(b)
    return {name: {"a": first[name], "b": second[name]} for name in first}


def _verified(side: Side) -> str:
    records = side.bucket.verification
    if not records:
        return "no"
    devices = ", ".join(sorted({record.device for record in records}))
    return f"on {devices}" if all(record.passed for record in records) else f"FAILED on {devices}"


def _inputs(a: Plan, b: Plan) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "a": a.inputs.get(name),
            "b": b.inputs.get(name),
            "same": a.inputs.get(name) == b.inputs.get(name),
        }
        for name in sorted({*a.inputs, *b.inputs})
    }


def schedule_difference(a: Schedule, b: Schedule) -> dict[str, Any]:
    """Where two schedules differ: nano-batches, nano-ops on one side only, and changed ones.

    Nano-ops are matched by op and rows; their place in the issue order counts as one difference.
    """
    first, second = ({(op.op, op.tokens): op for op in one.nano_ops} for one in (a, b))
    changed: list[dict[str, Any]] = []
    for key in (key for key in first if key in second):
        mine, other = first[key], second[key]
        changes = {
            name: [getattr(mine, name), getattr(other, name)]
            for name in ("lane", "num_sms", "variant", "stage", "after")
            if getattr(mine, name) != getattr(other, name)
        }
        if changes:
            changed.append({"nano_op": _called(key), **changes})
    shared = [[key for key in one if key in first and key in second] for one in (first, second)]
    return {
        "same": a == b,
        "nano_batches": [[list(batch.tokens) for batch in one.nano_batches] for one in (a, b)],
        "lanes": [list(a.lanes), list(b.lanes)],
        "only_a": [_called(key) for key in first if key not in second],
        "only_b": [_called(key) for key in second if key not in first],
        "changed": changed,
        "same_order": shared[0] == shared[1],
    }


def _called(key: tuple[str, tuple[int, int]]) -> str:
    return f"{key[0]} [{key[1][0]}, {key[1][1]})"


def _warnings(a: Side, b: Side) -> list[str]:
    found: list[str] = []
    for name in _JOB:
        mine, other = getattr(a.plan, name), getattr(b.plan, name)
        if mine != other:
            found.append(f"{name} differs: {mine} and {other}; figures compare different jobs")
    rows = a.bucket.dense_batch_tokens, b.bucket.dense_batch_tokens
    if rows[0] != rows[1]:
        found.append(f"batches differ: {rows[0]} and {rows[1]} tokens; compare tokens/s, not times")
    has = [side.bucket.winner.measured is not None for side in (a, b)]
    if has[0] != has[1]:
        measured = "A" if has[0] else "B"
        found.append(
            f"only {measured} was measured: predictions are compared; measure the other one too"
        )
    if a.plan.inputs.get("profile") != b.plan.inputs.get("profile"):
        found.append("made from different profiles")
    return found


def _verdict(a: Side, b: Side, figures: dict[str, Any], basis: Basis) -> str:
    first, second = figures["a"], figures["b"]
    ratio = second["tokens_per_s_per_gpu"] / first["tokens_per_s_per_gpu"]
    is_other = any(getattr(a.plan, name) != getattr(b.plan, name) for name in _JOB)
    what = "Two different jobs: " if is_other else ""
    what += (
        f"B's winner ({second['schedule']}) gives {ratio:.3f}x the tokens/s per GPU of A's "
        f"({first['schedule']}), {basis}"
    )
    if a.bucket.winner == b.bucket.winner:
        return f"{what}: the same schedule with the same figures."
    same_rows = a.bucket.dense_batch_tokens == b.bucket.dense_batch_tokens
    is_apart = first["p90_us"] < second["p10_us"] or second["p90_us"] < first["p10_us"]
    if basis == "measured" and same_rows and not is_apart:
        return f"{what}: within the spread (p10 to p90) of the two, so no difference is shown."
    return f"{what}."
