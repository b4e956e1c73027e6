from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.autotune.cost_model import CostModel, Estimate
from nanoflow_tune.autotune.pd_curves import ALONE, Contexts, PdCurves
from nanoflow_tune.autotune.pd_divisions import (
    LimitNotMetError,
    divisions,
    possible_divisions,
)

from .fakes import graph_of, h200, linear_profile


@dataclass
class HandCurves:
    """A decode step takes decodes / SMs ms, a prefill 1000 / SMs ms."""

    prefill_tokens: int = 1000

    def decode_step(self, decodes, decode_sms, prefill_sms):
        return Estimate(1e3 * decodes / decode_sms, 0.0, "measured")

    def prefill(self, tokens, prefill_sms, decodes, decode_sms):
        return Estimate(1e3 * tokens / prefill_sms, 0.0, "interpolated")


def test_possible_divisions_are_what_the_driver_makes_of_a_hopper():
    found = possible_divisions(132, 8, 16)
    assert found[0] == (16, 116)
    assert found[-1] == (112, 20)
    assert len(found) == 13
    assert possible_divisions(132, 8, 0)[-1] == (120, 12)


def test_rows_give_decode_as_few_sms_as_the_limit_allows():
    candidates = [(24, 8), (16, 16), (8, 24)]
    rows = divisions(HandCurves(), candidates, limit_us=4e3, max_decodes=80, max_rows=8)
    # 4 ms: 32 decodes on 8 SMs, 64 on 16, 96 on 24 (of which 80 are asked about).
    table = [(r.prefill_sms, r.decode_sms, r.least_decodes, r.most_decodes) for r in rows]
    assert table == [(24, 8, 1, 32), (16, 16, 33, 64), (8, 24, 65, 80)]
    assert [row.decode_step_us for row in rows] == pytest.approx([4e3, 4e3, 80 / 24 * 1e3])
    assert rows[0].prefill_tokens_per_s == pytest.approx(24_000)
    assert {row.source for row in rows} == {"interpolated"}


def test_no_row_is_added_once_all_decodes_are_served():
    rows = divisions(
        HandCurves(), [(24, 8), (16, 16), (8, 24)], limit_us=20e3, max_decodes=100, max_rows=8
    )
    assert [row.decode_sms for row in rows] == [8]


def test_a_limit_that_nothing_keeps_is_refused_with_what_would_be_needed():
    with pytest.raises(LimitNotMetError, match=r"--tpot-ms 0.01, but one request.*larger"):
        divisions(HandCurves(), [(24, 8), (8, 24)], limit_us=10, max_decodes=8, max_rows=8)


@given(
    limit_ms=st.floats(0.2, 50),
    max_decodes=st.integers(1, 900),
    max_rows=st.integers(1, 10),
    num_sms=st.sampled_from([108, 132]),
)
def test_every_table_is_one_that_the_scheduler_can_use(limit_ms, max_decodes, max_rows, num_sms):
    candidates = possible_divisions(num_sms, 8, 16)
    try:
        rows = divisions(
            HandCurves(),
            candidates,
            limit_us=1e3 * limit_ms,
            max_decodes=max_decodes,
            max_rows=max_rows,
        )
    except LimitNotMetError:
        return
    assert 1 <= len(rows) <= max_rows
    assert rows[0].least_decodes == 1
    for row, following in pairwise(rows):
        assert following.least_decodes == row.most_decodes + 1
        assert following.decode_sms > row.decode_sms
    for row in rows:
        assert row.prefill_sms + row.decode_sms == num_sms
        assert row.decode_step_us <= 1e3 * limit_ms
        assert row.least_decodes <= row.most_decodes <= max_decodes


@pytest.fixture(scope="module")
def curves():
    graph = graph_of("llama3-8b")
    cost_model = CostModel(linear_profile(graph), h200())
    contexts = Contexts(decode_context_tokens=768, prefill_context_tokens=256.5)
    return PdCurves(graph, cost_model, contexts, 1024)


def test_a_step_alone_is_the_sum_of_its_ops(curves):
    mix = curves.contexts.mix(256, 0)
    cost_model, graph = curves.cost_model, curves.graph
    layer = sum(
        cost_model.best(op, mix, 132)[1].us for op in graph.layer if op.kind != "prefill_attention"
    )
    expected = 32 * layer + cost_model.iteration_overhead_us(graph, mix)
    assert curves.decode_step(256, 132, ALONE).us == pytest.approx(expected)


def test_neighbours_slow_both_jobs_by_their_measured_pairs(curves):
    alone = curves.decode_step(256, 32, ALONE).us
    assert curves.decode_step(256, 32, 100).us > alone
    fill = curves.prefill(1024, 100, 256, ALONE).us
    assert curves.prefill(1024, 100, 256, 32).us > fill


def test_divided_work_ends_when_both_are_done_and_not_before(curves):
    division = 100, 32
    step = curves.decode_step(512, 32, 100).us
    fill = curves.prefill(1024, 100, 512, 32).us
    together = curves.divided_us(512, 1024, division)
    assert min(step, fill) <= together <= max(step, fill) * 1.5


def test_no_work_is_faster_than_its_joules_at_the_cap(curves):
    fill = curves.prefill(1024, 132, 1, ALONE)
    energy = curves.cost_model.energy
    dynamic = fill.joules - energy.static_w * fill.us * 1e-6
    assert curves.mixed_us(512, 1024) >= 1e6 * dynamic / (700 - energy.static_w)
