"""`nanoflow-tune check-env`: what this machine has, and which parts of the tool work on it.

`judge` decides from an `Environment` alone, so that it is tested without a GPU. Nothing is changed:
where a setting is in the way the remedy is said, and left to the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..profiler.environment import Environment, GpuState, read_environment
from ..profiler.store import shipped_files
from ..search_spaces.loader import known, load_hardware
from ..search_spaces.schema import HardwareSpec
from .gpu_stage import MEMORY_TOLERANCE

DEFAULT_GRANULARITY = 8
"""SMs of a group on GPUs without a spec: compute capability 9.0 and later."""
FREE_SHARE = 0.95
"""Less free memory than this part means that somebody else is on the GPU."""
State = Literal["works", "limited", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One part of the tool on this machine."""

    name: str
    state: State
    why: str
    remedy: str = ""
    """What to do about it; empty where all is well."""


def check_env() -> dict[str, Any]:
    """Look at this machine and judge it; the values that `--json` prints."""
    environment = read_environment(DEFAULT_GRANULARITY)
    hardware = spec_of(environment.gpus)
    if hardware is not None and hardware.sm_granularity != DEFAULT_GRANULARITY:
        environment = read_environment(hardware.sm_granularity)
    capabilities = judge(environment, hardware)
    return {
        "summary": summary(environment, hardware, capabilities),
        "hardware": hardware.name if hardware else None,
        "environment": asdict(environment),
        "capabilities": [asdict(capability) for capability in capabilities],
    }


def spec_of(gpus: Sequence[GpuState]) -> HardwareSpec | None:
    """The shipped spec of the first GPU."""
    for name in known("hardware"):
        spec = load_hardware(name)
        if gpus and spec.device_name == gpus[0].name:
            return spec
    return None


def summary(
    environment: Environment, hardware: HardwareSpec | None, capabilities: Sequence[Capability]
) -> str:
    """One sentence: what this machine does with a plan."""
    gpus = environment.gpus
    if not gpus:
        why = "" if environment.has_driver else " and no NVIDIA driver"
        return (
            f"No GPU{why} here: plans are predicted from shipped profiles, and verified scaled "
            "down on the CPU."
        )
    what = f"{len(gpus)} x {gpus[0].name}"
    broken = [held.name for held in capabilities if held.state == "missing" and held.remedy]
    measure = next(held for held in capabilities if held.name == "measure")
    if measure.state == "missing":
        return f"{what}, but plans cannot be measured here: {measure.why}."
    text = f"{what}: plans for {hardware.name if hardware else '?'} are measured here"
    return f"{text}; missing: {', '.join(broken)}." if broken else f"{text}."


def judge(environment: Environment, hardware: HardwareSpec | None) -> tuple[Capability, ...]:
    """What works, what works with limits, and what does not, with the remedy.

    Args:
        environment: of the machine.
        hardware: spec of its first GPU; None without a GPU or a spec.
    """
    return (
        _predict(environment),
        _verify(environment),
        _measure(environment, hardware),
        _partitions(environment, hardware),
        _quiet(environment, hardware),
        _joules(environment),
        _tensor_parallel(environment),
        _cuda_kernels(environment),
        _flashinfer(environment),
        _serve(environment),
    )


def _absent(environment: Environment, *names: str) -> list[str]:
    return [name for name in names if not environment.libraries.get(name)]


def _predict(environment: Environment) -> Capability:
    absent = _absent(environment, "optuna", "pulp", "highspy", "matplotlib")
    if absent:
        return Capability(
            name="predict",
            state="missing",
            why=f"{', '.join(absent)} not installed",
            remedy="pip install nanoflow-tune again, with its dependencies",
        )
    shipped = [name for name in known("hardware") if shipped_files(name)]
    return Capability(
        name="predict",
        state="works",
        why=f"profiles are shipped for {', '.join(shipped)}; other GPUs by --profile roofline",
    )


def _verify(environment: Environment) -> Capability:
    torch = environment.libraries.get("torch")
    if not torch:
        return Capability(
            name="verify",
            state="missing",
            why="torch is not installed",
            remedy="pip install torch",
        )
    where = "on the GPU" if environment.gpus else "scaled down on the CPU"
    return Capability(name="verify", state="works", why=f"torch {torch}, {where}")


