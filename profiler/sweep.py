"""Measures a grid on this GPU: partitions, cases, timer, energy; every row is written at once.

Runs on every tensor-parallel rank. Solo points are measured by rank 0 alone while the others wait;
collectives by all ranks together. A killed run resumes: points already in the file are skipped. A
failing point becomes a row with its error.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch

from ..runtime.partition_layout import GroupRange, Slot, SmSplit
from ..runtime.sm_partition import SmPartitions
from ..search_spaces.schema import HardwareSpec
from .cases import CaseFactory
from .energy import point_costs
from .grid import Grid
from .power import PowerMeter
from .profile import PairRow, Point, Row
from .store import ProfileWriter
from .timing import Batch, Samples, Timer

FRONT, BACK = "front", "back"
SUSTAIN_WARM_S, SUSTAIN_SAMPLE_S = 1.5, 1.5


def share_slots(num_sms: int, split: SmSplit) -> dict[Slot, GroupRange]:
    """A front partition of every multiple of the granularity, and its complement at the back."""
    slots: dict[Slot, GroupRange] = {}
    for size in range(1, split.num_groups + 1):
        share = size * split.granularity
        if share == num_sms:
            continue
        slots[FRONT, share] = GroupRange(start=0, end=size)
        slots[BACK, num_sms - share] = GroupRange(
            start=size, end=split.num_groups, has_remainder=split.remainder > 0
        )
    return slots


class Sweep:
    """One rank's profiler: owns the timer, the partitions and the operands."""

    def __init__(
        self,
        hardware: HardwareSpec,
        meter: PowerMeter,
        kv_pool_bytes: float,
        groups: Any = None,  # noqa: ANN401
    ) -> None:
        self.hardware = hardware
        self.meter = meter
        self.timer = Timer(meter)
        self._groups = groups
        device = torch.device("cuda", torch.cuda.current_device())
        self._cases = CaseFactory(torch.bfloat16, device, kv_pool_bytes)
        partitions = SmPartitions(hardware.num_sms, hardware.sm_granularity)
        slots = share_slots(hardware.num_sms, partitions.split)
        self._partitions = partitions.view(slots)
        complements = [
            ((FRONT, share), (BACK, hardware.num_sms - share))
            for lane, share in slots
            if lane == FRONT
        ]
        audits = self._partitions.audit(complements)
        self.audit = f"{len(audits)} partitions on exactly the SMs asked for, pairs disjoint"

    def stream(self, num_sms: int, lane: str = "") -> torch.cuda.Stream:
        """The partition of a share; multiples of the granularity sit in front."""
        if num_sms == self.hardware.num_sms:
            return self._partitions.stream("whole", num_sms)
        default = FRONT if num_sms % self.hardware.sm_granularity == 0 else BACK
        return self._partitions.stream(lane or default, num_sms)

    def sustained_gemm(self, points: Iterable[Point]) -> dict[str, str]:
        """The best rate that the card keeps up for seconds on some GEMMs, as header entries.

        Rows take 30 ms, shorter than the card takes to enforce its power cap; what a server can
        keep up is this figure.
        """
        best, entries = 0.0, dict[str, str]()
        for point in points:
            batch = self.timer.batch(self._cases.calls(point), self.stream(point.num_sms))
            burst_us = self.timer.sample(batch).median_us
            samples = self.timer.sustain(batch, burst_us, SUSTAIN_WARM_S, SUSTAIN_SAMPLE_S)
            flops, _, _ = point_costs(point)
            rate = flops / (samples.median_us * 1e-6)
            if rate > best:
                best = rate
                entries = {
                    "sustained_gemm_flops_per_s": f"{rate:.4e}",
                    "sustained_gemm": f"{point.variant}, {point.tokens} x {point.shape}, "
                    f"{self.meter.watts:.0f} W, {samples.sm_clock_mhz:.0f} MHz; burst "
                    f"{flops / (burst_us * 1e-6):.4e}",
                }
        return entries

    def header(
        self, commit: str, command: str, static_w: float, sustained: dict[str, str]
    ) -> dict[str, str]:
        """Provenance of a profile file."""
        import triton

        return {
            "hardware": self.hardware.name,
            "dtype": "bfloat16",
            "gpu": torch.cuda.get_device_name(),
            "driver": self.meter.driver_version,
            "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
            f"triton {triton.__version__}, nccl {_nccl_version()}",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "commit": commit,
            "command": command,
            "static_w": f"{static_w:.1f}",
            "power_cap_w": f"{self.meter.power_cap_w:.0f}",
            "audit": self.audit,
            "regime": "heated between points, random normal data, 30 ms a point",
            **sustained,
        }

    def static_watts(self, seconds: float = 0.6) -> float:
        """Board power with nothing to do but one spinning warp at full clocks."""
        from ..runtime.kernels.sm_probe import spin

        torch.cuda.synchronize()
        spin(seconds / 3)
        torch.cuda.synchronize()
        with self.meter as meter:
            spin(seconds)
            torch.cuda.synchronize()
        return meter.watts

    def compile(self, points: Iterable[Point]) -> None:
        """Call each (kind, shape, variant) once, so that no compiler runs between samples."""
        seen: set[tuple[str, str, str]] = set()
        for point in points:
            key = (point.kind, point.shape, point.variant)
            if key not in seen and point.kind != "all_reduce":
                seen.add(key)
                self.measure(point, with_joules=False)

    def measure(self, point: Point, with_joules: bool) -> Row:
        """Time one point alone on its share; errors become a row."""
        try:
            calls = self._cases.calls(point, self._groups)
            batch = self.timer.batch(calls, self.stream(point.num_sms))
            samples = self.timer.sample(batch)
            joules = self.timer.joules_per_call(batch, samples.median_us) if with_joules else nan
        except (RuntimeError, ValueError) as err:
            torch.cuda.synchronize()
            return _row(point, None, error=str(err).splitlines()[0])
        return _row(point, samples, joules)

    def measure_collective(self, point: Point, calls_per_batch: int = 20) -> Row:
        """Time one all-reduce on all ranks at once; counts are fixed so that ranks agree."""
        calls = self._cases.calls(point, self._groups)
        stream = self.stream(point.num_sms)
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.synchronize()
        self.timer.heat(10.0)
        batch = Batch(calls, stream, calls_per_batch)
        samples = self.timer.sample_fixed(batch, warm=2, count=12)
        return _row(point, samples)

    def measure_pair(self, a: Point, b: Point) -> PairRow:
        """Run A and B side by side for about 0.6 s, each also alone just before."""
        streams = self.stream(a.num_sms, BACK), self.stream(b.num_sms, FRONT)
        batches = [
            self.timer.batch(self._cases.calls(point, self._groups), stream)
            for point, stream in zip((a, b), streams, strict=True)
        ]
        alone = [self.timer.sample(batch).median_us for batch in batches]
        together = self.timer.sample_together(batches[0], batches[1], alone, seconds=0.6)
        return PairRow(
            a=a,
            b=b,
            slowdown_a=together.median_us[0] / alone[0],
            slowdown_b=together.median_us[1] / alone[1],
            watts=together.watts,
            sm_clock_mhz=together.sm_clock_mhz,
            n=together.n,
        )


