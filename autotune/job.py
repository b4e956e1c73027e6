"""From what the command line asks for to what is tuned: specs, GPUs, batch, profile, folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from ..profiler.profile import Profile
from ..profiler.rank_jobs import IterationCase
from ..profiler.store import load_profile, profile_files, shipped_profile
from ..runtime.host_planned import HOST_PLANNED
from ..runtime.op_graph import OpGraph
from ..search_spaces.loader import (
    content_hash,
    known,
    load_hardware,
    load_model,
    load_space,
    load_workload,
)
from ..search_spaces.schema import (
    DTYPE_BYTES,
    Dtype,
    HardwareSpec,
    ModelSpec,
    SearchSpace,
    WorkloadSpec,
)
from .capacity import DenseBatch, dense_batch, num_gpus_default
from .gpu_stage import Devices, GpuStage, find_devices, find_stage, why_not
from .study_storage import without_password

Effort = Literal["quick", "full"]
DEFAULT_GPU = "h200"
PROFILE_FOLDER = Path("nanoflow-out/profiles")
OPTIONAL_LIBRARIES = {"flashinfer": ("flashinfer", "tvm_ffi")}
"""Libraries that need not be installed: how names of their variants start, and their modules."""


class ProfileMissingError(ValueError):
    """No profile of the asked GPU is at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What the command line asks for; None means: decide."""

    model: str
    gpu: str | None = None
    num_gpus: int | None = None
    workload: str = "512/512"
    profile: str = "auto"
    """`auto`, `shipped`, `roofline`, or the path of a profile."""
    output_dir: Path | None = None
    effort: Effort = "quick"
    seed: int = 0
    buckets: tuple[int, ...] | None = None
    """Dense-batch sizes of the plan book; None: those of the effort, empty: no book."""
    command: str = ""
    """What was called, for the header of new profiles."""
    is_search_only: bool = False
    """Leave out verification and pictures."""
    allows_host_planned: bool = False
    """Plans may name attention kernels that plan on the host, which the engine replaces."""
    storage: str | None = None
    """Of the Optuna studies, to share them with other workers; None: in the output folder."""
    is_resumed: bool = False
    """There must be an interrupted run to go on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The options, resolved."""

    model: ModelSpec
    hardware: HardwareSpec
    workload: WorkloadSpec
    space: SearchSpace
    num_gpus: int
    batch: DenseBatch
    graph: OpGraph
    stage: GpuStage | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileChoice:
    """A profile (None: roofline) and what to call it."""

    profile: Profile | None
    title: str
    lacking: tuple[str, ...] = ()
    """How names of variants start that no plan may name."""

    @property
    def kernels(self) -> str:
        """Which kernels plans choose from, in words."""
        if not self.lacking:
            return "all variants of the profile"
        return f"the profile's variants, without those of {', '.join(self.lacking)}"


def resolve(options: TuneOptions, say: Callable[[str], None]) -> Job:
    """Specs, number of GPUs, batch and GPU stage of the options.

    Args:
        options: what to tune.
        say: the stage's progress goes here.

    Raises:
        ValueError: unknown names, a model that does not fit, GPUs that cannot share it.
    """
    devices = find_devices()
    model = load_model(options.model)
    hardware = load_hardware(options.gpu or hardware_of(devices))
    workload, space = load_workload(options.workload), load_space(options.effort)
    num_gpus = options.num_gpus or num_gpus_default(model, hardware)
    batch = dense_batch(model, hardware, workload, space, num_gpus)
    case = IterationCase(
        model=model, hardware=hardware, tp_degree=num_gpus, mix=batch.mix, seed=options.seed
    )
    stage = find_stage(devices, case, command=without_password(options.command), say=say)
    reasons = _reasons(options, batch, space, num_gpus)
    return Job(
        model=model,
        hardware=hardware,
        workload=workload,
        space=space,
        num_gpus=num_gpus,
        batch=batch,
        graph=OpGraph.build(model, num_gpus),
        stage=stage,
        reasons=(*reasons, *filter(None, [why_not(devices, hardware, num_gpus)])),
    )


def hardware_of(devices: Devices) -> str:
    """The spec of the GPU in this machine, the default one where none is known."""
    for name in known("hardware"):
        if devices.name and load_hardware(name).device_name == devices.name:
            return name
    return DEFAULT_GPU


def _reasons(
    options: TuneOptions, batch: DenseBatch, space: SearchSpace, num_gpus: int
) -> tuple[str, ...]:
    reasons: list[str] = []
    if options.num_gpus is None:
        noun = "GPU is" if num_gpus == 1 else "GPUs are"
        reasons.append(
            f"{num_gpus} {noun} the smallest power of two that holds the weights and leaves a "
            "third of the memory for KV."
        )
    if batch.tokens < max(space.dense_batch_tokens):
        reasons.append(
            f"{batch.tokens} tokens is the largest batch whose KV cache fits: "
            f"{batch.memory.kv_bytes / 1e9:.1f} GB of the {batch.memory.room_bytes / 1e9:.1f} GB "
            "beside weights and activations."
        )
    return tuple(reasons)


def choose_profile(options: TuneOptions, job: Job) -> ProfileChoice:
    """The profile that the options mean, and the kernels that may be chosen from it.

    Those that plan on the host are left out unless the options allow them: the engine would
    replace them, as no CUDA graph holds them, and serve another schedule than was tuned. On a GPU
    host those of libraries that are not installed are left out in any case.

    Raises:
        ProfileMissingError: none is shipped for this GPU.
        ValueError: the file is damaged, or of another GPU.
    """
    chosen = _of_its_width(_choose_profile(options, job), options, job)
    lacking = () if options.allows_host_planned else HOST_PLANNED
    if job.stage is not None:
        missing = (
            name
            for name, modules in OPTIONAL_LIBRARIES.items()
            if any(importlib.util.find_spec(module) is None for module in modules)
        )
        lacking = tuple(dict.fromkeys((*lacking, *missing)))
    return replace(chosen, lacking=lacking)


def _of_its_width(chosen: ProfileChoice, options: TuneOptions, job: Job) -> ProfileChoice:
    """The profile if its elements are as wide as the model's; else the datasheet for a shipped one.

    Raises:
        ValueError: a given profile is of another width.
    """
    profile, dtype = chosen.profile, job.model.torch_dtype
    if profile is None or DTYPE_BYTES[cast(Dtype, profile.dtype)] == DTYPE_BYTES[dtype]:
        return chosen
    if options.profile not in ("auto", "shipped"):
        raise ValueError(
            f"the profile {options.profile} is of {profile.dtype}, but {job.model.name} is "
            f"{dtype}: measure one with `nanoflow-tune profile --model {options.model}`, or go on "
            "with datasheet figures: --profile roofline"
        )
    title = (
        f"the {job.hardware.name} datasheet (roofline): the profile is of {profile.dtype}, the "
        f"model of {dtype}"
    )
    return ProfileChoice(profile=None, title=title)


def _choose_profile(options: TuneOptions, job: Job) -> ProfileChoice:
    hardware = job.hardware
    if options.profile == "roofline":
        return ProfileChoice(profile=None, title=f"the {hardware.name} datasheet (roofline)")
    if options.profile not in ("auto", "shipped"):
        return _profile_from(Path(options.profile), hardware)
    if options.profile == "auto" and job.stage is not None:
        path = profile_path(job)
        profile = job.stage.profile(path)
        origin = "a profile measured here" if path.exists() else "the shipped profile of this GPU"
        return ProfileChoice(profile=profile, title=f"{origin}{_dated(profile)}")
    profile = shipped_profile(hardware.name)
    if profile is None:
        raise ProfileMissingError(
            f"a prediction needs a measured profile, but none is shipped for {hardware.name!r}; "
            f"run `nanoflow-tune profile --model {options.model} --gpu {hardware.name}` on that "
            "GPU and pass its file with --profile PATH, or go on with datasheet figures: "
            "--profile roofline"
        )
    return ProfileChoice(
        profile=profile, title=f"the shipped {hardware.name} profile{_dated(profile)}"
    )


def _profile_from(path: Path, hardware: HardwareSpec) -> ProfileChoice:
    if not path.exists():
        raise ProfileMissingError(
            "--profile must be auto, shipped, roofline or the path of a profile, but "
            f"{str(path)!r} does not exist; check the path"
        )
    profile = load_profile(profile_files(path))
    if profile.hardware != hardware.name:
        raise ProfileMissingError(
            f"a profile must be of the GPU that is planned for, but {path} is of "
            f"{profile.hardware!r} and --gpu is {hardware.name!r}; change one of them"
        )
    most = max((row.point.num_sms for row in profile.rows), default=0)
    if most > hardware.num_sms:
        raise ValueError(
            f"rows of a profile must fit on the GPU, but {path} has one on {most} SMs and "
            f"{hardware.name} has {hardware.num_sms}; delete it, or name the right --gpu"
        )
    return ProfileChoice(profile=profile, title=f"the profile {path.name}{_dated(profile)}")


def _dated(profile: Profile) -> str:
    facts = [profile.header[key] for key in ("gpu", "date") if key in profile.header]
    return f" ({', '.join(facts)})" if facts else ""


def profile_path(job: Job) -> Path:
    """Where rows measured for a job are kept, beyond the job's own folder."""
    return profile_file(PROFILE_FOLDER, job.hardware.name, job.model.name, job.num_gpus)


def profile_file(folder: Path, hardware: str, model: str, tp_degree: int) -> Path:
    """Name of the profile file of a model's shard; a slash in a name leads into no other folder."""
    return folder / hardware.replace("/", "-") / f"{model.replace('/', '-')}-tp{tp_degree}.csv"


def input_hashes(job: Job, profile: Profile | None) -> dict[str, str]:
    """Content hashes of everything that a plan is made from."""
    hashes = {
        "model": content_hash(job.model),
        "hardware": content_hash(job.hardware),
        "workload": content_hash(job.workload),
        "space": content_hash(job.space),
    }
    return hashes if profile is None else {**hashes, "profile": content_hash(profile)}


def default_folder(job: Job) -> Path:
    """Where a job writes unless told: one folder for each model, GPU, workload and TP degree."""
    name = f"{job.model.name}-{job.hardware.name}-{job.workload.name}-tp{job.num_gpus}"
    return Path("nanoflow-out") / name.replace("/", "-")
