"""Reads and writes plans: strict YAML, one nano-op a line.

In the file each schedule stands once, under `schedules` with a name such as
`sequential-2048-1024` (kind, rows, decode rows), and candidates refer to it by that name. Records
in memory hold the schedules themselves. Stages of 0, empty `after` and figures of 0 are left out.

A file that does not fit is refused with its path, the key path, the rule and the remedy. Given the
graph and the hardware, the schedules are checked as well (`schedule.check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml

from ..search_spaces.loader import load_yaml
from ..search_spaces.records import SpecError, from_mapping, to_mapping
from ..search_spaces.schema import HardwareSpec
from ..search_spaces.whole_file import write_whole
from .legality import check
from .op_graph import OpGraph
from .plan import READABLE_SCHEMAS, SCHEMA, Bucket, Candidate, Plan, Schedule
from .schedule import IllegalScheduleError

_FLOW_KEYS = (
    "nano_batches",
    "nano_ops",
    "winner",
    "sequential",
    "best_overlapped",
    "verification",
    "break_even",
    "overlap_gain",
)
"""Values under these keys are written in flow style, list items one a line."""


@dataclass(frozen=True, slots=True)
class _Flow:
    value: Any


class _Dumper(yaml.SafeDumper):
    """Block style, except what is wrapped in `_Flow`."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401
        return True


def _represent_flow(dumper: yaml.SafeDumper, flow: _Flow) -> yaml.Node:
    node = dumper.represent_data(flow.value)
    assert isinstance(node, yaml.CollectionNode)
    node.flow_style = True
    return node


_Dumper.add_representer(_Flow, _represent_flow)


def dump_plan(plan: Plan, path: Path) -> None:
    """Write a plan; the file is there whole or not at all."""
    mapping = _with_flow(_by_name(plan))
    text = yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, width=1 << 20, allow_unicode=True)
    write_whole(path, text)


def load_plan(
    path: Path, graph: OpGraph | None = None, hardware: HardwareSpec | None = None
) -> Plan:
    """Read a plan, and check its schedules when `graph` and `hardware` are given.

    Raises:
        SpecError: not YAML, another schema, an unknown or missing key, a wrong type or value.
        IllegalScheduleError: a schedule that must not run.
    """
    mapping = load_yaml(path)
    schema = mapping.get("schema")
    if schema not in READABLE_SCHEMAS:
        raise SpecError(
            f"{path}: `schema`: must be {SCHEMA!r}, but got {schema!r}; make the plan anew with "
            "this version of nanoflow-tune"
        )
    if schema != READABLE_SCHEMAS[0]:
        mapping = _resolved(mapping, str(path))
    plan = replace(from_mapping(Plan, mapping, str(path)), schema=SCHEMA)
    if not plan.buckets:
        raise SpecError(f"{path}: `buckets`: must hold at least one bucket; make the plan anew")
    for index, bucket in enumerate(plan.buckets):
        _check_bucket(bucket, f"{path}: `buckets[{index}]")
    if graph is not None and hardware is not None:
        check_plan(plan, graph, hardware, str(path))
    return plan


def check_plan(plan: Plan, graph: OpGraph, hardware: HardwareSpec, where: str = "plan") -> None:
    """Refuse a plan with a schedule that must not run on this graph and hardware.

    Raises:
        IllegalScheduleError: names the bucket, the candidate, the nano-op, the rule.
    """
    for index, bucket in enumerate(plan.buckets):
        for role, candidate in _candidates(bucket):
            try:
                check(candidate.schedule, graph, hardware.num_sms, hardware.sm_granularity)
            except IllegalScheduleError as err:
                key = f"buckets[{index}].{role}.schedule"
                raise IllegalScheduleError(f"{where}: `{key}`: {err}") from err


_ROLES = ("winner", "sequential", "best_overlapped")


def schedule_names(plan: Plan) -> dict[Schedule, str]:
    """Each distinct schedule of a plan with its name in the file, in order of first use."""
    names: dict[Schedule, str] = {}
    counts: dict[str, int] = {}
    for bucket in plan.buckets:
        for _, candidate in _candidates(bucket):
            schedule = candidate.schedule
            if schedule in names:
                continue
            decodes = sum(nano_batch.decode_tokens for nano_batch in schedule.nano_batches)
            name = f"{schedule.name}-{schedule.dense_batch_tokens}-{decodes}"
            counts[name] = counts.get(name, 0) + 1
            names[schedule] = name if counts[name] == 1 else f"{name}-{counts[name]}"
    return names