def _nccl_version() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _row(point: Point, samples: Samples | None, joules: float = nan, error: str = "") -> Row:
    """The row of a point; no samples: it failed; joules nan: not measured, or no counter."""
    has_joules = samples is not None and not isnan(joules)
    median_us = samples.median_us if samples else 0.0
    return Row(
        point=point,
        median_us=median_us,
        p10_us=samples.percentile(0.1) if samples else 0.0,
        p90_us=samples.percentile(0.9) if samples else 0.0,
        n=len(samples.times_us) if samples else 0,
        joules=joules if has_joules else 0.0,
        joules_source="measured" if has_joules else "missing",
        sm_clock_mhz=samples.sm_clock_mhz if samples else 0.0,
        watts=joules / (median_us * 1e-6) if has_joules else 0.0,
        error=error.replace(",", ";"),
    )


def run_sweep(
    sweep: Sweep,
    left: Grid,
    path: Path,
    header: dict[str, str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure the solo and pair points that are left, on this rank alone.

    Args:
        sweep: this rank's profiler.
        left: points to measure.
        path: `NAME.csv`; rows are appended.
        header: of new files.
        on_progress: called with (points done, points in all).
    """
    solo = [point for point in left.solo if point.kind != "all_reduce"]
    total = len(solo) + len(left.pairs)
    with ProfileWriter.solo(path, header) as writer:
        sweep.compile(solo)
        for done, point in enumerate(solo, start=1):
            writer.append(sweep.measure(point, point in left.joule_points))
            on_progress(done, total)
    with ProfileWriter.pairs(path.with_suffix(".pairs.csv"), header) as pair_writer:
        for done, (a, b) in enumerate(left.pairs, start=len(solo) + 1):
            pair_writer.append(sweep.measure_pair(a, b))
            on_progress(done, total)


def run_collectives(
    sweep: Sweep, left: Grid, path: Path, header: dict[str, str], *, rank: int
) -> None:
    """Measure the all-reduces that are left on all ranks in step; rank 0 writes."""
    import torch.distributed as dist

    with ProfileWriter.solo(path, header) if rank == 0 else nullcontext() as writer:
        for point in left.solo:
            if point.kind != "all_reduce":
                continue
            dist.barrier()
            row = sweep.measure_collective(point)
            if writer is not None:
                writer.append(row)
