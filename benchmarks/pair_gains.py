"""Which kernels gain from running side by side, in time and in joules. No GPU.

    python benchmarks/pair_gains.py

Each measured pair of the profile (two kernels on complementary SMs for 0.4 s, at the power cap)
against the same work in a row: both kernels on all SMs, in the proportion in which the pair gets
them done while both are busy. Together: slowdowns and watts as measured, over times alone on those
shares. In a row: times and joules of the profile's rows, at the clock that the cap leaves them
(`autotune/power_model.py`), of the variant that is best there; that side is a prediction. What
nano-batches and dependencies cost comes on top of it. Joules here are of the whole board. Pairs run
too short for the cap: at 775 W a gain in time is partly one of watts, and what is left of it under
the cap is nearer to the gain in joules.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

from ab import recorded_command

from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.power_model import Load
from nanoflow_tune.autotune.provenance import commit as this_commit
from nanoflow_tune.profiler.energy import prefill_keys
from nanoflow_tune.profiler.profile import PairRow, Point
from nanoflow_tune.profiler.store import load_profile, profile_files
from nanoflow_tune.runtime.op_graph import OpKind, RowMix
from nanoflow_tune.runtime.op_shapes import op_of_shape
from nanoflow_tune.search_spaces.loader import load_hardware

PROFILES = Path("results/profiles/h200")
COLUMNS = (
    "a", "a_shape", "a_tokens", "a_num_sms", "b", "b_shape", "b_tokens", "b_kv_len", "b_num_sms",
    "slowdown_a", "slowdown_b", "watts_together", "watts_in_a_row", "clock_in_a_row_mhz",
    "time_gain", "joules_gain",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One pair against its kernels in a row."""

    pair: PairRow
    watts: float
    """In a row, predicted."""
    sm_clock_mhz: float
    """In a row, predicted."""
    time_gain: float
    """Time in a row / time together."""
    joules_gain: float
    """Joules in a row / joules together."""

    @property
    def kinds(self) -> tuple[str, str]:
        """Of both kernels; copy engines apart, since they take no SMs."""
        a, b = self.pair.a, self.pair.b
        return a.kind, b.kind if b.num_sms else f"{b.kind} by copy engine"

    def cells(self) -> list[str]:
        """A line of the table."""
        a, b = self.pair.a, self.pair.b
        named = [a.kind, a.shape, a.tokens, a.num_sms]
        named += [b.kind, b.shape, b.tokens, b.kv_len, b.num_sms]
        numbers = [self.pair.slowdown_a, self.pair.slowdown_b]
        watts = [f"{w:.0f}" for w in (self.pair.watts, self.watts, self.sm_clock_mhz)]
        gains = [f"{gain:.3f}" for gain in (self.time_gain, self.joules_gain)]
        return [*map(str, named), *(f"{n:.3f}" for n in numbers), *watts, *gains]


def rows_of(point: Point) -> RowMix:
    """What the rows of a profile point hold."""
    is_prefill = point.kind == "prefill_attention"
    return RowMix(
        decode_tokens=0 if is_prefill else point.tokens,
        prefill_tokens=point.tokens if is_prefill else 0,
        decode_context_tokens=point.kv_len,
        prefill_context_tokens=prefill_keys(point) / point.tokens if is_prefill else 0.0,
    )


def in_a_row(costs: CostModel, loads: Sequence[tuple[Load, float]]) -> tuple[float, float, float]:
    """(us, joules, clock as a part of the highest) of kernels one after the other, at the cap.

    Args:
        costs: with a power model.
        loads: each with how often it runs.
    """
    power = costs.power
    assert power is not None, "the profile has joules"
    joules = sum(count * load.joules for load, count in loads)

    def us_at(clock: float) -> float:
        return sum(count * load.us_at(clock) for load, count in loads)

    clock = power.clock_under_cap(joules, us_at)
    us = us_at(clock)
    return us, power.joules_at(joules, clock) + power.base.static_w * us * 1e-6, clock


def loads_of(costs: CostModel, point: Point) -> list[Load]:
    """The point's kernel on all SMs (copy engines: on none), by every variant of the profile."""
    power, num_sms = costs.power, costs.hardware.num_sms if point.num_sms else 0
    assert power is not None
    assert costs.profile is not None
    op, mix = op_of_shape(cast(OpKind, point.kind), point.shape, 2), rows_of(point)
    rows = [row for row in costs.profile.usable_rows if row.point.num_sms == num_sms]
    variants = {row.point.variant for row in rows if row.point.kind == point.kind}
    variants = variants if num_sms else {point.variant}
    return [
        power.load(op, mix, num_sms, name, costs.estimate(op, mix, num_sms, name).us)
        for name in sorted(variants)
    ]


def gain(costs: CostModel, pair: PairRow) -> Gain:
    """What a pair gains, in one microsecond of both being busy."""
    together: list[float] = []
    for point, slowdown in ((pair.a, pair.slowdown_a), (pair.b, pair.slowdown_b)):
        op = op_of_shape(cast(OpKind, point.kind), point.shape, 2)
        alone = costs.estimate(op, rows_of(point), point.num_sms, point.variant)
        together.append(1 / (alone.us * slowdown))
    first, second = loads_of(costs, pair.a), loads_of(costs, pair.b)
    us, joules, clock = min(
        in_a_row(costs, ((a, together[0]), (b, together[1]))) for a in first for b in second
    )
    assert costs.power is not None
    return Gain(
        pair=pair,
        watts=joules / us * 1e6,
        sm_clock_mhz=clock * costs.power.max_clock_mhz,
        time_gain=us,
        joules_gain=joules / (pair.watts * 1e-6),
    )


def table(gains: Sequence[Gain]) -> list[str]:
    """Markdown: by kinds, how many, gains in time and in joules."""
    lines = [
        "| side by side | pairs | SMs of the first | time gain | median | joules gain | median |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kinds in sorted({g.kinds for g in gains}):
        mine = [g for g in gains if g.kinds == kinds]
        times, joules = [g.time_gain for g in mine], [g.joules_gain for g in mine]
        shares = [g.pair.a.num_sms for g in mine]
        lines.append(
            f"| {kinds[0]} + {kinds[1]} | {len(mine)} | {min(shares)} to {max(shares)} "
            f"| {min(times):.2f} to {max(times):.2f} | {median(times):.2f} "
            f"| {min(joules):.2f} to {max(joules):.2f} | {median(joules):.2f} |"
        )
    return lines


def main() -> None:
    """Print the table, write every pair."""
    parser = argparse.ArgumentParser(prog="benchmarks/pair_gains.py", description=__doc__)
    parser.add_argument("--profile", type=Path, default=PROFILES)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--out", type=Path, default=Path("results/pair_gains.csv"))
    parser.add_argument("--commit", default="", help="of the source; default: git's")
    options = parser.parse_args()
    profile = load_profile(profile_files(options.profile))
    costs = CostModel(profile, load_hardware(options.gpu))
    gains = [gain(costs, pair) for pair in profile.pairs if pair.watts > 0]
    gains.sort(key=lambda g: (g.kinds, -g.time_gain))
    print("\n".join(table(gains)))
    with options.out.open("w", encoding="utf-8", newline="") as file:
        command = recorded_command("pair_gains", [])
        file.write(
            f"# {command}\n# commit {options.commit or this_commit()}; in a row: predicted\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(g.cells() for g in gains)


if __name__ == "__main__":
    main()
