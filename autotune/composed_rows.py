"""`gemm_silu` rows for profiles that were measured when SiLU was an op of its own.

Such a profile has the up/gate GEMM as kind `gemm` and the SiLU as kind `silu_mul`. Their sum at one
point stands for the unfused variant of that GEMM. It is tagged `interpolated` even where both were
measured, and its joules `fitted`: nobody timed the two as one nano-op. What the GEMM was measured
beside stands for what the pair would be beside, though SiLU alone disturbs its neighbours more.

To be deleted, with its call in `cost_model.py` and the kind `silu_mul`, once the shipped profiles
hold `gemm_silu` rows.
"""

from __future__ import annotations

from dataclasses import replace

from ..profiler.profile import PairRow, Point, Profile, Row
from ..runtime.op_shapes import shape_numbers


def with_composed_rows(profile: Profile) -> Profile:
    """The profile with sums for every up/gate GEMM of which it has no `gemm_silu` rows."""
    known = {_kernel(row.point) for row in profile.usable_rows if row.point.kind == "gemm_silu"}
    silu_rows = {
        (2 * shape_numbers(row.point.shape)[0], row.point.tokens, row.point.num_sms): row
        for row in profile.usable_rows
        if row.point.kind == "silu_mul"
    }
    rows: list[Row] = []
    for row in profile.usable_rows:
        point = row.point
        if point.kind == "gemm" and _kernel(point) not in known:
            n, _ = shape_numbers(point.shape)
            silu = silu_rows.get((n, point.tokens, point.num_sms))
            rows += [_sum(row, silu)] if silu else []
    composed = {_kernel(row.point) for row in rows}
    pairs: list[PairRow] = []
    for pair in profile.pairs:
        a, b = _up_gate(pair.a, composed), _up_gate(pair.b, composed)
        if (a, b) != (pair.a, pair.b):
            pairs.append(replace(pair, a=a, b=b, source="interpolated"))
    return replace(profile, rows=(*profile.rows, *rows), pairs=(*profile.pairs, *pairs))


def _sum(gemm: Row, silu: Row) -> Row:
    """One after the other; watts and clocks are those of the GEMM, which takes most of the time."""
    has_joules = "missing" not in (gemm.joules_source, silu.joules_source)
    return replace(
        gemm,
        point=replace(gemm.point, kind="gemm_silu"),
        median_us=gemm.median_us + silu.median_us,
        p10_us=gemm.p10_us + silu.p10_us,
        p90_us=gemm.p90_us + silu.p90_us,
        n=min(gemm.n, silu.n),
        joules=gemm.joules + silu.joules if has_joules else 0.0,
        joules_source="fitted" if has_joules else "missing",
        source="interpolated",
    )


def _kernel(point: Point) -> tuple[str, str]:
    return point.shape, point.variant


def _up_gate(point: Point, composed: set[tuple[str, str]]) -> Point:
    """The up/gate op in place of its GEMM; any other point as it is."""
    is_up_gate = point.kind == "gemm" and _kernel(point) in composed
    return replace(point, kind="gemm_silu") if is_up_gate else point
