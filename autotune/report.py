"""The report: what won, by how much, measured or predicted, what binds, and what to do next.

`Report` holds the records of one job; the functions say in words what it means. `document.py`
turns it into JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..runtime.plan import Bucket, Candidate, Plan, Timing
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .book import Book
from .capacity import DenseBatch
from .op_table import GemmPeak, OpRow
from .sensitivity import Sensitivity
from .what_if import WhatIf

_AT_THE_CAP = 0.95
"""A plan that draws this part of the power cap is held back by it."""
_LIFTS = {
    "power": "at the power cap only joules per token count: fewer KV bytes, fewer passes over "
    "activations, or a card whose cap does not bind",
    "compute": "a lower-precision type or more GPUs lift it, overlap cannot",
    "memory": "a smaller KV type or a larger share of prefill lifts it",
    "network": "fewer GPUs a replica or a faster interconnect lifts it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one job found out."""

    plan: Plan
    plan_path: str
    model: ModelSpec
    hardware: HardwareSpec
    batch: DenseBatch
    race: tuple[Candidate, ...]
    certificate: Mapping[str, Any]
    """What the solver proved, with its gap and time."""
    history: tuple[tuple[int, str, float], ...] = ()
    """(number, schedule name, period in us) of everything tried, in order."""
    op_tables: Mapping[str, tuple[OpRow, ...]]
    """Nano-ops of each shown schedule, by its role: winner, best overlapped, sequential."""
    gemm_peak: GemmPeak
    profile: str
    """Which profile, from where."""
    power_limit_error: float = 0.0
    """Relative error of the energy model behind `power_limit_us`."""
    sensitivity: Sensitivity | None = None
    """What noise in the profile does to the shown plans; None without a profile."""
    what_ifs: tuple[WhatIf, ...] = ()
    """What would lift the winner's limit, and by how much."""
    book: Book | None = None
    """Plans for other batches; None when only the workload's own was asked for."""
    provenance: Mapping[str, str] = field(default_factory=dict[str, str])
    """Hashes, versions, seed, profile header."""
    reasons: tuple[str, ...] = ()
    """What the reader should know about how the result came about."""
    commit: str = ""
    elapsed_s: float = 0.0

    @property
    def bucket(self) -> Bucket:
        """The dense-batch bucket that was tuned."""
        return self.plan.buckets[0]

    @property
    def is_measured(self) -> bool:
        """Whether winner and baseline were both executed and timed."""
        return bool(self.bucket.winner.measured and self.bucket.sequential.measured)

    @property
    def is_sequential(self) -> bool:
        """Whether the sequential plan won."""
        return self.bucket.winner.schedule.name == "sequential"

    @property
    def verified(self) -> bool | None:
        """Whether every verification passed; None when none was run."""
        records = [record for bucket in self.plan.buckets for record in bucket.verification]
        return all(record.passed for record in records) if records else None

    @property
    def unmeasured_ops(self) -> tuple[str, ...]:
        """Ops of the shown schedules whose times come from the datasheet."""
        rows = [row for table in self.op_tables.values() for row in table]
        return tuple(dict.fromkeys(row.op for row in rows if row.source == "roofline"))

    def timing(self, candidate: Candidate) -> Timing:
        """Measured when the job is, so that like is compared with like."""
        return candidate.best_known if self.is_measured else candidate.predicted


def verdict(report: Report) -> str:
    """What won, by how much, and how that is known, in two or three sentences."""
    bucket = report.bucket
    sequential_us = report.timing(bucket.sequential).period_us
    overlapped_us = report.timing(bucket.best_overlapped).period_us
    how = _how_it_is_known(report)
    if report.is_sequential:
        ratio = sequential_us / overlapped_us
        so = "so overlap does not pay here"
        if ratio > 1:
            so = "too small a lead to be trusted, so the simpler plan is kept"
        text = (
            f"Run the sequential plan: {_ms(sequential_us)} an iteration. The best overlapped plan "
            f"takes {_ms(overlapped_us)} ({ratio:.3f}x), {so}; {how}."
        )
        return text + _power_doubt(report, "expect it to take longer")
    won_us = report.timing(bucket.winner).period_us
    name = bucket.winner.schedule.name.replace("_", " ")
    text = (
        f"Run the {name} plan: {_ms(won_us)} an iteration, {sequential_us / won_us:.3f}x the best "
        f"sequential plan ({_ms(sequential_us)}); {how}."
    )
    if overlapped_us != won_us:
        text += f" The best overlapped plan takes {_ms(overlapped_us)}."
    return text + _power_doubt(report, "expect less of a gain, or none")


