"""The power model's numbers, from the rows of a profile whose joules were read from the counter.

log(measured / base joules) = e x log clock + factors of kind, variant and share + noise, by ridge
regression: each number is drawn to what it would be without rows. Of a GEMM's joules those of its
bytes are taken off first, at the prior exponent; what a byte costs there is the most likely of some
values. Recorded clocks are single readings, so that rows where the clock was not read during the
joules fit no slope.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ..profiler.energy import point_costs
from ..profiler.profile import EnergyModel, Profile, Row
from ..runtime.op_graph import GEMM_KINDS
from .power_model import (
    EXPONENT,
    FLOPS_PER_CLOCK,
    KEPT,
    MAX_CLOCK_MHZ,
    PowerModel,
    family_of,
    split_joules,
)

EXPONENT_SD = 0.2
"""How far the exponent may lie from its prior: clocks are read once, and are noisy."""
KIND_SD, VARIANT_SD, SHARE_SD, NOISE_SD = 0.5, 0.1, 0.05, 0.08
"""How far factors lie from 1, and measured joules from the model; the last is what two runs of the
same kernel differ by."""
GEMM_BYTES, GEMM_BYTES_SD = tuple(n / 10 for n in range(3, 13)), 0.3
"""Values tried for the joules of a byte that a GEMM moves, relative to the energy model's, and how
far from 1 they may lie."""
LEAST_BURST_CLOCK = 0.85
"""The x below which no burst is taken to have run: a slower GEMM wastes waves instead."""
SAME_TIME = 1e-4
"""Relative difference of two times that are one, written down with six digits."""
LEAST_ROWS = 5
"""Rows from which a median is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """How well the model tells rows that it was not fitted to."""

    num_rows: int
    median: float
    """Of |predicted - measured| / measured dynamic joules, each row left out in turn."""
    worst: float


def fit_power(profile: Profile | None, energy: EnergyModel, cap_w: float) -> PowerModel:
    """The model of a profile; its `EnergyModel` alone where no joules were measured.

    Args:
        profile: whose measured joules, watts and clocks count.
        energy: joules per FLOP and byte, and static watts.
        cap_w: enforced power cap.
    """
    rows = _fitted_rows(profile) if profile else []
    max_clock = _max_clock_mhz(rows)
    gemm_bytes, fit = _best_fit(rows, energy, max_clock)
    exponent, effects = fit.solve(range(len(rows)))
    return PowerModel(
        base=energy,
        cap_w=cap_w,
        kept=KEPT,
        max_clock_mhz=max_clock,
        exponent=exponent,
        flops_per_clock=_flops_per_clock(rows),
        gemm_bytes=gemm_bytes,
        effects=effects,
    )


def fit_error(profile: Profile, energy: EnergyModel) -> FitError:
    """How far the model is off at rows that it was not fitted to."""
    rows = _fitted_rows(profile)
    return _best_fit(rows, energy, _max_clock_mhz(rows))[1].leave_one_out()


def _best_fit(
    rows: Sequence[Row], energy: EnergyModel, max_clock_mhz: float
) -> tuple[float, _JoulesFit]:
    """The most likely joules of a GEMM's bytes, relative to the energy model's, and the fit."""
    fits = {g: _JoulesFit(rows, energy, max_clock_mhz, g) for g in GEMM_BYTES}
    best = min(fits, key=lambda g: (fits[g].misfit() + ((g - 1) / GEMM_BYTES_SD) ** 2, -g))
    return best, fits[best]


def _fitted_rows(profile: Profile) -> list[Row]:
    """Rows with joules; of a kind that was also run for longer, only the longer runs.

    A burst's clock is not known, so that factors of variants from both would not compare.
    """
    rows = [row for row in profile.rows if _has_joules(row)]
    longer = {family_of(row.point.kind) for row in rows if _is_sustained(row)}
    return [r for r in rows if _is_sustained(r) or family_of(r.point.kind) not in longer]


def _max_clock_mhz(rows: Iterable[Row]) -> float:
    return max((row.sm_clock_mhz for row in rows), default=MAX_CLOCK_MHZ)


def dynamic_joules(row: Row, static_w: float) -> float:
    """Joules of one call beyond static power, for as long as it took while they were measured."""
    return row.joules * (1 - static_w / row.watts)


def _has_joules(row: Row) -> bool:
    is_measured = row.has_measured_joules and not row.error
    return is_measured and row.joules > 0 and row.watts > 0 and row.sm_clock_mhz > 0


def _keys(row: Row) -> tuple[tuple[str, ...], ...]:
    family, variant = family_of(row.point.kind), row.point.variant
    return (family,), (family, variant), (family, variant, str(row.point.num_sms))


def _is_sustained(row: Row) -> bool:
    """Whether its joules are of a longer run than its time; older profiles had one for both."""
    return abs(1e6 * row.joules / row.watts / row.median_us - 1) > SAME_TIME


