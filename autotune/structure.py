"""The structure search: build the MILP, start it from what is known, read the schedule back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.plan import Schedule
from ..runtime.schedule import IllegalScheduleError
from ..search_spaces.schema import SearchSpace
from .cost_model import CostModel
from .milp import Certificate, Model, Solution, issue_order, phases
from .milp_agreement import LARGEST_DIFFERENCE, MOST_ROUNDS, Agreement, agreement
from .milp_input import Split, build_instance, forms_of, split_candidates
from .milp_repricing import PricedAgain, solved_again
from .milp_start import start_from
from .patterns import Placed, batch_mix, build_schedule, macro_ops, split_batches


def find_structure(
    graph: OpGraph,
    cost_model: CostModel,
    space: SearchSpace,
    mix: RowMix,
    *,
    seed: int,
    known: Sequence[Schedule] = (),
    least_batches: int = 1,
) -> tuple[Schedule | None, Certificate]:
    """The schedule of the shortest period the MILP finds, and what it proved.

    Args:
        graph: of one rank.
        cost_model: durations and slowdowns.
        space: shares, granularity, limits.
        mix: rows of the dense batch.
        seed: of the solver.
        known: schedules to start from, best first; the first that fits the candidates is used.
        least_batches: 2 leaves out the single nano-batch.

    Returns:
        No schedule when the solver found none, or one that no SM partition can hold.
    """
    splits = split_candidates(space, mix, least_batches)
    starts = (start_from(schedule, graph, cost_model, mix, splits) for schedule in known)
    start = next((found for found in starts if found is not None), None)
    wanted: dict[str, set[int]] = {}
    macros = macro_ops(graph)
    for node, share in start.share.items() if start else ():
        wanted.setdefault(macros[node % len(macros)].lane, set()).add(share)
    instance = build_instance(graph, cost_model, space, mix, splits, wanted)
    solution, certificate = Model(instance).solve(
        space.milp_time_limit_s, space.milp_relative_gap, seed, start
    )
    found: list[tuple[Schedule, Agreement, float]] = []
    period_us, solver_s = certificate.period_us, certificate.seconds
    while solution is not None:
        split = splits[solution.split]
        try:
            schedule = schedule_of(solution, split, graph, cost_model, mix)
        except IllegalScheduleError:  # its shares find no places, in any order
            break
        both = agreement(schedule, graph, cost_model, mix)
        found.append((schedule, both, period_us))
        is_agreed = abs(period_us / both.simulated_us - 1) <= LARGEST_DIFFERENCE
        if is_agreed or len(found) > MOST_ROUNDS:
            break
        priced = PricedAgain(instance, solution, both.node_us(schedule, graph))
        known_start = start_from(schedule, graph, cost_model, mix, (split,))
        solution, period_us, seconds = solved_again(priced, seed, known_start)
        solver_s += seconds
    if not found:
        return None, certificate
    schedule, both, period_us = min(found, key=lambda one: one[1].simulated_us)
    if abs(period_us / both.simulated_us - 1) > LARGEST_DIFFERENCE:  # its prices are another's
        period_us = both.same_interference_us
    return schedule, replace(
        certificate,
        simulated_us=both.simulated_us,
        same_interference_us=period_us,
        rounds=len(found) - 1,
        seconds=solver_s,
    )


def schedule_of(
    solution: Solution, split: Split, graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> Schedule:
    """Write a solution down as one period."""
    macros, placed = macro_ops(graph), phases(solution)
    batches = split_batches(split.sizes, split.row_order, mix)
    nodes = [(batch, macro) for batch in range(len(split.sizes)) for macro in range(len(macros))]
    chosen = solution.is_form_1 or (False,) * len(split.sizes)
    forms = forms_of(graph, chosen)
    rows = [
        sum(op.rows(batch_mix(batches[batch], mix)) for op in macros[macro].ops_of(forms[batch]))
        if split.sizes[batch]
        else 0
        for batch, macro in nodes
    ]
    empty = {node for node, count in enumerate(rows) if not count}
    places = [
        Placed(
            macro=nodes[node][1],
            batch=nodes[node][0],
            stage=placed[node][1],
            num_sms=solution.share[node],
        )
        for node in issue_order(solution, empty)
        if split.sizes[nodes[node][0]]
    ]
    name = "overlapped_milp" if len(batches) > 1 else "single_batch_milp"
    schedule = build_schedule(name, cost_model, graph, mix, batches, places, forms=forms)
    is_in_turn = len(batches) > 1 and not schedule.is_overlapped
    return replace(schedule, name="nano_only_milp") if is_in_turn else schedule
