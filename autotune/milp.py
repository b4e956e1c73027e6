"""The structure of a period as one mixed-integer linear program.

Decides together: number and sizes of nano-batches, row order, the order of all macro ops, and the
SM share of each, for the shortest period of the repeating layer pattern.

    maximise r = 1 / T                 T: period; times below are in units of T
    s_i                                start of node i, layer 0; that of layer l is s_i + l
    y_g, x_ia                          1: split g is taken; 1: node i runs on share a
    w_iga = r y_g x_ia                 as sum_a w_iga = r_g, sum_g r_g = r, r_g <= R_g y_g,
                                       sum_g w_iga <= R x_ia: exact for binary x and y
    delta_i = sum_ga D_iga w_iga       duration of node i as a part of the period; plus E_ijg w_jg0
                                       where collective j takes no SMs and leaves its sum to i
    s_j + distance >= s_i + delta_i    j waits for i, `distance` layers back
    s_i + delta_i <= s_j + m_ij        nodes that must not overlap: an integer m_ij of periods puts
    s_j + m_ij + delta_j <= s_i + 1    j behind i and before the next i

Nodes of one lane must not overlap. Nodes of different lanes may (n_ij = 1) when their shares fit
on the GPU, with those of a third lane where all three meet. Pairs that the dependencies keep apart
need no variables. Valid cuts: a lane is busy for at most the period; so is the GPU, SM by SM.

A nano-batch of two forms chooses one too, z_b: each of its nodes that take another time in form 1
has its w twice,

    sum_a w_iga + sum_a w'_iga = r_g, sum_ga w'_iga <= R z_b, sum_ga w_iga <= R (1 - z_b)

and a node that has nothing to do in form 0 is kept apart from others in form 1 only.

A nano-batch of size 0 has durations 0: the number of nano-batches is a choice of g.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import floor
from typing import Any

from .highs_banner import silence_banner
from .instance_bounds import least_us, path_distances, sequential_us
from .milp_input import Instance
from .milp_start import Start

SLACK = 1e-5
"""Starts closer than this part of a period are the same."""
NODES_PER_SECOND = 10
"""Branch-and-bound nodes allowed per second of time limit. Usually the node limit ends a search
first, so that a busier machine finds the same plan."""
MAX_PERIOD = 3.0
"""Periods of more than this many times the sequential one are not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the solver proved, about one layer of the MILP's model (not of the GPU)."""

    status: str
    """`optimal` (within the asked gap), `limit` (of time or nodes), or `no_solution`."""
    period_us: float
    """Steady time of one layer at mean slowdowns; 0 without a solution."""
    bound_us: float
    """No choice in the model has a shorter period."""
    gap: float
    """1 - bound / period."""
    seconds: float
    num_binaries: int
    """Integer variables."""
    solver: str
    simulated_us: float = 0.0
    """Steady time of one layer of the found schedule in the simulator; 0 without a schedule."""
    same_interference_us: float = 0.0
    """The same by the MILP, within 1 %: `period_us` where that is so near, else with the simulated
    time of each nano-op in place of its mean slowdown (`milp_agreement.py`)."""
    rounds: int = 0
    """Times that the order was solved again with simulated times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A period found by the solver."""

    split: int
    start: tuple[float, ...]
    """Start of each node of layer 0, in periods."""
    share: tuple[int, ...]
    is_form_1: tuple[bool, ...] = ()
    """By nano-batch that may choose."""


