"""The `lossy` block of an export: decisions that the target cannot express, and what that costs.

Gains are taken from the plan's own predictions (its measurements stand beside them): how much
faster the exported schedule is than what the target can run. The decisions of an overlapped
schedule make that gain together, so it is not shared out among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ..runtime.plan import SM_FREE_VARIANTS, Bucket, Candidate, Schedule

Part = Literal["overlap", "kernels", "target"]
"""What overlap gains; what the kernels do, of which nothing is known; what the target's own way of
running the batch gains or costs."""


_TARGET_FORM = "one all-reduce behind an output projection that is split by rows"
"""Of both targets, on any rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One decision that is lost."""

    decision: str
    plan: str
    """What the plan says."""
    target: str
    """What the target does instead."""
    part: Part
    """What its cost is a part of."""


def losses(schedule: Schedule, num_sms: int, target: dict[str, str]) -> list[Loss]:
    """Decisions of a schedule beyond one dense batch on the whole GPU.

    Args:
        schedule: what is exported.
        num_sms: of the GPU.
        target: what the target does, by decision: nano_batches, sm_shares, order, lanes,
            transports, kernels.
    """
    found: list[Loss] = []

    def add(decision: str, plan: str, part: Part = "overlap") -> None:
        found.append(Loss(decision=decision, plan=plan, target=target[decision], part=part))

    if len(schedule.nano_batches) > 1:
        sizes = ", ".join(
            f"[{batch.tokens[0]}, {batch.tokens[1]}) with {batch.decode_tokens} decodes"
            for batch in schedule.nano_batches
        )
        add("nano_batches", f"{len(schedule.nano_batches)} nano-batches: {sizes}")
    shares: dict[int, dict[str, None]] = {}
    for op in schedule.nano_ops:
        if op.num_sms not in (0, num_sms):
            shares.setdefault(op.num_sms, {})[op.op] = None
    if shares:
        add("sm_shares", "; ".join(f"{sms} SMs: {', '.join(ops)}" for sms, ops in shares.items()))
    if len(schedule.lanes) > 1:
        add("lanes", f"{len(schedule.lanes)} lanes side by side: {', '.join(schedule.lanes)}")
    edges = sum(len(op.after) for op in schedule.nano_ops)
    if edges or schedule.max_stage:
        add(
            "order",
            f"issue order over {schedule.max_stage + 1} layer(s), {edges} waits of its own",
        )
    gathered = [op.tokens for op in schedule.nano_ops if op.op == "o_all_gather"]
    if gathered:
        rows = ", ".join(f"[{start}, {end})" for start, end in gathered)
        plan = f"all-gathers before and behind the output projection of rows {rows}"
        found.append(Loss(decision="output_form", plan=plan, target=_TARGET_FORM, part="kernels"))
    free = sorted({op.op for op in schedule.nano_ops if op.variant in SM_FREE_VARIANTS})
    if free:
        add("transports", f"{', '.join(free)} without SMs", "kernels")
    kernels = Counter(op.variant for op in schedule.nano_ops)
    names = ", ".join(f"{name} x {count}" for name, count in sorted(kernels.items()))
    add("kernels", names, "kernels")
    return found


def speedup(bucket: Bucket, candidate: Candidate) -> tuple[float, str]:
    """Tokens/s of a candidate over the sequential plan's: measured if both are, else predicted."""
    base = bucket.sequential
    if base.measured and candidate.measured:
        return base.measured.period_us / candidate.measured.period_us, "measured"
    return base.predicted.period_us / candidate.predicted.period_us, "predicted"


def lossy_block(
    bucket: Bucket,
    candidate: Candidate,
    found: list[Loss],
    *,
    role: str,
    target_runs: str,
    target_vs_sequential: float | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    """The block as plain data.

    Args:
        bucket: the plan's.
        candidate: what is exported.
        found: from `losses`, and the target's own.
        role: of the candidate in the bucket.
        target_runs: what the target runs, in words.
        target_vs_sequential: its predicted tokens/s over those of the sequential plan; None
            where nothing is known of it.
        more: further keys of the block.
    """
    sequential, overlapped = bucket.sequential, bucket.best_overlapped
    gain, source = speedup(bucket, candidate)
    best_gain, best_source = speedup(bucket, overlapped)
    block: dict[str, Any] = {
        "exported": f"{role} ({candidate.schedule.name})",
        "target_runs": target_runs,
        "gains_are": f"tokens/s against the sequential plan's; exported {source}, best overlapped "
        f"{best_source}, the target's predicted",
        "exported_gain": _digits(gain - 1),
        "best_overlapped_gain": _digits(best_gain - 1),
    }
    if target_vs_sequential is None:
        block["predicted_gain_lost"] = None
    else:
        block["target_gain"] = _digits(target_vs_sequential - 1)
        block["predicted_gain_lost"] = _digits(gain - target_vs_sequential)
    block["predicted_ms"] = {
        name: round(held.predicted.period_us / 1e3, 2)
        for name, held in (
            ("sequential", sequential),
            ("best_overlapped", overlapped),
            (role, candidate),
        )
    }
    block |= more
    texts = {
        "overlap": f"a part of {_percent(gain - 1)}, which the overlap decisions gain together"
        if gain > 1
        else f"none: overlap changes tokens/s by {_percent(gain - 1)}",
        "kernels": "unknown: the target's own kernels were not measured",
        "target": "a part of target_gain"
        if target_vs_sequential is not None
        else "unknown: the plan does not price it",
    }
    block["decisions"] = [
        {
            "decision": loss.decision,
            "plan": loss.plan,
            "target": loss.target,
            "predicted_gain_lost": texts[loss.part],
        }
        for loss in found
    ]
    return block


def _percent(part: float) -> str:
    return f"{100 * part:+.1f} %"


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
