"""Corrections of the cost model from measured plans: what flows back from the hardware.

    corrected cost of a nano-op    its cost x f(kind) x f(kind, variant)
    corrected slowdown             its slowdown x f(resource of the op, resource beside it)

A cost is time and dynamic joules alike: where the power cap binds the period follows the joules,
elsewhere the times. Whole periods are measured, not nano-ops, so the factors are inferred: near 1
the logarithm of a period is linear in theirs, with weights w from the simulator, and

    sum over plans of (log(measured / predicted) - w . log f)^2 / NOISE^2 + sum (log f / SPREAD)^2

is minimised: ridge regression towards factors of 1, so that few plans move few factors, and only
those that explain them. The predictions of a search stay those of the profile; corrected ones
decide what is measured next, and are those of the plan book's other points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from math import exp, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.op_graph import Op, OpGraph, RowMix
from ..runtime.op_shapes import RESOURCE_OF_KIND
from ..runtime.plan import Candidate, NanoBatch, NanoOp, Schedule
from ..runtime.schedule import concurrent_pairs
from .cost_model import CostModel, Estimate
from .power_model import Load, PowerModel
from .simulator import predict

NOISE = 0.01
"""Of the logarithm of a measured period: turns repeat to less, the form of the model is off."""
SPREAD = {"kind": 0.10, "variant": 0.05, "beside": 0.20}
"""Standard deviation that the logarithm of a factor is expected to have."""
STEP = 1.05
"""Factor with which the weights are taken."""
ROUNDS = 3
"""Linear solutions, each around the one before."""
STEP_PARTS = (1.0, 0.5, 0.25, 0.125)
"""Of the way to a linear solution, until what is minimised falls; no part: the fit stays."""
LEAST_PLANS = 3
"""Measured plans from which corrections are worth something."""
TOLD = 0.01
"""Factors nearer to 1 are not worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """Factors by key, see `kind_key`, `variant_key` and `beside_key`; 1 for all others."""

    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    num_plans: int = 0
    """Measured plans that they come from."""
    error: float = 0.0
    """Root mean square of log(measured / predicted) over those, with the corrections."""
    error_before: float = 0.0
    """Without them."""

    def cost_factor(self, kind: str, variant: str) -> float:
        """Of the time and joules of a nano-op."""
        found = self.factors.get(kind_key(kind), 1.0)
        return found * self.factors.get(variant_key(kind, variant), 1.0)

    def slowdown_factor(self, op: Op, beside: Op) -> float:
        """Of the slowdown of one op beside another."""
        return self.factors.get(beside_key(op, beside), 1.0)

    def told(self) -> str:
        """In words, the largest first."""
        ranked = sorted(self.factors.items(), key=lambda item: -abs(log(item[1])))
        large = [f"{key} x {factor:.2f}" for key, factor in ranked if abs(factor - 1) >= TOLD]
        return (
            f"{', '.join(large) or 'none above 1 %'}; predictions of {self.num_plans} measured "
            f"plans miss by {100 * self.error:.1f} % (root mean square), without corrections by "
            f"{100 * self.error_before:.1f} %"
        )


NO_CORRECTIONS = Corrections()


def kind_key(kind: str) -> str:
    """All kernels of a kind."""
    return f"kind {kind}"


def variant_key(kind: str, variant: str) -> str:
    """One variant of a kind, beyond the factor of its kind."""
    return f"variant {kind} {variant}"


def beside_key(op: Op, beside: Op) -> str:
    """Ops bound by one resource beside ops bound by another, or by the same."""
    return f"beside {RESOURCE_OF_KIND[op.kind]} {RESOURCE_OF_KIND[beside.kind]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _CorrectedPower(PowerModel):
    """Joules grow with the time, and clocks stretch a kernel as they did before."""

    corrections: Corrections

    def load(self, op: Op, mix: RowMix, num_sms: int, variant: str, us: float) -> Load:
        """As without corrections, then both times the factor."""
        factor = self.corrections.cost_factor(op.kind, variant)
        plain = PowerModel.load(self, op, mix, num_sms, variant, us / factor)
        return replace(plain, us=us, joules=plain.joules * factor)


