"""Joules per kernel: measured on a tenth of the rows, fitted on the rest and tagged so.

    joules = static_w x time + a x FLOPs + b x memory bytes + c x link bytes

static_w is measured once per run (a spinning warp at full clocks); a, b, c are least squares over
the whole-GPU rows whose joules were read from the energy counter: those run at the clocks that the
power cap allows. Kernels alone on a small share run at higher clocks and voltage and take up to
half as much again per FLOP; they would not beside others.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import cast

import numpy as np

from ..runtime.op_graph import OpKind, RowMix
from ..runtime.op_shapes import moved_bytes, op_of_shape
from .profile import EnergyModel, Point, Profile, Row


def point_costs(point: Point, dtype_bytes: int = 2) -> tuple[float, float, float]:
    """FLOPs, memory bytes and one-way link bytes of one call at a profile point.

    Bytes are those that the variant moves, the scratch buffer of an unfused one included.
    """
    op = op_of_shape(cast(OpKind, point.kind), point.shape, dtype_bytes)
    is_prefill = point.kind == "prefill_attention"
    mix = RowMix(
        decode_tokens=0 if is_prefill else point.tokens,
        prefill_tokens=point.tokens if is_prefill else 0,
        decode_context_tokens=point.kv_len,
        prefill_context_tokens=prefill_keys(point) / point.tokens if is_prefill else 0.0,
    )
    return op.flops(mix), moved_bytes(op, mix, point.variant), op.link_bytes(mix)


def prefill_keys(point: Point) -> float:
    """Row-key pairs of a prefill point: whole causal prompts, or one chunk that ends a prompt."""
    if point.tokens >= point.kv_len:
        return point.tokens * (point.kv_len + 1) / 2
    return point.tokens * (point.kv_len - (point.tokens - 1) / 2)


def fit_energy(profile: Profile, static_w: float) -> EnergyModel | None:
    """Least squares over whole-GPU rows with measured joules; None when there are fewer than 8."""
    num_sms = max((row.point.num_sms for row in profile.rows), default=0)
    rows = [
        row
        for row in profile.usable_rows
        if row.has_measured_joules and row.point.num_sms == num_sms
    ]
    if len(rows) < 8:
        return None
    costs = np.array([point_costs(row.point) for row in rows])
    measured = np.array([row.joules for row in rows])
    dynamic = measured - static_w * np.array([_seconds(row) for row in rows])
    used = [column for column in range(3) if costs[:, column].any()]
    weights = 1.0 / np.maximum(measured, 1e-9)  # relative errors count
    coefficients = np.zeros(3)
    solved, *_ = np.linalg.lstsq(costs[:, used] * weights[:, None], dynamic * weights, rcond=None)
    coefficients[used] = np.maximum(solved, 0.0)
    fitted = costs @ coefficients + (measured - dynamic)
    return EnergyModel(
        static_w=static_w,
        joules_per_flop=float(coefficients[0]),
        joules_per_byte=float(coefficients[1]),
        joules_per_link_byte=float(coefficients[2]),
        relative_error=float(statistics.median(np.abs(fitted - measured) / measured)),
    )


def _seconds(row: Row) -> float:
    """Time of one call while its joules were measured: longer than a burst's."""
    return row.joules / row.watts if row.watts > 0 else row.median_us * 1e-6


def with_fitted_joules(profile: Profile) -> tuple[Row, ...]:
    """The profile's rows, joules filled in from its energy model where none were measured."""
    energy = profile.energy
    if energy is None:
        return profile.rows
    rows: list[Row] = []
    for row in profile.rows:
        if row.joules_source == "missing" and not row.error:
            dynamic = energy.dynamic_joules(*point_costs(row.point))
            joules = dynamic + energy.static_w * row.median_us * 1e-6
            row = replace(row, joules=joules, joules_source="fitted")
        rows.append(row)
    return tuple(rows)
