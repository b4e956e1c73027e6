"""The paper's own search problem: durations, R-to-P table, figure 6."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from nanoflow_tune.autotune import paper_costs, paper_mode
from nanoflow_tune.autotune.baselines import sequential
from nanoflow_tune.autotune.capacity import row_mix
from nanoflow_tune.autotune.paper_costs import PaperCosts, performance
from nanoflow_tune.autotune.paper_shares import climb
from nanoflow_tune.autotune.simulator import predict, simulate
from nanoflow_tune.runtime.legality import check, share_conflicts
from nanoflow_tune.runtime.op_graph import OpGraph, RowMix
from nanoflow_tune.runtime.schedule import concurrent_pairs, output_forms
from nanoflow_tune.runtime.schedule import row_mix as rows_of
from nanoflow_tune.search_spaces.loader import load_model, load_workload

COSTS = PaperCosts()
GRAPH = OpGraph.build(load_model("llama2-70b"), 8)
TABLE_2_MIX = RowMix(
    decode_tokens=paper_costs.TABLE_2_DECODES,
    prefill_tokens=2048 - paper_costs.TABLE_2_DECODES,
    decode_context_tokens=1024,
    prefill_context_tokens=256.5,
)
WORKLOADS = ["512-512", "1024-512", "512-1024", "512-0"]
FAST = replace(paper_mode.SPACE, milp_time_limit_s=1.0, simulator_trials=5)


def mix_of(workload: str) -> RowMix:
    return row_mix(load_workload(workload), 2048)


def test_ops_alone_take_what_table_2_says():
    # 16.08 + 16.01 + 69.92 + 34.96 + 35.60 + 4.56 + 47.92 ms
    for form in GRAPH.forms:
        costs = [COSTS.best(op, TABLE_2_MIX, 10)[1].us for op in GRAPH.in_form(form).layer]
        assert 80 * sum(costs) / 1e3 == pytest.approx(225.05, abs=1e-9)


def test_sequential_is_the_sum_of_table_2():
    mix = mix_of("512-1024")  # 1368 decodes: rounded to 8, table 2 has 1365.3
    schedule = sequential(GRAPH, COSTS, mix)
    period_us = predict(schedule, GRAPH, COSTS, mix).period_us
    assert period_us == pytest.approx(225_050, rel=1e-3)
    assert paper_mode.tokens_per_s_per_gpu(period_us) == pytest.approx(1137, abs=1)


@pytest.mark.parametrize(
    ("op", "tenths", "p"),
    [
        ("kqv", 4, 0.4),
        ("prefill_attention", 6, 0.6),
        ("decode_attention", 1, 0.2),
        ("decode_attention", 4, 0.8),
        ("decode_attention", 9, 0.95),
        ("ffn_all_reduce", 1, 0.3),
        ("attn_all_reduce", 2, 0.5),
        ("attn_all_reduce", 9, 1.0),
    ],
)
def test_time_is_solo_time_over_p(op, tenths, p):
    one = GRAPH.op(op)
    assert performance(one, tenths) == p
    whole, part = (COSTS.estimate(one, TABLE_2_MIX, sms, "paper").us for sms in (10, tenths))
    assert part == pytest.approx(whole / p)


def test_a_larger_share_is_never_slower():
    for table in (paper_costs.GEMM_P, paper_costs.MEMORY_P, paper_costs.NETWORK_P):
        assert len(table) == 11
        assert list(table) == sorted(table)
        assert (table[0], table[10]) == (0.0, 1.0)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_figure_6_keeps_the_sum_of_r_within_1(workload):
    mix = mix_of(workload)
    schedule = paper_mode.figure_6(GRAPH, mix)
    assert not share_conflicts(schedule, concurrent_pairs(schedule, GRAPH), 10)
    events = simulate(schedule, GRAPH, COSTS, mix, 4).events
    busy = [event for event in events if event.end_us > event.start_us]
    for event in busy:
        middle = (event.start_us + event.end_us) / 2
        together = [e.num_sms for e in busy if e.start_us <= middle < e.end_us]
        assert sum(together) <= 10
    check(schedule, GRAPH, 1 << 20, 1)  # R has no places on the GPU
    assert output_forms(schedule, GRAPH) == (("all_gather",), ("all_reduce",))
    for op in set(GRAPH.op_names) - {"o_proj", "attn_all_reduce"}:
        ranges = sorted(n.tokens for n in schedule.nano_ops if n.op == op)
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
        assert ranges[-1][1] == 2048
    rows = {n.op: n.tokens for n in schedule.nano_ops}
    assert [rows[op] for op in ("attn_all_gather", "o_proj_columns", "o_all_gather")] == [
        (0, 768)
    ] * 3
    assert [rows[op] for op in ("o_proj", "attn_all_reduce")] == [(768, 2048)] * 2
    counts = Counter(n.op for n in schedule.nano_ops)
    assert (counts["kqv"], counts["decode_attention"], counts["ffn_all_reduce"]) == (4, 4, 3)
    assert counts["up_gate"] == 2
    with_prefill = [
        n
        for n in schedule.nano_ops
        if n.op == "prefill_attention" and rows_of(schedule, n.tokens, 1.0, 1.0).prefill_tokens
    ]
    assert len(with_prefill) == 1


@pytest.mark.parametrize("workload", WORKLOADS)
def test_our_shares_are_never_slower_than_figure_6(workload):
    mix = mix_of(workload)
    drawn = paper_mode.figure_6(GRAPH, mix)
    climbed = climb(drawn, GRAPH, COSTS, mix)
    assert not share_conflicts(climbed, concurrent_pairs(climbed, GRAPH), 10)
    before, after = (predict(s, GRAPH, COSTS, mix).period_us for s in (drawn, climbed))
    assert after <= before
    bound_us = simulate(sequential(GRAPH, COSTS, mix), GRAPH, COSTS, mix).period_us / 2
    assert after > bound_us
    assert climb(drawn, GRAPH, COSTS, mix) == climbed


def test_the_rows_set_predictions_beside_the_papers_measurements():
    result = paper_mode.run_paper("512/512", seed=0, on_progress=lambda _: None, space=FAST)
    values = paper_mode.paper_document(result)
    assert values["found_over_figure_6"] <= 1.0
    assert values["paper_measured"]["nanoflow"] == 1286.0
    assert values["paper_measured"]["non_overlap"] == 1106.0
    rates = {what: rate for what, _, rate in paper_mode.paper_rows(result)}
    assert rates["the paper, NanoFlow, measured (figure 7)"] == "1,286"
    assert rates["the paper, non-overlap, measured (figure 9)"] == "1,106"
    assert rates["sequential, predicted"] == "1,209"


def test_other_workloads_have_no_measurements_beside_them():
    mix = mix_of("sharegpt")
    drawn = predict(paper_mode.figure_6(GRAPH, mix), GRAPH, COSTS, mix).period_us
    result = paper_mode.PaperResult(
        workload="sharegpt",
        decode_tokens=mix.decode_tokens,
        sequential_us=2 * drawn,
        figure_6_us=drawn,
        search_us=drawn,
        search_plan="overlapped_milp",
        shares_us=0.9 * drawn,
        measured=None,
    )
    values = paper_mode.paper_document(result)
    assert values["paper_measured"] is None
    assert values["found_over_figure_6"] == pytest.approx(0.9)
    assert len(paper_mode.paper_rows(result)) == 4