class CorrectedCostModel(CostModel):
    """Another cost model, times the corrections."""

    def __init__(self, base: CostModel, corrections: Corrections) -> None:
        self.__dict__.update(base.__dict__)
        self.base, self.corrections = base, corrections
        self.slowdown = cache(self._corrected_slowdown)
        self.price = cache(self._price)
        self._corrected_power: _CorrectedPower | None = None

    @property
    def power(self) -> PowerModel | None:
        """The other one's, times the corrections."""
        plain = self.base.power
        if plain is None:
            return None
        if self._corrected_power is None:
            values = {kept.name: getattr(plain, kept.name) for kept in fields(plain)}
            self._corrected_power = _CorrectedPower(**values, corrections=self.corrections)
        return self._corrected_power

    def estimate(self, op: Op, mix: RowMix, num_sms: int, variant: str) -> Estimate:
        """Time and energy of one variant alone on its share, corrected."""
        plain = self.base.estimate(op, mix, num_sms, variant)
        factor = self.corrections.cost_factor(op.kind, variant)
        return replace(plain, us=plain.us * factor, joules=plain.joules * factor)

    def _corrected_slowdown(self, op: Op, num_sms: int, beside: Op, *others: Any) -> float:  # noqa: ANN401
        factor = self.corrections.slowdown_factor(op, beside)
        return factor * self.base.slowdown(op, num_sms, beside, *others)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    measured_us: float
    weights: dict[str, float]
    """Relative change of the period for a relative change of each factor."""


def _spread(key: str) -> float:
    return SPREAD[key.partition(" ")[0]]


_Key = tuple[tuple[NanoBatch, ...], tuple[NanoOp, ...]]


def _key(schedule: Schedule) -> _Key:
    """What a schedule is, whatever it is called."""
    return schedule.nano_batches, schedule.nano_ops