def _by_name(plan: Plan) -> dict[str, Any]:
    """The mapping of a plan with its schedules apart, last."""
    names, mapping = schedule_names(plan), to_mapping(plan)
    for bucket, written in zip(plan.buckets, mapping["buckets"], strict=True):
        for role, candidate in _candidates(bucket):
            written[role]["schedule"] = names[candidate.schedule]
            for timing in ("predicted", "measured"):
                if timing in written[role]:
                    written[role][timing] = _without(written[role][timing], 0.0)
    schedules = {name: to_mapping(schedule) for schedule, name in names.items()}
    for schedule in schedules.values():
        schedule["nano_ops"] = [_short_nano_op(nano_op) for nano_op in schedule["nano_ops"]]
    return {**mapping, "schedules": schedules}


def _short_nano_op(nano_op: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in nano_op.items() if key != "stage" or value != 0}


def _without(mapping: dict[str, Any], default: float) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value != default}


def _resolved(mapping: dict[str, Any], where: str) -> dict[str, Any]:
    """The mapping of a file with each name of a schedule replaced by the schedule.

    Raises:
        SpecError: no table of schedules, a name that is not in it, or a schedule nobody names.
    """
    schedules = mapping.get("schedules")
    if not isinstance(schedules, dict):
        raise SpecError(
            f"{where}: `schedules`: must map names to schedules, but got "
            f"{type(schedules).__name__}; make the plan anew"
        )
    known = cast("dict[str, Any]", schedules)
    for name, schedule in known.items():
        from_mapping(Schedule, schedule, f"{where}: `schedules.{name}`")
    buckets = mapping.get("buckets")
    plain = {key: value for key, value in mapping.items() if key != "schedules"}
    if not isinstance(buckets, list):
        return plain  # the reader says what is wrong
    unused = set(known)
    resolved = list(cast("list[Any]", buckets))
    for index in range(len(resolved)):
        for role in _ROLES:
            candidate = _item(resolved[index], role)
            name = _item(candidate, "schedule")
            if not isinstance(name, str):
                continue
            if name not in known:
                raise SpecError(
                    f"{where}: `buckets[{index}].{role}.schedule`: must be a name under "
                    f"`schedules`, but got {name!r}; known: {', '.join(known)}"
                )
            unused.discard(name)
            resolved[index] = {
                **resolved[index],
                role: {**cast("dict[str, Any]", candidate), "schedule": known[name]},
            }
    if unused:
        raise SpecError(
            f"{where}: `schedules`: no bucket refers to {', '.join(sorted(unused))}; remove it"
        )
    return {**plain, "buckets": resolved}


def _item(container: Any, key: str) -> Any:  # noqa: ANN401
    """A value of a mapping; None where there is none, or no mapping."""
    return cast("dict[str, Any]", container).get(key) if isinstance(container, dict) else None


def _candidates(bucket: Bucket) -> Iterator[tuple[str, Candidate]]:
    yield "winner", bucket.winner
    yield "sequential", bucket.sequential
    yield "best_overlapped", bucket.best_overlapped


def _check_bucket(bucket: Bucket, where: str) -> None:
    for role, candidate in _candidates(bucket):
        schedule = candidate.schedule
        for timing in (candidate.predicted, candidate.measured or candidate.predicted):
            if timing.period_us <= 0:
                raise SpecError(
                    f"{where}.{role}`: `period_us` must be positive, but got {timing.period_us:g}"
                )
        if not schedule.nano_batches or not schedule.nano_ops:
            raise SpecError(
                f"{where}.{role}.schedule`: must have at least one nano-batch and one nano-op"
            )
        decodes = sum(nano_batch.decode_tokens for nano_batch in schedule.nano_batches)
        rows = schedule.dense_batch_tokens, decodes
        if rows != (bucket.dense_batch_tokens, bucket.decode_tokens):
            raise SpecError(
                f"{where}.{role}.schedule`: nano-batches hold {rows[0]} rows, {rows[1]} of them "
                f"decodes, but the bucket has {bucket.dense_batch_tokens} and "
                f"{bucket.decode_tokens}; make them agree"
            )


def _with_flow(value: Any, key: str = "") -> Any:  # noqa: ANN401
    if key in _FLOW_KEYS:
        is_list = isinstance(value, list)
        return [_Flow(item) for item in cast("list[Any]", value)] if is_list else _Flow(value)
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        return {name: _with_flow(item, name) for name, item in mapping.items()}
    if isinstance(value, list):
        return [_with_flow(item) for item in cast("list[Any]", value)]
    return value