def _how_it_is_known(report: Report) -> str:
    if report.is_measured:
        return "measured"
    source, is_datasheet = report.profile, "(roofline)" in report.profile
    if report.unmeasured_ops and not is_datasheet:
        source += f" and, for {', '.join(report.unmeasured_ops)}, the datasheet"
    return f"predicted from {source}" + (", not measured" if not is_datasheet else "")


def _power_doubt(report: Report, expect: str) -> str:
    """What the power cap makes of a prediction that does not know it, beyond the model's error."""
    least_us = report.bucket.power_limit_us * (1 - report.power_limit_error)
    if report.is_measured or report.timing(report.bucket.winner).period_us >= least_us:
        return ""
    return f" That is below what the power cap allows ({_power_limit(report)}): {expect}."


def _power_limit(report: Report) -> str:
    text = f"about {_ms(report.bucket.power_limit_us)}"
    if report.power_limit_error:
        text += f" within {report.power_limit_error:.0%}"
    return f"{text} at {report.hardware.power_cap_w:.0f} W"


def next_step(report: Report) -> str:
    """What binds, and what the reader should do about it."""
    bucket, hardware = report.bucket, report.hardware
    first = ""
    if report.timing(bucket.winner).source == "roofline":
        first = (
            f"Datasheet times flatter every kernel: `nanoflow-tune profile --gpu {hardware.name} "
            f"--model {report.model.name}` measures them on the card. "
        )
    elif not report.is_measured:
        gpus = f"{report.plan.num_gpus} x {hardware.device_name}"
        first = f"Run the same command on {gpus} to measure it. "
    elif bucket.winner.schedule.is_overlapped:
        first = "`nanoflow-tune bench plan.yaml` serves it against its sequential schedules. "
    floor = f"No plan beats {_ms(bucket.lower_bound_us)} at the hardware's peaks"
    if _is_below_power_limit(report):
        floor += (
            f"; the profile's joules allow {_power_limit(report)}, an estimate that the measured "
            "winner beats"
        )
    elif bucket.power_limit_us > 0:
        floor += f", or {_power_limit(report)}"
    binds = f"{bucket.bound.capitalize()} binds: {_LIFTS[bucket.bound]}."
    return f"{first}{floor}. {binds}{_lower_clocks(report)}"


def _is_below_power_limit(report: Report) -> bool:
    """Whether the winner was measured faster than the energy model holds for possible."""
    return report.is_measured and (
        report.timing(report.bucket.winner).period_us < report.bucket.power_limit_us
    )


def _lower_clocks(report: Report) -> str:
    """Why overlap wins where both plans draw all that the card may; empty elsewhere."""
    won, base = report.timing(report.bucket.winner), report.timing(report.bucket.sequential)
    is_capped = min(won.watts, base.watts) >= _AT_THE_CAP * report.hardware.power_cap_w
    if not report.is_measured or report.is_sequential or not is_capped:
        return ""
    if won.sm_clock_mhz >= base.sm_clock_mhz or won.joules >= base.joules:
        return ""
    return (
        f" Both plans draw the cap ({won.watts:.0f} and {base.watts:.0f} W); overlapped the SMs "
        f"run at {won.sm_clock_mhz:.0f} MHz instead of {base.sm_clock_mhz:.0f}, and a token costs "
        f"{1 - won.joules / base.joules:.0%} fewer joules."
    )


def caveats(report: Report) -> list[str]:
    """What the figures leave out, and how they came about."""
    found = list(report.reasons)
    carried = sum(row.source == "interpolated" for row in report.op_tables.get("winner", ()))
    if carried:
        total = len(report.op_tables["winner"])
        what = "have interpolated times"
        if report.is_measured:
            what = "were predicted from interpolated times; the plan as a whole was measured"
        found.append(f"{carried} of the winner's {total} nano-ops {what}.")
    return found


def _ms(us: float) -> str:
    return f"{us / 1e3:.3f} ms" if us < 1e5 else f"{us / 1e3:.1f} ms"
