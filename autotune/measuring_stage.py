"""The GPU stage: ranks on this machine's GPUs that profile, measure and verify.

The ranks start at the first request and stay until `close`. The parent holds no GPU memory and
imports no torch; a CUDA error or a hang ends with the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..profiler import rank_jobs
from ..profiler.profile import Profile
from ..profiler.rank_jobs import IterationCase, OpTime, ProfileJob, ProfileRun
from ..profiler.store import load_profile, shipped_files
from ..runtime.gpu_failures import GpuFailureError
from ..runtime.launch import RankError, RankGroup, ResultT
from ..runtime.plan import Plan, Schedule, Timing
from ..runtime.verify import verify_plan
from ..search_spaces.schema import ModelSpec

RANK_TIMEOUT_S = 3600.0
PROFILE_MINUTES = 5.0
"""Time to profile a model that is tuned on a GPU whose profile does not hold it."""


class MeasuringStage:
    """Profiles, measures and verifies one case on `tp_degree` GPUs of this machine."""

    def __init__(
        self,
        case: IterationCase,
        device_name: str,
        commit: str,
        command: str,
        say: Callable[[str], None],
    ) -> None:
        """Describe the stage; nothing runs yet.

        Args:
            case: model, GPUs, batch.
            device_name: what the driver calls the GPU: rows of files measured on the same GPU
                are taken over.
            commit: of the source, for the profile's header.
            command: that was given, for the profile's header.
            say: progress, one line at a time.
        """
        self._case, self._device_name = case, device_name
        self._commit, self._command, self._say = commit, command, say
        self._ranks: RankGroup | None = None

    def _running(self) -> RankGroup:
        if self._ranks is None:
            ranks = RankGroup(self._case.tp_degree, device="cuda", timeout_s=RANK_TIMEOUT_S)
            self._ranks = ranks.__enter__()
            self._ranks.call(rank_jobs.remember_case, self._case)
            for notes in self._ranks.call(rank_jobs.look_around):
                for note in notes:
                    self._say(note)
        return self._ranks

    def _call(self, fn: Callable[..., ResultT], *args: object) -> list[ResultT]:
        """Of the running ranks; after a failure the next call starts new ones.

        Ranks that ran out of memory still hold much of it, and others may wait for them.
        """
        try:
            return self._running().call(fn, *args)
        except (GpuFailureError, RankError):
            self.close()
            raise

    def profile(self, path: Path, *, take_shipped: bool = True) -> Profile:
        """Measure what neither `path` nor the shipped profile of this GPU holds.

        Args:
            path: `NAME.csv` for new rows.
            take_shipped: count the shipped rows of the same GPU as measured.
        """
        case = self._case
        shipped = shipped_files(case.hardware.name, self._device_name) if take_shipped else []
        job = ProfileJob(
            model=case.model,
            hardware=case.hardware,
            tp_degree=case.tp_degree,
            path=path.absolute(),
            known=tuple(shipped),
            commit=self._commit,
            command=self._command,
        )
        order = ProfileRun(jobs=(job,), minutes=PROFILE_MINUTES)
        missing = self._call(rank_jobs.num_missing, order)[0]
        if missing:
            self._say(
                f"{missing} coarse points to measure, then what is left of {order.minutes:g} min"
            )
            self._call(rank_jobs.run_profile, order)
        else:
            self._say("every curve was measured before on this kind of GPU: nothing to do")
        return load_profile([*shipped, *([path] if path.exists() else [])])

    def measure(
        self, schedules: Sequence[Schedule], *, rounds: int = 2, turn_s: float = 0.6
    ) -> list[Timing]:
        """Time whole iterations in interleaved turns, on all GPUs at once.

        Returns:
            One timing per schedule: times of rank 0, joules of all GPUs, mean watts and clocks.
        """
        by_rank = self._call(
            rank_jobs.measure_schedules, self._case, tuple(schedules), rounds, turn_s
        )
        return [_over_ranks(timings) for timings in zip(*by_rank, strict=True)]

    def timelines(self, schedules: Sequence[Schedule], *, runs: int = 9) -> list[list[OpTime]]:
        """When each nano-op of each schedule ran on rank 0, medians over eager runs."""
        by_rank = self._call(rank_jobs.measure_timelines, self._case, tuple(schedules), runs)
        return by_rank[0]

    def verify(self, plan: Plan, model: ModelSpec, seed: int) -> Plan:
        """The plan with a record of each schedule, run at real widths on its partitions."""
        self._call(rank_jobs.release_memory)
        return verify_plan(
            plan,
            model,
            self._case.hardware,
            self._running(),
            make_resources=rank_jobs.resources_for,
            seed=seed,
        )

    def close(self) -> None:
        """End the ranks and give the GPUs back."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def _over_ranks(timings: Sequence[Timing]) -> Timing:
    count = len(timings)
    return replace(
        timings[0],
        joules=sum(timing.joules for timing in timings),
        watts=sum(timing.watts for timing in timings) / count,
        sm_clock_mhz=sum(timing.sm_clock_mhz for timing in timings) / count,
    )
