"""The best members of the ping-pong family on a coarse grid, before anything is refined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from ..runtime.legality import check
from ..runtime.plan import Candidate
from ..runtime.schedule import IllegalScheduleError
from .baselines import PingPongChoice, PingPongOrder, ping_pong, whole_gpu_choice
from .patterns import COMPUTE, MEMORY, NETWORK
from .refine import Family
from .simulator import predict

FORMED = 8
"""Best members of the grid that are tried in all forms of the attention's output."""
Ranked = list[tuple[PingPongChoice, Candidate]]


def best_of_grid(family: Family) -> Ranked:
    """The best member of each kind, best first: on partitions, and on the whole GPU.

    Half splits, all orders and shares that fit, in the layer's own form; the best few of each kind
    in the other forms too. The second kind is there where collectives can go without SMs, as how
    much it hides is better measured than predicted.
    """
    found = _ranked(family, _grid(family))
    whole = [choice for choice, _ in found if choice.order == "alternating"]
    parted = [choice for choice, _ in found if choice.order != "alternating"]
    forms = list(product(family.graph.forms, repeat=2))[1:]
    best_few = product((*whole[:FORMED], *parted[:FORMED]), forms)
    found += _ranked(family, (replace(choice, forms=pair) for choice, pair in best_few))
    found.sort(key=lambda pair: pair[1].predicted.period_us)
    names = dict.fromkeys(candidate.schedule.name for _, candidate in found)
    return [next(pair for pair in found if pair[1].schedule.name == name) for name in names]


def _grid(family: Family) -> Iterator[PingPongChoice]:
    num_sms = family.cost_model.hardware.num_sms
    half = min(family.first_tokens(), key=lambda n: abs(2 * n - family.mix.tokens))
    if family.is_sm_free:
        for rows in family.space.row_orders:
            yield whole_gpu_choice(half, rows, num_sms)
    orders: tuple[PingPongOrder, ...] = ("blocks", "interleaved")
    shares = product(*(family.shares(lane) for lane in (COMPUTE, MEMORY, NETWORK)))
    for (compute, memory, network), rows, order in product(shares, family.space.row_orders, orders):
        if compute + max(memory, network) > num_sms:
            continue
        yield PingPongChoice(
            first_tokens=half,
            row_order=rows,
            compute_sms=compute,
            memory_sms=memory,
            network_sms=network,
            order=order,
        )


def _ranked(family: Family, choices: Iterable[PingPongChoice]) -> Ranked:
    """Those that may run, with their predictions, best first."""
    graph, cost_model, mix = family.graph, family.cost_model, family.mix
    hardware, found = cost_model.hardware, list[tuple[PingPongChoice, Candidate]]()
    for choice in choices:
        is_whole = choice.order == "alternating"
        name = "overlapped_whole_gpu" if is_whole else "overlapped_ping_pong"
        try:
            schedule = ping_pong(graph, cost_model, mix, choice, name)
            check(schedule, graph, hardware.num_sms, hardware.sm_granularity)
        except IllegalScheduleError:
            continue  # its shares find no places, in any order
        timing = predict(schedule, graph, cost_model, mix)
        found.append((choice, Candidate(schedule=schedule, predicted=timing)))
    return sorted(found, key=lambda pair: pair[1].predicted.period_us)