class Model:
    """The program of one instance, in PuLP."""

    def __init__(self, instance: Instance) -> None:
        import pulp

        self.pulp = pulp
        self.instance = instance
        self.num_nodes = len(instance.lanes)
        self.nodes, self.splits = range(self.num_nodes), range(instance.num_splits)
        self.distance = path_distances(instance)
        self.unit_us = max(sequential_us(instance, split) for split in self.splits)
        self.max_rate = [self.unit_us / least_us(instance, split) for split in self.splits]
        self.problem: Any = pulp.LpProblem("period", pulp.LpMaximize)
        self.num_integers = 0
        self._add_choices()
        self._add_dependencies()
        self._add_order()
        self._add_cuts()

    def _binary(self, name: str) -> Any:  # noqa: ANN401
        self.num_integers += 1
        return self.pulp.LpVariable(name, cat="Binary")

    def _rate(self, name: str, split: int) -> Any:  # noqa: ANN401
        return self.pulp.LpVariable(name, 0, self.max_rate[split])

    def _add(self, constraint: Any) -> None:  # noqa: ANN401
        self.problem += constraint

    def _add_choices(self) -> None:
        """r, y, x, w and delta."""
        pulp, instance, best = self.pulp, self.instance, max(self.max_rate)
        self.rate = pulp.LpVariable("r", 1 / MAX_PERIOD, best)
        self.problem += self.rate
        self.y = [self._binary(f"y_{g}") for g in self.splits]
        rates = [pulp.LpVariable(f"r_{g}", 0, self.max_rate[g]) for g in self.splits]
        self._add(pulp.lpSum(self.y) == 1)
        self._add(pulp.lpSum(rates) == self.rate)
        self.x: list[dict[int, Any]] = []
        self.delta: list[Any] = []
        self.area: list[Any] = []
        free: dict[tuple[int, int], Any] = {}
        for g in self.splits:
            self._add(rates[g] <= self.max_rate[g] * self.y[g])
            self._add(rates[g] >= self.y[g] / MAX_PERIOD)
        self.z = [self._binary(f"z_{b}") for b in range(len(instance.nodes_of_forms))]
        choice = {i: self.z[b] for b, held in enumerate(instance.nodes_of_forms) for i in held}
        self.idle = {i: 1 - choice[i] for i in instance.idle_nodes}
        for i in self.nodes:
            shares = instance.shares[i]
            x = {a: self._binary(f"x_{i}_{a}") for a in shares}
            w = {(g, a): self._rate(f"w_{i}_{g}_{a}", g) for g in self.splits for a in shares}
            part = {key: instance.duration_us[i, *key] / self.unit_us for key in w}
            other = {key: self._rate("v_{}_{}_{}".format(i, *key), key[0]) for key in w}
            other = {key: v for key, v in other.items() if (i, *key) in instance.form_us}
            parts = {key: instance.form_us[i, *key] / self.unit_us for key in other}
            if i in choice:
                self._add(pulp.lpSum(other.values()) <= best * choice[i])
                self._add(pulp.lpSum(w.values()) <= best * (1 - choice[i]))
            self._add(pulp.lpSum(x.values()) == 1)
            every = [*w.items(), *other.items()]
            for g in self.splits:
                self._add(pulp.lpSum(v for key, v in every if key[0] == g) == rates[g])
            for a in shares:
                self._add(pulp.lpSum(v for key, v in every if key[1] == a) <= best * x[a])
            free |= {(i, g): w[g, 0] for g in self.splits if 0 in shares}
            terms = [(key[1], part[key] * w[key]) for key in w if part[key]]
            terms += [(key[1], parts[key] * other[key]) for key in other if parts[key]]
            self.x.append(x)
            self.delta.append(pulp.lpSum(term for _, term in terms))
            self.area.append(pulp.lpSum(a / instance.num_sms * term for a, term in terms))

        for (i, j, g), us in instance.sum_us.items():
            self.delta[i] += us / self.unit_us * free[j, g]

    def _add_dependencies(self) -> None:
        """Node 0 starts the period; every other root starts within it."""
        pulp = self.pulp
        self.start = [pulp.LpVariable(f"s_{i}", 0, 2) for i in self.nodes]
        self.start[0].bounds(0, 0)
        roots = [e.after for e in self.instance.edges if e.layer_distance]
        for root in set(roots) - {0}:
            self.start[root].bounds(0, 1)
        for edge in self.instance.edges:
            self._add(
                self.start[edge.after] + edge.layer_distance
                >= self.start[edge.before] + self.delta[edge.before]
            )

    def _add_order(self) -> None:
        """Keep apart what must not overlap; tie overlaps to fitting shares."""
        self.overlap: dict[tuple[int, int], Any] = {}
        self.turns: dict[tuple[int, int], Any] = {}
        has_three_lanes = len(set(self.instance.lanes)) > 2
        for i, j in combinations(self.nodes, 2):
            if self.distance[i][j] + self.distance[j][i] <= 1:
                continue
            if self.instance.lanes[i] == self.instance.lanes[j]:
                self._keep_apart(i, j, 0)
            elif has_three_lanes or not self._always_fit(i, j):
                self._keep_apart(i, j, self._add_overlap(i, j))
        if has_three_lanes:
            self._add_triples()
        self._add_staircase()

    def _always_fit(self, i: int, j: int) -> bool:
        shares = self.instance.shares
        return max(shares[i]) + max(shares[j]) <= self.instance.num_sms

    def _add_overlap(self, i: int, j: int) -> Any:  # noqa: ANN401
        """n_ij: may overlap, with shares that fit."""
        n, total = self._binary(f"n_{i}_{j}"), self.instance.num_sms
        self.overlap[i, j] = n
        for a, x in self.x[i].items():
            partners = [other for b, other in self.x[j].items() if a + b <= total]
            self._add(x + n <= 1 + self.pulp.lpSum(partners))
        return n

    def _keep_apart(self, i: int, j: int, unless: Any) -> None:  # noqa: ANN401
        self.num_integers += 1
        m = self.pulp.LpVariable(f"m_{i}_{j}", -2, 2, cat="Integer")
        self.turns[i, j] = m
        unless = unless + self.idle.get(i, 0) + self.idle.get(j, 0)
        self._add(self.start[i] + self.delta[i] <= self.start[j] + m + unless)
        self._add(self.start[j] + m + self.delta[j] <= self.start[i] + 1 + unless)

    def _add_triples(self) -> None:
        total = self.instance.num_sms
        share = [self.pulp.lpSum(a * x for a, x in xs.items()) for xs in self.x]
        for i, j, k in combinations(self.nodes, 3):
            pairs = (i, j), (i, k), (j, k)
            if not all(pair in self.overlap for pair in pairs):
                continue
            apart = 3 - self.pulp.lpSum(self.overlap[pair] for pair in pairs)
            self._add(share[i] + share[j] + share[k] <= total + total * apart)

    def _add_staircase(self) -> None:
        """Turns of ordered nodes are ordered too, for pairs that are always kept apart."""
        for (i, j), m in self.turns.items():
            for k in self.nodes:
                if (i, j) in self.overlap or k in (i, j):
                    continue
                later_j = self.turns.get((i, k))
                if later_j is not None and (i, k) not in self.overlap and self.distance[j][k] == 0:
                    self._add(later_j <= m)
                later_i = self.turns.get((k, j))
                if later_i is not None and (k, j) not in self.overlap and self.distance[i][k] == 0:
                    self._add(later_i >= m)

    def _add_cuts(self) -> None:
        """A lane, and the GPU SM by SM, are busy for at most the period."""
        for lane in set(self.instance.lanes):
            members = [i for i in self.nodes if self.instance.lanes[i] == lane]
            self._add(self.pulp.lpSum(self.delta[i] for i in members) <= 1)
        self._add(self.pulp.lpSum(self.area) <= 1)

    def fix_forms(self, is_form_1: Sequence[bool]) -> None:
        """Nano-batches that may choose take these forms."""
        for z, is_other in zip(self.z, is_form_1, strict=True):
            z.bounds(int(is_other), int(is_other))

    def start_values(self, start: Start) -> dict[str, float]:
        """Integer variables as a known schedule has them; nodes without rows are left open."""
        values = {self.y[g].name: float(g == start.split) for g in self.splits}
        values |= {z.name: float(b in start.in_form_1) for b, z in enumerate(self.z)}
        for i, share in start.share.items():
            if share in self.x[i]:
                values |= {x.name: float(a == share) for a, x in self.x[i].items()}
        for (i, j), m in self.turns.items():
            if i in start.span and j in start.span:
                values[m.name] = float(min(2, max(-2, start.turn(i, j))))
                if (i, j) in self.overlap:
                    values[self.overlap[i, j].name] = float(start.overlaps(i, j))
        return values

    def solve(
        self, time_limit_s: float, gap: float, seed: int, start: Start | None = None
    ) -> tuple[Solution | None, Certificate]:
        """Solve with HiGHS, or CBC where there is none.

        Args:
            time_limit_s: wall clock; nodes are limited in proportion.
            gap: relative gap at which to stop.
            seed: of the solver.
            start: a known schedule to improve on (HiGHS only).
        """
        silence_banner()
        pulp, began = self.pulp, time.perf_counter()
        start_values = self.start_values(start) if start else {}
        highs = _highs(start_values)(
            msg=False,
            timeLimit=time_limit_s,
            gapRel=gap,
            threads=2,
            random_seed=seed,
            mip_max_nodes=max(1, round(NODES_PER_SECOND * time_limit_s)),
        )
        if highs.available():
            solver, name = highs, "HiGHS"
        else:
            solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit_s, gapRel=gap, threads=2)
            name = "CBC"
        self.problem.solve(solver)
        seconds = time.perf_counter() - began
        has_solution = self.problem.sol_status in (
            pulp.LpSolutionOptimal,
            pulp.LpSolutionIntegerFeasible,
        )
        bound_rate = max(self.max_rate)
        if name == "HiGHS":
            proved_rate = -self.problem.solverModel.getInfo().mip_dual_bound
            bound_rate = min(bound_rate, proved_rate) if proved_rate > 0 else bound_rate
        rate = self.rate.varValue if has_solution else 0.0
        period_us = self.unit_us / rate if rate else 0.0
        bound_us = self.unit_us / bound_rate
        achieved = 1 - bound_us / period_us if rate else 1.0
        status = "optimal" if achieved <= gap + 1e-6 else "limit"
        certificate = Certificate(
            status=status if rate else "no_solution",
            period_us=period_us,
            bound_us=bound_us,
            gap=max(0.0, achieved),
            seconds=seconds,
            num_binaries=self.num_integers,
            solver=name,
        )
        return (self._solution() if rate else None), certificate

    def _solution(self) -> Solution:
        return Solution(
            split=max(self.splits, key=lambda g: self.y[g].varValue),
            start=tuple(float(start.varValue or 0.0) for start in self.start),
            share=tuple(max(xs, key=lambda a: xs[a].varValue) for xs in self.x),
            is_form_1=tuple(z.varValue > 0.5 for z in self.z),
        )


