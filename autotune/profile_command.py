"""The verb `profile`: measure several models in one run, or check a profile against this card.

    nanoflow-tune profile --models llama3-8b@1,llama2-70b@2+1+4+8 --minutes 10
    nanoflow-tune profile --calibrate
    nanoflow-tune profile --errors --profile results/profiles/h200

Compute shapes of any tensor-parallel degree need one GPU; collectives are measured for the degree
that equals `--num-gpus`. No torch here: ranks measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..profiler import rank_jobs
from ..profiler.calibration import compare, spread_rows
from ..profiler.profile import Profile
from ..profiler.rank_jobs import ProfileJob, ProfileRun
from ..profiler.store import load_profile, profile_files, shipped_files
from ..runtime.launch import RankGroup
from ..search_spaces.loader import load_hardware, load_model
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .capacity import allowed_num_gpus, num_gpus_default
from .gpu_stage import find_devices
from .interference_error import write_section
from .job import PROFILE_FOLDER, ProfileMissingError, hardware_of, profile_file
from .provenance import commit

RANK_TIMEOUT_S = 3600.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A model at one tensor-parallel degree."""

    model: ModelSpec
    tp_degree: int


def profile(options: argparse.Namespace, command: str, say: Say) -> dict[str, Any]:
    """Do what the verb's flags ask for; returns the values of the JSON line.

    Raises:
        ValueError: no GPU of the asked kind, flags that do not go together, bad names.
    """
    if options.calibrate:
        return _calibrate(options, say)
    if options.errors:
        return _errors(options)
    names: tuple[str, ...] = options.models or ((options.model,) if options.model else ())
    if not names:
        raise ValueError(
            "profile needs --model or --models (or --calibrate, or --errors); "
            "`nanoflow-tune models` lists what is shipped"
        )
    hardware = _hardware(options)
    shards = shards_of(names, options.tp, options.num_gpus, hardware)
    num_ranks = options.num_gpus
    if num_ranks is None:
        degrees = [shard.tp_degree for shard in shards]
        num_ranks = 1 if options.tp or len(degrees) > 1 else max(degrees)
    _check_devices(hardware, num_ranks)
    folder = options.output_dir or PROFILE_FOLDER
    jobs = tuple(
        ProfileJob(
            model=shard.model,
            hardware=hardware,
            tp_degree=shard.tp_degree,
            path=profile_file(folder, hardware.name, shard.model.name, shard.tp_degree).absolute(),
            known=(),
            commit=options.commit or commit(),
            command=command,
        )
        for shard in shards
    )
    order = ProfileRun(jobs=jobs, minutes=options.minutes, parts=options.parts)
    with RankGroup(num_ranks, device="cuda", timeout_s=RANK_TIMEOUT_S) as ranks:
        for notes in ranks.call(rank_jobs.look_around):
            for note in notes:
                say(note)
        ranks.call(rank_jobs.run_profile, order)
    paths = [job.path for job in jobs if job.path.exists()]
    found = load_profile(paths)
    return {
        "profile": str(folder / hardware.name),
        "hardware": hardware.name,
        "models": [f"{shard.model.name}-tp{shard.tp_degree}" for shard in shards],
        "rows": len(found.usable_rows),
        "failed": len(found.rows) - len(found.usable_rows),
        "joules": sum(row.has_measured_joules for row in found.rows),
        "pairs": len(found.pairs),
        "triples": len(found.triples),
    }


def shards_of(
    names: Sequence[str], tp: Sequence[int], num_gpus: int | None, hardware: HardwareSpec
) -> tuple[Shard, ...]:
    """Models and degrees of `NAME` or `NAME@1+2+4`, in the order given.

    Args:
        names: models, each with its own degrees or without.
        tp: degrees of names without; empty: `num_gpus`, failing that the smallest that fits.
        num_gpus: ranks of the run, if given.
        hardware: the GPU.

    Raises:
        ValueError: a degree that is no number, or that cannot share the model.
    """
    found: dict[tuple[str, int], Shard] = {}
    for name in names:
        base, _, own = name.partition("@")
        model = load_model(base)
        try:
            degrees = [int(part) for part in own.split("+")] if own else list(tp)
        except ValueError as err:
            raise ValueError(
                f"degrees of a model must read NAME@1+2+4, but got {name!r}; correct --models"
            ) from err
        if not degrees:
            degrees = [num_gpus or num_gpus_default(model, hardware)]
        allowed = allowed_num_gpus(model, hardware)
        for degree in degrees:
            if degree not in allowed:
                raise ValueError(
                    f"a tensor-parallel degree must be one of {', '.join(map(str, allowed))} for "
                    f"{model.name} on {hardware.name}, but got {degree}; correct --models or --tp"
                )
            found.setdefault((model.name, degree), Shard(model=model, tp_degree=degree))
    return tuple(found.values())


def _hardware(options: argparse.Namespace) -> HardwareSpec:
    return load_hardware(options.gpu or hardware_of(find_devices()))


def _check_devices(hardware: HardwareSpec, count: int) -> None:
    devices = find_devices()
    if devices.name != hardware.device_name or devices.count < count:
        raise ValueError(
            f"profiling needs {count} x {hardware.device_name} in this machine, but "
            f"{f'{devices.count} x {devices.name}' if devices.count else 'no GPU'} was found; run "
            "it there, or tune from the shipped profile with --profile shipped"
        )


def _loaded(options: argparse.Namespace, hardware: HardwareSpec) -> tuple[Profile, Path]:
    """The profile that `--profile` names, and the folder it is in."""
    if options.profile in ("auto", "shipped"):
        files = shipped_files(hardware.name)
    else:
        files = profile_files(Path(options.profile))
    if not files:
        raise ProfileMissingError(
            f"--profile must be shipped or the path of a profile, but there is none of "
            f"{hardware.name!r} at {options.profile!r}; pass its file or folder"
        )
    return load_profile(files), files[0].parent


def _calibrate(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    hardware = _hardware(options)
    _check_devices(hardware, 1)
    profile, folder = _loaded(options, hardware)
    with RankGroup(1, device="cuda", timeout_s=RANK_TIMEOUT_S) as ranks:
        variants = ranks.call(rank_jobs.variants_here)[0]
        here = [r for r in profile.rows if r.point.variant in variants.get(r.point.kind, ())]
        rows = spread_rows(here)
        say(f"measuring {len(rows)} of {len(profile.usable_rows)} rows again")
        points = [row.point for row in rows]
        result = compare(rows, ranks.call(rank_jobs.measure_again, hardware, points)[0])
    worst, ratio = result.worst
    return {
        "profile": str(folder),
        "fits": result.fits,
        "rows": len(rows),
        "median_ratio": round(result.median, 4),
        "worst_ratio": round(ratio, 4),
        "worst": f"{worst.kind} {worst.shape} {worst.variant}, {worst.tokens} tokens, "
        f"{worst.num_sms} SMs",
        "scale_by_kind": {kind: round(s, 4) for kind, s in result.scale_by_kind.items()},
        "failed": [f"{point.kind} {point.variant}: {err}" for point, err in result.failed.items()],
    }


def _errors(options: argparse.Namespace) -> dict[str, Any]:
    hardware = _hardware(options)
    profile, folder = _loaded(options, hardware)
    return write_section(folder / "README.md", profile, hardware)
