"""Reads and writes plans: strict YAML, one nano-op a line.

A file that does not fit is refused with its path, the key path, the rule and the remedy. Given the
graph and the hardware, the schedules are checked as well (`schedule.check`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from ..search_spaces.loader import load_yaml
from ..search_spaces.records import SpecError, from_mapping, to_mapping
from ..search_spaces.schema import HardwareSpec
from .legality import check
from .op_graph import OpGraph
from .plan import SCHEMA, Bucket, Candidate, Plan
from .schedule import IllegalScheduleError

_FLOW_KEYS = ("nano_batches", "nano_ops", "predicted", "measured", "verification")
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
    mapping = _with_flow(to_mapping(plan))
    text = yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, width=1 << 20, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    if schema != SCHEMA:
        raise SpecError(
            f"{path}: `schema`: must be {SCHEMA!r}, but got {schema!r}; make the plan anew with "
            "this version of nanoflow-tune"
        )
    plan = from_mapping(Plan, mapping, str(path))
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


def _candidates(bucket: Bucket) -> Iterator[tuple[str, Candidate]]:
    yield "winner", bucket.winner
    yield "sequential", bucket.sequential
    yield "best_overlapped", bucket.best_overlapped


def _check_bucket(bucket: Bucket, where: str) -> None:
    for role, candidate in _candidates(bucket):
        schedule = candidate.schedule
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