def _measure(environment: Environment, hardware: HardwareSpec | None) -> Capability:
    gpu_extra = "pip install 'nanoflow-tune[gpu]'"

    def no(why: str, remedy: str = "") -> Capability:
        return Capability(name="measure", state="missing", why=why, remedy=remedy)

    if not environment.has_driver:
        return no("no NVIDIA driver is loaded")
    if _absent(environment, "nvidia-ml-py"):
        return no("nvidia-ml-py is not installed, so no GPU is looked for", gpu_extra)
    if not environment.gpus:
        notes = "; ".join(environment.notes)
        return no(notes or "the driver lists no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if _absent(environment, "cuda-bindings"):
        return no("cuda-bindings is not installed: no SM partitions", gpu_extra)
    torch = environment.libraries.get("torch") or ""
    if not torch or torch.endswith("+cpu"):
        return no(
            f"torch {torch or 'is not installed'}: not a CUDA build",
            "install PyTorch's CUDA build that fits the driver",
        )
    if _absent(environment, "triton"):
        return no("triton is not installed", "install PyTorch's CUDA build, which brings it")
    gpu = environment.gpus[0]
    if hardware is None:
        return no(
            f"no spec is shipped for {gpu.name}",
            "write a YAML like those in search_spaces/hardware and pass it with --gpu",
        )
    if abs(gpu.memory_bytes / hardware.memory_bytes - 1) > MEMORY_TOLERANCE:
        return no(
            f"the card has {gpu.memory_bytes / 1e9:.0f} GB, its spec "
            f"{hardware.memory_bytes / 1e9:.0f} GB",
            "pass a YAML with the card's size with --gpu",
        )
    return Capability(
        name="measure",
        state="works",
        why=f"driver {environment.driver_version}, CUDA {environment.cuda_driver_version}, "
        f"torch {torch}, triton {environment.libraries.get('triton')}",
    )


def _partitions(environment: Environment, hardware: HardwareSpec | None) -> Capability:
    name = "SM partitions"
    if any(gpu.is_mig for gpu in environment.gpus):
        return Capability(
            name=name,
            state="missing",
            why="a GPU is in MIG mode, where SMs cannot be partitioned further",
            remedy="ask whoever runs the machine for a GPU without MIG",
        )
    split, num_sms = environment.sm_split, environment.num_sms
    if split is None or num_sms is None:
        why = "; ".join(environment.notes) if environment.gpus else "no GPU"
        return Capability(
            name=name,
            state="missing",
            why=why or "the driver was not asked (cuda-bindings is missing)",
            remedy="driver 550 or later and cuda-bindings 12.8 or later"
            if environment.gpus
            else "",
        )
    text = f"{num_sms} SMs in {split.num_groups} groups of {split.granularity}"
    text += f" and {split.remainder} left over" if split.remainder else ""
    if hardware is not None and num_sms != hardware.num_sms:
        return Capability(
            name=name,
            state="limited",
            why=f"{text}, but the spec {hardware.name} says {hardware.num_sms} SMs",
            remedy="pass a YAML with the card's SM count with --gpu",
        )
    return Capability(name=name, state="works", why=text)


def _quiet(environment: Environment, hardware: HardwareSpec | None) -> Capability:
    """Whether measurements would be those of an undisturbed card."""
    name = "quiet GPU"
    if not environment.gpus:
        return Capability(name=name, state="missing", why="no GPU")
    trouble: list[str] = []
    for gpu in environment.gpus:
        if gpu.other_processes:
            trouble.append(f"GPU {gpu.index} runs {gpu.other_processes} other process(es)")
        elif gpu.free_bytes < FREE_SHARE * gpu.memory_bytes:
            free = f"{gpu.free_bytes / 1e9:.0f} of {gpu.memory_bytes / 1e9:.0f} GB"
            trouble.append(f"GPU {gpu.index} has only {free} free")
        cap = gpu.power_cap_w
        if hardware is not None and cap is not None and cap < 0.99 * hardware.power_cap_w:
            trouble.append(
                f"GPU {gpu.index} is capped at {cap:.0f} W, its spec says "
                f"{hardware.power_cap_w:.0f} W"
            )
    first = environment.gpus[0]
    clocks = f"{_or_unknown(first.sm_clock_mhz)} of {_or_unknown(first.max_sm_clock_mhz)} MHz"
    text = f"{clocks}, cap {_or_unknown(first.power_cap_w)} W, {first.free_bytes / 1e9:.0f} GB free"
    if not trouble:
        return Capability(name=name, state="works", why=text)
    return Capability(
        name=name,
        state="limited",
        why=f"{'; '.join(trouble)} ({text})",
        remedy="measure on a GPU of its own; with a lower cap `profile --calibrate` says whether a "
        "shipped profile still fits",
    )


def _joules(environment: Environment) -> Capability:
    name = "watts and joules"
    if not environment.gpus:
        return Capability(name=name, state="missing", why="no GPU")
    without = [str(gpu.index) for gpu in environment.gpus if not gpu.has_energy_counter]
    if without:
        return Capability(
            name=name,
            state="limited",
            why=f"GPU {', '.join(without)} has no energy counter; joules are left out",
        )
    return Capability(name=name, state="works", why="the total energy counter answers")


def _tensor_parallel(environment: Environment) -> Capability:
    name, gpus = "several GPUs", environment.gpus
    if len(gpus) < 2:
        why = "one GPU" if gpus else "no GPU"
        return Capability(name=name, state="missing", why=f"{why}: plans for more are predicted")
    others = set(range(len(gpus)))
    apart = [gpu.index for gpu in gpus if set(gpu.nvlink_peers) != others - {gpu.index}]
    links = ", ".join(str(gpu.num_links) for gpu in gpus if gpu.num_links is not None)
    if apart:
        return Capability(
            name=name,
            state="limited",
            why=f"GPU {', '.join(map(str, apart))} does not reach all others over NVLink; "
            "copy-engine collectives need it and plans expect the spec's link bandwidth",
            remedy="use GPUs of one NVLink domain, or --num-gpus 1",
        )
    return Capability(
        name=name, state="works", why=f"{len(gpus)} GPUs, all over NVLink ({links} links up)"
    )


def _cuda_kernels(environment: Environment) -> Capability:
    name = "CUDA kernels"
    if environment.nvrtc_version:
        return Capability(name=name, state="works", why=f"NVRTC {environment.nvrtc_version}")
    if not environment.has_driver:
        return Capability(name=name, state="missing", why="no GPU: nothing to compile for")
    return Capability(
        name=name,
        state="missing",
        why="; ".join(note for note in environment.notes if "NVRTC" in note)
        or "cuda-bindings is not installed",
        remedy="pip install cuda-bindings nvidia-cuda-nvrtc",
    )


def _flashinfer(environment: Environment) -> Capability:
    absent = _absent(environment, "flashinfer-python", "apache-tvm-ffi")
    if absent and not environment.has_driver:
        return Capability(name="FlashInfer kernels", state="missing", why="no GPU: not needed")
    if absent:
        return Capability(
            name="FlashInfer kernels",
            state="missing",
            why=f"{', '.join(absent)} not installed; own attention kernels are used",
            remedy="pip install 'nanoflow-tune[gpu,flashinfer]'",
        )
    return Capability(
        name="FlashInfer kernels",
        state="works",
        why=f"flashinfer {environment.libraries['flashinfer-python']}",
    )


def _serve(environment: Environment) -> Capability:
    absent = _absent(environment, "fastapi", "uvicorn", "transformers", "safetensors")
    if absent:
        return Capability(
            name="nanoflow-serve",
            state="missing",
            why=f"{', '.join(absent)} not installed",
            remedy="pip install 'nanoflow-tune[serve]'",
        )
    return Capability(name="nanoflow-serve", state="works", why="server libraries are installed")


def _or_unknown(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def table(values: dict[str, Any]) -> Any:  # noqa: ANN401 - rich has no types here
    """The capabilities as a rich table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("part", "state", "why", "remedy"):
        made.add_column(heading)
    marks = {"works": "works", "limited": "limited", "missing": "no"}
    for held in values["capabilities"]:
        cells = held["name"], marks[held["state"]], held["why"], held["remedy"]
        made.add_row(*map(escape, cells))  # `[gpu]` is an extra here, not markup
    return made
