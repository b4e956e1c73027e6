"""The structure MILP against brute force over every share, order, stage and split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.autotune.brute_force import random_instance, shortest_period_us
from nanoflow_tune.autotune.milp import Model
from nanoflow_tune.autotune.milp_input import Edge, Instance


def chain(lanes: tuple[str, ...], us: tuple[float, ...], shares: tuple[int, ...]) -> Instance:
    """One nano-batch of ops that each wait for the one before, around the layer."""
    count = len(lanes)
    return Instance(
        num_sms=132,
        lanes=lanes,
        shares=tuple((share,) for share in shares),
        edges=tuple(
            Edge(before=i, after=(i + 1) % count, layer_distance=int(i == count - 1))
            for i in range(count)
        ),
        num_splits=1,
        duration_us={(i, 0, share): us[i] for i, share in enumerate(shares)},
        floor_us=(0.0,),
    )


@given(st.integers(min_value=0, max_value=2**31))
@settings(max_examples=200, deadline=None)
def test_no_order_share_or_split_is_better_than_the_milps(seed: int):
    instance = random_instance(seed)
    exact_us = shortest_period_us(instance)
    solution, certificate = Model(instance).solve(60.0, 1e-6, 0)
    assert solution is not None
    assert abs(certificate.period_us - exact_us) <= 1e-3 * exact_us
    assert certificate.bound_us <= exact_us * (1 + 1e-3)


def test_brute_force_adds_up_what_waits_in_a_ring():
    instance = chain(("compute", "memory"), (3.0, 4.0), (132, 32))
    assert shortest_period_us(instance) == pytest.approx(7.0, rel=1e-6)


def test_brute_force_overlaps_two_chains_that_fit_and_takes_turns_where_they_do_not():
    """Two nano-batches of compute 6 us and memory 4 us: 12 us when they fit, 20 us when not."""
    one = chain(("compute", "memory"), (6.0, 4.0), (100, 32))

    def doubled(memory_sms: int) -> Instance:
        edges = [
            *one.edges,
            *(
                Edge(before=e.before + 2, after=e.after + 2, layer_distance=e.layer_distance)
                for e in one.edges
            ),
        ]
        shares = ((100,), (memory_sms,)) * 2
        return Instance(
            num_sms=132,
            lanes=one.lanes * 2,
            shares=shares,
            edges=tuple(edges),
            num_splits=1,
            duration_us={(n, 0, s[0]): (6.0, 4.0)[n % 2] for n, s in enumerate(shares)},
            floor_us=(0.0,),
        )

    assert shortest_period_us(doubled(32)) == pytest.approx(12.0, rel=1e-6)
    assert shortest_period_us(doubled(40)) == pytest.approx(20.0, rel=1e-6)
