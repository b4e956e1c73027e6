"""Whether a plan is for the model and the GPUs it meets: exact, close, or refused with the reason.

A close one (the same layers on a GPU with the same SMs, but something else differs) is served with
its sequential schedules, since nobody measured that overlap pays there. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..search_spaces.loader import content_hash, known, load_model
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .plan import Plan

_LAYER_FIELDS = (
    "architecture",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "torch_dtype",
    "num_local_experts",
    "num_experts_per_tok",
)
"""They decide what the nano-ops of a layer compute: a plan for others means nothing."""


class PlanMismatchError(ValueError):
    """The plan is for another model, GPU or tensor-parallel degree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveGpus:
    """The GPUs of this machine, as the driver tells of them."""

    name: str
    count: int
    num_sms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanMatch:
    """How a plan fits."""

    is_exact: bool
    """False: only sequential schedules may be run."""
    remarks: tuple[str, ...] = ()
    """What an operator should know, one sentence each."""


def match_plan(
    plan: Plan, model: ModelSpec, hardware: HardwareSpec, num_gpus: int, gpus: LiveGpus | None
) -> PlanMatch:
    """Hold a plan against what it is to run.

    Args:
        plan: what was tuned.
        model: of the checkpoint.
        hardware: the spec that the plan names.
        num_gpus: tensor-parallel degree to serve with.
        gpus: of this machine; None to serve on the CPU.

    Raises:
        PlanMismatchError: it must not be run; says what differs and what to do.
    """
    if num_gpus != plan.num_gpus:
        raise PlanMismatchError(
            f"the plan is for {plan.num_gpus} GPU(s), but {num_gpus} were asked for; serve with "
            f"{plan.num_gpus}, or tune with --num-gpus {num_gpus}"
        )
    close = _model_differences(plan, model)
    remarks = [f"model: {difference}" for difference in close]
    if gpus is None:
        said = f"on the CPU: the plan's schedules run with plain torch, not as on {plan.hardware}"
        return PlanMatch(is_exact=not close, remarks=(*remarks, said))
    different = _gpu_differences(hardware, num_gpus, gpus)
    remarks += [f"GPU: {difference}" for difference in different]
    if content_hash(hardware) != plan.inputs.get("hardware", content_hash(hardware)):
        remarks.append(f"the spec of {hardware.name} has changed since the plan was made")
    return PlanMatch(is_exact=not remarks, remarks=tuple(remarks))


def _model_differences(plan: Plan, model: ModelSpec) -> tuple[str, ...]:
    """What differs without changing a layer's shapes; empty for the very model."""
    if model.torch_dtype != plan.dtype:
        raise PlanMismatchError(
            f"the plan is for {plan.dtype} weights, but the checkpoint is {model.torch_dtype}; "
            "tune for the checkpoint's folder, or convert it"
        )
    named = replace(model, name=plan.model)  # a folder may be called anything
    if content_hash(named) == plan.inputs.get("model"):
        return ()
    if plan.model not in known("models"):
        raise PlanMismatchError(
            f"the plan is for another model than {model.name!r}: it was made for {plan.model!r}, "
            "whose spec has another hash; tune for the checkpoint's folder: "
            "`nanoflow-tune --model DIR`"
        )
    theirs = load_model(plan.model)
    differing = [
        field.name
        for field in fields(ModelSpec)
        if field.name != "name" and getattr(theirs, field.name) != getattr(model, field.name)
    ]
    told = [f"{name} {getattr(model, name)}, not {getattr(theirs, name)}" for name in differing]
    if any(name in _LAYER_FIELDS for name in differing):
        raise PlanMismatchError(
            f"the plan is for {plan.model}, but the checkpoint {model.name!r} is another model "
            f"({'; '.join(told)}); tune for the checkpoint's folder: `nanoflow-tune --model DIR`"
        )
    if not told:
        return (f"the spec of {plan.model} has changed since the plan was made",)
    return (f"like {plan.model}, but {'; '.join(told)}",)


def _gpu_differences(hardware: HardwareSpec, num_gpus: int, gpus: LiveGpus) -> tuple[str, ...]:
    if gpus.count < num_gpus:
        raise PlanMismatchError(
            f"the plan is for {num_gpus} GPU(s), but this machine has {gpus.count}; tune with "
            f"--num-gpus {gpus.count}"
        )
    if gpus.num_sms != hardware.num_sms:
        raise PlanMismatchError(
            f"the plan is for {hardware.device_name} with {hardware.num_sms} SMs, but this machine "
            f"has {gpus.name} with {gpus.num_sms}; tune on this machine, or with --gpu for its GPU"
        )
    if gpus.name != hardware.device_name:
        return (f"{gpus.name}, not {hardware.device_name}, with the same number of SMs",)
    return ()
