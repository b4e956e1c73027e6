"""Measures points on this rank's GPU: partitions, cases, timer, energy.

Kernels alone, collectives in step with the other ranks, two or three kernels side by side. What is
measured, and in which order, `profile_run.py` decides. A failing point becomes a row with its
error.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import isnan
from typing import Any

import torch

from ..runtime.gpu_failures import explained, release
from ..runtime.partition_layout import GroupRange, Slot, SmSplit
from ..runtime.sm_partition import SmPartitions
from ..search_spaces.schema import HardwareSpec
from .cases import CaseFactory
from .compile_ahead import compile_tiles, point_tiles
from .energy import point_costs
from .interference import Together
from .power import PowerMeter
from .profile import PairRow, Point, Row, TripleRow
from .timing import BATCH_MS, Batch, InTurn, Joules, Samples, Timer
from .timing import Together as Side

FRONT, BACK = "front", "back"
COOLED_MS = 150.0
"""GEMMs that warm a card again after the host worked."""
SUSTAIN_WARM_S, SUSTAIN_SAMPLE_S = 1.5, 1.5
SUSTAINED_VARIANTS = 2
"""Fastest GEMMs of a burst whose sustained rate is measured."""
JOULE_S, JOULE_WARM_S, ALONE_S, TOGETHER_S = 0.32, 0.06, 0.04, 0.4
"""The energy counter advances every 20 to 100 ms: two updates and more in `JOULE_S`. Its warm-up
comes behind the samples of the same kernel, 18 ms and more."""
IN_TURN_S, IN_TURN_WARM_S, CALLS_IN_TURN = 2.0, 1.0, 8


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


def _as_they_are(counts: list[int]) -> list[int]:
    return counts


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
        self._owner = SmPartitions(hardware.num_sms, hardware.sm_granularity)
        slots = share_slots(hardware.num_sms, self._owner.split)
        self._partitions = self._owner.view(slots)
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

        Rows take 12 ms, shorter than the card takes to enforce its power cap; what a server can
        keep up is this figure.
        """
        best, entries = 0.0, dict[str, str]()
        rows = [
            row for row in (self.measure(p, with_joules=False) for p in points) if not row.error
        ]
        rows.sort(key=lambda row: row.median_us)
        for row in rows[:SUSTAINED_VARIANTS]:
            point = row.point
            batch = self.timer.batch(self._cases.calls(point), self.stream(point.num_sms))
            samples = self.timer.sustain(batch, row.median_us, SUSTAIN_WARM_S, SUSTAIN_SAMPLE_S)
            flops, _, _ = point_costs(point)
            rate = flops / (samples.median_us * 1e-6)
            if rate > best:
                best = rate
                entries = {
                    "sustained_gemm_flops_per_s": f"{rate:.4e}",
                    "sustained_gemm": f"{point.variant}, {point.tokens} x {point.shape}, "
                    f"{self.meter.watts:.0f} W, {samples.sm_clock_mhz:.0f} MHz; burst "
                    f"{flops / (row.median_us * 1e-6):.4e}",
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
            "regime": "heated between points, random normal data, 12 ms a point; joules, their "
            f"watts and clocks over {JOULE_S} s",
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

    def compile(self, points: Iterable[Point]) -> Point | None:
        """Call each (kind, shape, variant) once, so that no compiler runs between samples.

        Failures come again, as rows, when the points are measured.

        Returns:
            The point whose kernel took the CUDA context with it; nothing can run after it.
        """
        seen: set[tuple[str, str, str]] = set()
        for point in points:
            key = (point.kind, point.shape, point.variant)
            if key not in seen:
                seen.add(key)
                stream = self.stream(point.num_sms)
                with suppress(RuntimeError, ValueError), torch.cuda.stream(stream):
                    self._cases.calls(point, self._groups)[0]()
                if self.has_lost_context():
                    return point
        return None

    def compile_ahead(self, points: Iterable[Point]) -> int:
        """Compile the fitted GEMMs of points on all cores, then heat the card, which cooled.

        Each share and number of rows has its own tile, which takes a third of a second alone.
        """
        count = compile_tiles(point_tiles(points))
        self.timer.heat(COOLED_MS)
        return count

    def measure(self, point: Point, with_joules: bool) -> Row:
        """Time one point alone on its share; errors become a row."""
        try:
            calls = self._cases.calls(point, self._groups)
            batch = self.timer.batch(calls, self.stream(point.num_sms))
            samples = self.timer.sample(batch)
            joules = None
            if with_joules:
                joules = self.timer.joules_per_call(batch, samples.median_us, JOULE_S, JOULE_WARM_S)
        except (RuntimeError, ValueError) as err:
            what = f"{point.kind} {point.shape} {point.variant} on {point.tokens} tokens"
            told = explained(err, what, "end what else runs on the GPU, and run it again")
            row = failed_row(point, _first_line(told))
            if told is not err:
                release(err)
            return row
        return _row(point, samples, joules)

    def has_lost_context(self) -> bool:
        """Whether a kernel took the CUDA context with it: then every later call fails."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def measure_collective(self, point: Point, calls_per_batch: int = 20) -> Row:
        """Time one collective on all ranks at once; counts are fixed so that ranks agree.

        What a variant refuses, it refuses on all ranks: that becomes a row. Other errors end the
        run, because the ranks may have parted.
        """
        try:
            return self._collective_row(point, calls_per_batch)
        except ValueError as err:
            return failed_row(point, _first_line(err))

    def _collective_row(self, point: Point, calls_per_batch: int) -> Row:
        calls = self._cases.calls(point, self._groups)
        stream = self.stream(point.num_sms)
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.synchronize()
        self.timer.heat(10.0)
        batch = Batch(calls, stream, calls_per_batch)
        samples = self.timer.sample_fixed(batch, warm=2, count=12)
        return _row(point, samples)

    def measure_collective_joules(
        self, point: Point, agree: Callable[[list[int]], list[int]]
    ) -> Row:
        """Time and joules of one collective on all ranks at once, with counts that all agree on."""
        calls = self._cases.calls(point, self._groups)
        stream = self.stream(point.num_sms)
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.synchronize()
        batch = Batch(calls, stream, 20)
        samples = self.timer.sample_fixed(batch, warm=2, count=12)
        # From here on the count follows from the agreed time alone.
        agreed_us = agree([round(samples.median_us * 1e3)])[0] / 1e3
        joules = self.timer.joules_per_call(batch, agreed_us, JOULE_S, JOULE_WARM_S)
        return _row(point, samples, joules)

    def measure_in_turn(
        self, points: Sequence[Point], agree: Callable[[list[int]], list[int]] = _as_they_are
    ) -> InTurn:
        """Kernels of points round and round, each alone, for seconds at the power cap.

        Joules of single rows are of a card that has not yet settled at its cap, and differ by 8 %
        from run to run; their sum in one run, at the clock that they have together, does not.
        """
        batches: list[Batch] = []
        for point in points:
            calls, stream = self._cases.calls(point, self._groups), self.stream(point.num_sms)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in calls:
                    call()
            torch.cuda.synchronize()
            batches.append(Batch(calls, stream, CALLS_IN_TURN))
        return self.timer.in_turn(batches, IN_TURN_S, IN_TURN_WARM_S, agree)

    def measure_together(
        self, points: Together, agree: Callable[[list[int]], list[int]] = _as_they_are
    ) -> PairRow | TripleRow:
        """Run two or three points side by side for about half a second, each alone before.

        Args:
            points: largest share first; it takes the back of the GPU, the others the front.
            agree: gives all ranks that share a collective the same counts.

        Raises:
            RuntimeError: a kernel failed.
            ValueError: a kernel took so long that none of it ended beside the others.
        """
        streams = self._side_by_side([point.num_sms for point in points])
        batches: list[Batch] = []
        for point, stream in zip(points, streams, strict=True):
            calls = self._cases.calls(point, self._groups)
            stream.wait_stream(torch.cuda.current_stream())
            repeats = self.timer.calls_per_batch(calls, stream, BATCH_MS)
            batches.append(Batch(calls, stream, agree([repeats])[0]))
        once_us = [self.timer.replay_us(batch) for batch in batches]
        counts = agree([max(3, round(ALONE_S * 1e6 / us)) for us in once_us])
        alone_us: list[float] = []
        for batch, count in zip(batches, counts, strict=True):
            samples = self.timer.sample_fixed(batch, warm=count // 3 + 1, count=count)
            alone_us.append(samples.median_us)
        counts = agree(
            [
                max(8, round(TOGETHER_S * 1e6 / (us * batch.num_calls)))
                for us, batch in zip(alone_us, batches, strict=True)
            ]
        )
        together = self.timer.sample_together(batches, counts)
        slowdowns = [
            beside / alone for beside, alone in zip(together.median_us, alone_us, strict=True)
        ]
        return _together_row(points, slowdowns, together)

    def _side_by_side(self, shares: Sequence[int]) -> list[torch.cuda.Stream]:
        """The first share at the back, the others from the front on; no two meet."""
        size = self.hardware.sm_granularity
        if len(shares) == 2:
            return [self.stream(shares[0], BACK), self.stream(shares[1], FRONT)]
        start, streams = 0, [self.stream(shares[0], BACK)]
        for share in shares[1:]:
            groups = GroupRange(start=start // size, end=(start + share) // size)
            streams.append(self._owner.stream_of(groups) if share else self.stream(share))
            start += share
        assert start + shares[0] <= self.hardware.num_sms, shares
        return streams


def _nccl_version() -> str:
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def failed_row(point: Point, error: str) -> Row:
    """The row of a point that could not be measured."""
    return _row(point, None, error=error)


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def _row(
    point: Point, samples: Samples | None, joules: Joules | None = None, error: str = ""
) -> Row:
    """The row of a point; no samples: it failed; no joules, or nan: not measured."""
    has_joules = joules is not None and not isnan(joules.per_call)
    clock = samples.sm_clock_mhz if samples else 0.0
    return Row(
        point=point,
        median_us=samples.median_us if samples else 0.0,
        p10_us=samples.percentile(0.1) if samples else 0.0,
        p90_us=samples.percentile(0.9) if samples else 0.0,
        n=len(samples.times_us) if samples else 0,
        joules=joules.per_call if joules and has_joules else 0.0,
        joules_source="measured" if has_joules else "missing",
        sm_clock_mhz=joules.sm_clock_mhz if joules and has_joules else clock,
        watts=joules.watts if joules and has_joules else 0.0,
        error=error.replace(",", ";"),
    )


def _together_row(
    points: Together, slowdowns: Sequence[float], together: Side
) -> PairRow | TripleRow:
    watts = together.watts if not isnan(together.watts) else 0.0
    if len(points) == 2:
        return PairRow(
            a=points[0],
            b=points[1],
            slowdown_a=slowdowns[0],
            slowdown_b=slowdowns[1],
            watts=watts,
            sm_clock_mhz=together.sm_clock_mhz,
            n=together.n,
        )
    return TripleRow(
        a=points[0],
        b=points[1],
        c=points[2],
        slowdown_a=slowdowns[0],
        slowdown_b=slowdowns[1],
        slowdown_c=slowdowns[2],
        watts=watts,
        sm_clock_mhz=together.sm_clock_mhz,
        n=together.n,
    )