def _flops_per_clock(rows: Iterable[Row]) -> float:
    """Median over GEMMs whose clock was read while they ran for longer."""
    found: list[float] = []
    for row in rows:
        if row.point.kind in GEMM_KINDS and _is_sustained(row):
            clocks = 1e6 * row.sm_clock_mhz * row.point.num_sms * row.joules / row.watts
            found.append(point_costs(row.point)[0] / clocks)
    return median(found) if len(found) >= LEAST_ROWS else FLOPS_PER_CLOCK


def _burst_clock_of(row: Row, max_clock_mhz: float) -> float:
    """The x of a GEMM in its burst, by its FLOP/s."""
    flops = point_costs(row.point)[0]
    needed = flops / (row.median_us * row.point.num_sms * max_clock_mhz * FLOPS_PER_CLOCK)
    return min(1.0, max(LEAST_BURST_CLOCK, needed))


def _priced(
    row: Row, energy: EnergyModel, max_clock_mhz: float, gemm_bytes: float
) -> tuple[float, float, float]:
    """Measured dynamic joules less those of a GEMM's bytes, what factors multiply, and the bytes'.

    All but the second are at the row's clock.
    """
    point = row.point
    base, beside = split_joules(energy, point.kind, *point_costs(point))
    is_clock_known = _is_sustained(row) or point.kind not in GEMM_KINDS
    clock = row.sm_clock_mhz / max_clock_mhz if is_clock_known else 0.0
    beside *= gemm_bytes * (clock or _burst_clock_of(row, max_clock_mhz)) ** EXPONENT
    return dynamic_joules(row, energy.static_w) - beside, base, beside


class _JoulesFit:
    """Ridge regression of log(measured / base joules) on the clock and the factors."""

    def __init__(
        self, rows: Sequence[Row], energy: EnergyModel, max_clock_mhz: float, gemm_bytes: float
    ) -> None:
        found = [(row, *_priced(row, energy, max_clock_mhz, gemm_bytes)) for row in rows]
        kept = [(row, log(j / base)) for row, j, base, _ in found if j > 0 and base > 0]
        self.beside_R = [beside / j for _, j, base, beside in found if j > 0 and base > 0]
        """Joules of bytes that were taken off, as a part of the others."""
        self.keys = list(dict.fromkeys(key for row, _ in kept for key in _keys(row)))
        place = {key: 1 + index for index, key in enumerate(self.keys)}
        self.x_RP = np.zeros((len(kept), 1 + len(self.keys)))
        """One row a measurement; columns: log clock, then one for each factor."""
        self.y_R = np.array([value for _, value in kept])
        for index, (row, _) in enumerate(kept):
            if _is_sustained(row):
                self.x_RP[index, 0] = log(row.sm_clock_mhz / max_clock_mhz)
            elif row.point.kind in GEMM_KINDS:  # its clock is known too badly to fit a slope to
                self.y_R[index] -= EXPONENT * log(_burst_clock_of(row, max_clock_mhz))
            for key in _keys(row):
                self.x_RP[index, place[key]] = 1.0
        spread = {1: KIND_SD, 2: VARIANT_SD, 3: SHARE_SD}
        sds = [EXPONENT_SD, *(spread[len(key)] for key in self.keys)]
        self.ridge_P = (NOISE_SD / np.array(sds)) ** 2
        self.prior_P = np.array([EXPONENT, *[0.0] * len(self.keys)])

    def solve(self, rows: Iterable[int]) -> tuple[float, dict[tuple[str, ...], float]]:
        """Exponent and effects from some of the rows."""
        beta_P = self._beta([index for index in rows if index < len(self.y_R)])
        return float(beta_P[0]), {
            key: float(value) for key, value in zip(self.keys, beta_P[1:], strict=True)
        }

    def _beta(self, rows: Sequence[int]) -> NDArray[np.float64]:
        x_RP, y_R = self.x_RP[list(rows)], self.y_R[list(rows)]
        left_PP = x_RP.T @ x_RP + np.diag(self.ridge_P)
        right_P = x_RP.T @ (y_R - x_RP @ self.prior_P)
        solved_P: NDArray[np.float64] = np.linalg.solve(left_PP, right_P).astype(np.float64)
        return self.prior_P + solved_P

    def misfit(self) -> float:
        """Twice the negative logarithm of how likely the measured joules and the factors are."""
        beta_P = self._beta(range(len(self.y_R)))
        off_R = (self.y_R - self.x_RP @ beta_P) / (1 + np.array(self.beside_R))
        drawn = float(np.sum(self.ridge_P * (beta_P - self.prior_P) ** 2))
        return (float(np.sum(off_R**2)) + drawn) / NOISE_SD**2

    def leave_one_out(self) -> FitError:
        """Each row told by the model of all others."""
        total = len(self.y_R)
        errors: list[float] = []
        for left_out in range(total):
            beta_P = self._beta([index for index in range(total) if index != left_out])
            told = float(self.x_RP[left_out] @ beta_P)
            error = abs(exp(told - float(self.y_R[left_out])) - 1)
            errors.append(error / (1 + self.beside_R[left_out]))
        return FitError(
            num_rows=total, median=median(errors or [0.0]), worst=max(errors, default=0.0)
        )