def _highs(values: dict[str, float]) -> Any:  # noqa: ANN401
    """PuLP's HiGHS, given values of some variables to start from."""
    import numpy as np
    import pulp

    class StartedHighs(pulp.HiGHS):
        def callSolver(self, lp: Any) -> None:  # noqa: ANN401, N802
            known = [(v.index, values[v.name]) for v in lp.variables() if v.name in values]
            if known:
                indices, numbers = zip(*known, strict=True)
                lp.solverModel.setSolution(
                    len(known), np.array(indices, np.int32), np.array(numbers, np.float64)
                )
            lp.solverModel.run()

        def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: ANN401, N802
            try:
                return super().findSolutionValues(lp)
            except KeyError:  # PuLP 3 has no name for "node limit reached"; values are assigned
                found = lp.solverModel.getInfo().primal_solution_status == 2
                if found:
                    return pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible
                return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound

    return StartedHighs


def phases(solution: Solution) -> list[tuple[float, int]]:
    """(phase in the period, stage) of each node, stages from 0."""
    placed: list[tuple[float, int]] = []
    for start in solution.start:
        stage = floor(start + SLACK)
        placed.append((max(0.0, round(start - stage, 5)), stage))
    least = min(stage for _, stage in placed)
    return [(phase, stage - least) for phase, stage in placed]


def issue_order(solution: Solution, empty: Collection[int]) -> list[int]:
    """Nodes by phase. At the same phase: empty ones, older layers, then sequential order.

    An empty node that shares its phase with the start of another one must not wait for its end.
    """
    placed = phases(solution)
    nodes = sorted(range(len(placed)), key=lambda node: placed[node][0])
    rank: dict[int, int] = {}
    for before, node in zip([nodes[0], *nodes], nodes, strict=False):
        is_later = placed[node][0] - placed[before][0] > SLACK
        rank[node] = rank.get(before, 0) + is_later
    return sorted(nodes, key=lambda n: (rank[n], n not in empty, -placed[n][1], n))
