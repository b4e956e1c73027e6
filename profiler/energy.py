"""Joules per kernel: measured on a tenth of the rows, fitted on the rest and tagged so.

    joules = static_w x time + a x FLOPs + b x memory bytes + c x link bytes

static_w is measured once per run (a spinning warp at full clocks); a, b, c are least squares over
the whole-GPU rows whose joules were read from the energy counter: those run at the clocks that the
power cap allows. Kernels alone on a small share run at higher clocks and voltage and take up to
half as much again per FLOP; they would not beside others.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import replace

import numpy as np

from .profile import EnergyModel, Point, Profile, Row


def _numbers(shape: str) -> list[int]:
    return [int(text) for text in re.findall(r"\d+", shape)]


def point_costs(point: Point, dtype_bytes: int = 2) -> tuple[float, float, float]:
    """FLOPs, memory bytes and one-way link bytes of one call at a profile point."""
    rows, sizes = point.tokens, _numbers(point.shape)
    if point.kind == "gemm":
        n, k = sizes
        return 2.0 * rows * n * k, dtype_bytes * (n * k + rows * (n + k)), 0.0
    if point.kind == "decode_attention":
        qo, kv, dim = sizes
        keys = rows * point.kv_len
        return 4.0 * qo * dim * keys, dtype_bytes * (2 * kv * dim * keys + 2 * rows * qo * dim), 0.0
    if point.kind == "prefill_attention":
        qo, kv, dim = sizes
        attended = prefill_keys(point)
        read = 2 * kv * dim * attended / 128 + 2 * rows * qo * dim
        return 4.0 * qo * dim * attended, dtype_bytes * read, 0.0
    if point.kind == "all_reduce":
        hidden, ranks = sizes
        link = dtype_bytes * 2 * (ranks - 1) / ranks * hidden * rows
        return link / dtype_bytes / 2, dtype_bytes * 2.0 * hidden * rows, link
    widths = {"norm": 4, "silu_mul": 3, "embedding": 2, "sampling": 1}
    if point.kind == "rope_append":
        qo, kv, dim = sizes
        return 0.0, dtype_bytes * rows * 2.0 * (qo + 2 * kv) * dim, 0.0
    return 0.0, dtype_bytes * rows * widths[point.kind] * float(sizes[0]), 0.0


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
        if row.joules_source == "measured" and row.point.num_sms == num_sms
    ]
    if len(rows) < 8:
        return None
    costs = np.array([point_costs(row.point) for row in rows])
    measured = np.array([row.joules for row in rows])
    dynamic = measured - static_w * 1e-6 * np.array([row.median_us for row in rows])
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