class Learner:
    """Collects measured plans of one batch and fits the corrections to them.

    Shape legend: P plans, K keys of factors.
    """

    def __init__(self, graph: OpGraph, cost_model: CostModel, mix: RowMix) -> None:
        self._graph, self._base, self._mix = graph, cost_model, mix
        self._plans: dict[_Key, tuple[Schedule, _Plan]] = {}
        self._names_K: list[str] = []
        self._covariance_KK, self._noise = np.zeros((0, 0)), NOISE
        self._stepped: dict[str, CostModel] = {}

    def __len__(self) -> int:
        """Plans in all."""
        return len(self._plans)

    def knows(self, schedule: Schedule) -> bool:
        """Whether a schedule was measured, under this or another name."""
        return _key(schedule) in self._plans

    def measured_us(self, schedule: Schedule) -> float:
        """Latest period of a measured schedule."""
        return self._plans[_key(schedule)][1].measured_us

    def add(self, schedule: Schedule, measured_us: float) -> None:
        """Take in the period of a plan; a later one replaces an earlier one."""
        key = _key(schedule)
        if key in self._plans:
            known = self._plans[key][1]
            self._plans[key] = schedule, replace(known, measured_us=measured_us)
            return
        weights = self._weights(schedule)
        self._plans[key] = schedule, _Plan(measured_us=measured_us, weights=weights)

    def fit(self) -> Corrections:
        """Factors that explain the measured periods; none without plans."""
        plans = [plan for _, plan in self._plans.values()]
        if not plans:
            return NO_CORRECTIONS
        keys = sorted({key for plan in plans for key in plan.weights})
        weights_PK = np.array([[plan.weights.get(key, 0.0) for key in keys] for plan in plans])
        ridge_K = np.array([(NOISE / _spread(key)) ** 2 for key in keys])
        normal_KK = weights_PK.T @ weights_PK + np.diag(ridge_K)
        self._names_K, self._covariance_KK = keys, NOISE**2 * np.linalg.inv(normal_KK)
        logs_K, factors = np.zeros(len(keys)), dict[str, float]()
        before_P = missed_P = self._missed(factors)

        def loss(logs_K: NDArray[np.float64], missed_P: NDArray[np.float64]) -> float:
            return float(missed_P @ missed_P + logs_K @ (ridge_K * logs_K))

        for _ in range(ROUNDS):
            wanted_P = missed_P + weights_PK @ logs_K
            step_K = np.linalg.solve(normal_KK, weights_PK.T @ wanted_P) - logs_K
            for part in STEP_PARTS:  # the weights hold near the point where they were taken
                tried_K = logs_K + part * step_K
                tried = {key: exp(value) for key, value in zip(keys, tried_K, strict=True)}
                tried_P = self._missed(tried)
                if loss(tried_K, tried_P) < loss(logs_K, missed_P):
                    logs_K, factors, missed_P = tried_K, tried, tried_P
                    break
            else:
                break
        error = float(np.sqrt(np.mean(missed_P**2)))
        self._noise = max(NOISE, error)
        return Corrections(
            factors=factors,
            num_plans=len(plans),
            error=error,
            error_before=float(np.sqrt(np.mean(before_P**2))),
        )

    def doubt(self, schedule: Schedule, measured: Schedule) -> float:
        """Standard deviation of the corrected prediction of a schedule, relative to a measured one.

        Of the logarithm, after the latest fit; larger where that left more than `NOISE`. Factors
        that no measured plan depends on are as uncertain as they were.
        """
        wanted = self._weights(schedule)
        for name, weight in self._plans[_key(measured)][1].weights.items():
            wanted[name] = wanted.get(name, 0.0) - weight
        weights_K = np.array([wanted.pop(name, 0.0) for name in self._names_K])
        known = float(weights_K @ self._covariance_KK @ weights_K)
        unknown = sum((weight * _spread(name)) ** 2 for name, weight in wanted.items())
        return sqrt((known + NOISE**2) * (self._noise / NOISE) ** 2 + unknown)

    def _missed(self, factors: Mapping[str, float]) -> NDArray[np.float64]:
        """log(measured / predicted) of each plan with some factors, shape [P]."""
        model = CorrectedCostModel(self._base, Corrections(factors=factors))
        return np.array(
            [
                log(plan.measured_us / self._predict(schedule, model))
                for schedule, plan in self._plans.values()
            ]
        )

    def _weights(self, schedule: Schedule) -> dict[str, float]:
        """By factor, how a relative change of it changes the period."""
        predicted_us = self._predict(schedule, self._base)
        return {
            name: log(self._predict(schedule, self._with_step(name)) / predicted_us) / log(STEP)
            for name in self._names(schedule)
        }

    def _predict(self, schedule: Schedule, model: CostModel) -> float:
        return predict(schedule, self._graph, model, self._mix).period_us

    def _with_step(self, name: str) -> CostModel:
        if name not in self._stepped:
            self._stepped[name] = CorrectedCostModel(self._base, Corrections(factors={name: STEP}))
        return self._stepped[name]

    def _names(self, schedule: Schedule) -> list[str]:
        """What the period may depend on."""
        ops = [self._graph.op(nano_op.op) for nano_op in schedule.nano_ops]
        found: set[str] = set()
        for op, nano_op in zip(ops, schedule.nano_ops, strict=True):
            found |= {kind_key(op.kind), variant_key(op.kind, nano_op.variant)}
        for a, b in concurrent_pairs(schedule, self._graph):
            found |= {beside_key(ops[a], ops[b]), beside_key(ops[b], ops[a])}
        return sorted(found)


def learned(
    graph: OpGraph, cost_model: CostModel, mix: RowMix, candidates: Iterable[Candidate]
) -> Corrections:
    """What the measured ones among some plans of a batch teach; nothing if they are few."""
    learner = Learner(graph, cost_model, mix)
    for candidate in candidates:
        if candidate.measured is not None:
            learner.add(candidate.schedule, candidate.measured.period_us)
    return learner.fit() if len(learner) >= LEAST_PLANS else NO_CORRECTIONS


def corrected(cost_model: CostModel, corrections: Corrections) -> CostModel:
    """The cost model with corrections; itself where there are none."""
    if not corrections.num_plans:
        return cost_model
    return CorrectedCostModel(cost_model, corrections)
