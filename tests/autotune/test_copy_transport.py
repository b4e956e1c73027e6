"""Transports without SMs: what they cost, what they leave to the norm, and when they win."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.baselines import nano_only, ping_pong, sequential, whole_gpu_choice
from nanoflow_tune.autotune.copy_transport import as_sent, norm_behind, ops_as_run, summing
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.patterns import COMPUTE, MEMORY, NETWORK, has_sm_free, legal_shares
from nanoflow_tune.autotune.roofline import memory_share, roofline_us
from nanoflow_tune.autotune.search import overlaps, search
from nanoflow_tune.autotune.simulator import Simulator, predict, simulate
from nanoflow_tune.profiler.profile import Profile
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_shapes import moved_bytes
from nanoflow_tune.runtime.plan import NanoOp, Schedule

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, reduce_profile, row_of

GRAPH = graph_of("llama2-70b", 2)
REDUCE, NORM = GRAPH.op("attn_all_reduce"), GRAPH.op("ffn_norm")
PROFILE = reduce_profile(GRAPH, nccl_us_per_row=0.10, copy_us_per_row=0.08)
COSTS = CostModel(PROFILE, h200())
SHORT_KEYS = replace(MIX, decode_context_tokens=64)
"""Decode attention takes next to nothing, so that hiding it gains nothing."""


def costs_of(profile: Profile) -> CostModel:
    """Without power, which would hide how the times compare."""
    costs = CostModel(profile, h200())
    costs.energy = None
    return costs


def nano_ops(schedule: Schedule, op: str) -> list[NanoOp]:
    return [nano_op for nano_op in schedule.nano_ops if nano_op.op == op]


@pytest.mark.parametrize(("ranks", "passes"), [(2, 5), (4, 7), (8, 11)])
def test_the_norm_behind_reads_the_rows_of_every_peer(ranks: int, passes: int):
    graph = graph_of("llama2-70b", ranks)
    norm = norm_behind(graph.op("attn_all_reduce"), graph)
    assert norm.name == "ffn_norm"
    assert norm_behind(graph.op("ffn_all_reduce"), graph).name == "attn_norm"
    longer = summing(norm, ranks)
    row_bytes = 2 * 8192 * MIX.tokens
    assert moved_bytes(norm, MIX, "triton") == 4 * row_bytes
    assert moved_bytes(longer, MIX, "triton") == passes * row_bytes
    sent = as_sent(graph.op("attn_all_reduce"), "copy_engine")
    assert sent.link_bytes(MIX) == (ranks - 1) * row_bytes
    assert sent.memory_bytes(MIX) == 2 * (ranks - 1) * row_bytes
    assert as_sent(sent, "nccl") is sent


def test_time_and_joules_of_that_norm_grow_with_its_bytes():
    plain, longer = (COSTS.estimate(op, MIX, 132, "triton") for op in (NORM, summing(NORM, 2)))
    assert plain.source == "measured"
    assert longer.source == "interpolated"
    assert longer.us == pytest.approx(5 / 4 * plain.us)
    assert COSTS.sum_us(NORM, 2, MIX) == pytest.approx(plain.us / 4)
    static_j = [117e-6 * estimate.us for estimate in (plain, longer)]
    dynamic_j = [e.joules - static for e, static in zip((plain, longer), static_j, strict=True)]
    assert dynamic_j[1] == pytest.approx(5 / 4 * dynamic_j[0])


def test_only_norms_behind_a_reduction_without_sms_are_longer_in_a_schedule():
    schedule = nano_only(GRAPH, COSTS, MIX)
    mixed = tuple(
        replace(n, variant="nccl", num_sms=132) if n.op == "ffn_all_reduce" else n
        for n in schedule.nano_ops
    )
    for nano_op, op in zip(
        mixed, ops_as_run(replace(schedule, nano_ops=mixed), GRAPH), strict=True
    ):
        longer = summing(NORM, 2).row_elements
        expected = longer if nano_op.op == "ffn_norm" else GRAPH.op(nano_op.op).row_elements
        assert op.row_elements == expected


def test_variants_without_sms_run_on_a_share_of_0_and_all_others_on_more():
    assert COSTS.variants(REDUCE, 0) == ("copy_engine",)
    assert COSTS.variants(REDUCE, 16) == COSTS.variants(REDUCE, 132) == ("nccl",)
    assert COSTS.best(REDUCE, MIX, 0)[0] == "copy_engine"
    assert COSTS.best(REDUCE, MIX, 0)[1].us == pytest.approx(5 + 0.08 * 2048)
    between = replace(MIX, decode_tokens=512.0)
    assert COSTS.estimate(REDUCE, between, 0, "copy_engine").us == pytest.approx(5 + 0.08 * 1536)
    assert COSTS.variants(NORM, 0) == ()
    with pytest.raises(ValueError, match="a share of 0 is for variants that take no SMs"):
        COSTS.best(NORM, MIX, 0)


def test_rows_of_copy_engines_on_sms_are_not_looked_at():
    row = next(row for row in PROFILE.rows if row.point.variant == "copy_engine")
    odd = row_of(replace(row.point, num_sms=16), 1.0)
    model = CostModel(replace(PROFILE, rows=(*PROFILE.rows, odd)), h200())
    assert model.variants(REDUCE, 16) == ("nccl",)


def test_a_collective_is_not_offered_on_fewer_sms_than_it_was_measured_on():
    row = next(row for row in PROFILE.rows if row.point.variant == "nccl")
    wide = row_of(replace(row.point, variant="symm_one_shot_32", num_sms=32), 1.0)
    model = CostModel(replace(PROFILE, rows=(*PROFILE.rows, wide)), h200())
    assert model.variants(REDUCE, 16) == ("nccl",)
    assert model.variants(REDUCE, 32) == ("nccl", "symm_one_shot_32")


def test_other_numbers_of_ranks_send_whole_rows_to_every_peer():
    four = graph_of("llama2-70b", 4).op("attn_all_reduce")
    two_us = COSTS.estimate(REDUCE, MIX, 0, "copy_engine").us
    assert COSTS.estimate(four, MIX, 0, "copy_engine").us == pytest.approx(3 * two_us)


def test_copy_engines_fill_the_link_on_the_roofline():
    hardware = h200()
    us = roofline_us(as_sent(REDUCE, "copy_engine"), MIX, 0, hardware, "bfloat16")
    assert us == pytest.approx(1e6 * 2 * 8192 * 2048 / hardware.link_bytes_per_s)
    assert memory_share(0, hardware) == pytest.approx(900 / 4800, rel=0.02)


def test_beside_copies_kernels_share_the_bandwidth_unless_pairs_were_measured():
    up_gate, decode = GRAPH.op("up_gate"), GRAPH.op("decode_attention")
    shared = 1 + memory_share(0, h200())
    assert COSTS.slowdown(up_gate, 132, REDUCE, 0) == pytest.approx(shared)
    assert COSTS.slowdown(REDUCE, 0, up_gate, 132) == pytest.approx(shared)
    assert COSTS.slowdown(decode, 16, REDUCE, 0) == 1.0
    assert COSTS.slowdown(up_gate, 116, REDUCE, 16) == 1.03  # NCCL's pair
    pair = reduce_profile(
        GRAPH, nccl_us_per_row=0.1, copy_us_per_row=0.1, slowdown_beside_copies=1.4
    )
    measured = CostModel(pair, h200())
    assert measured.slowdown(up_gate, 132, REDUCE, 0) == 1.4
    assert measured.slowdown(GRAPH.op("kqv"), 116, REDUCE, 0) == 1.4
    assert measured.slowdown(up_gate, 116, REDUCE, 16) == 1.03


@pytest.mark.parametrize("part", [0.9, 1.1])
def test_sequential_takes_copy_engines_when_they_win_with_the_sum_in_the_norm(part: float):
    """NCCL takes as long as the copies and `part` of the longer norm."""
    sum_us = COSTS.sum_us(NORM, 2, MIX)
    made = reduce_profile(GRAPH, nccl_us_per_row=0.08 + part * sum_us / 2048, copy_us_per_row=0.08)
    costs = costs_of(made)
    schedule = sequential(GRAPH, costs, MIX)
    check(schedule, GRAPH, 132, 8)
    assert schedule.lanes == ("compute",)
    chosen = ("copy_engine", 0) if part > 1 else ("nccl", 132)
    for op in ("attn_all_reduce", "ffn_all_reduce"):
        (nano_op,) = nano_ops(schedule, op)
        assert (nano_op.variant, nano_op.num_sms) == chosen
    free = replace(
        schedule,
        nano_ops=tuple(
            replace(n, variant="copy_engine", num_sms=0) if "all_reduce" in n.op else n
            for n in schedule.nano_ops
        ),
    )
    on_sms = replace(
        schedule,
        nano_ops=tuple(
            replace(n, variant="nccl", num_sms=132) if "all_reduce" in n.op else n
            for n in schedule.nano_ops
        ),
    )
    periods = [predict(s, GRAPH, costs, MIX).period_us for s in (free, on_sms)]
    assert predict(schedule, GRAPH, costs, MIX).period_us == min(periods)
    layers = GRAPH.num_layers
    assert periods[0] - periods[1] == pytest.approx(2 * layers * (1 - part) * sum_us, rel=1e-3)


def test_one_lane_has_one_stream_for_all_sms_and_for_none():
    schedule = sequential(GRAPH, COSTS, MIX)
    assert {n.num_sms for n in schedule.nano_ops} == {0, 132}
    times = [simulate(schedule, GRAPH, COSTS, MIX, sync_us=us).period_us for us in (0.0, 9.0)]
    assert times[0] == times[1]


def test_the_network_lane_may_take_no_sms_where_the_profile_has_such_a_variant():
    space = quick_space(network_sm_shares=(8, 16))
    assert has_sm_free(GRAPH, COSTS)
    assert legal_shares(NETWORK, h200(), space, True) == [0, 8, 16]
    assert legal_shares(NETWORK, h200(), space) == [8, 16]
    for lane in (COMPUTE, MEMORY):
        assert legal_shares(lane, h200(), space, True) == legal_shares(lane, h200(), space)
    assert not has_sm_free(GRAPH, CostModel(linear_profile(GRAPH), h200()))
    assert not has_sm_free(GRAPH, CostModel(None, h200()))
    assert not has_sm_free(graph_of("llama2-70b", 1), COSTS)


@pytest.mark.parametrize("row_order", ["decodes_first", "interleaved"])
def test_on_the_whole_gpu_every_collective_runs_beside_the_other_nano_batch(row_order: str):
    choice = whole_gpu_choice(1024, row_order, 132)  # pyright: ignore[reportArgumentType]
    schedule = ping_pong(GRAPH, COSTS, MIX, choice)
    check(schedule, GRAPH, 132, 8)
    assert schedule.lanes == ("compute", "network")
    assert all(n.after == () for n in schedule.nano_ops)
    assert {n.num_sms for n in schedule.nano_ops if n.lane == "compute"} == {132}
    assert {n.num_sms for n in schedule.nano_ops if n.lane == "network"} == {0}
    assert schedule.is_overlapped
    assert overlaps(schedule, GRAPH)
    events = Simulator(schedule, GRAPH, COSTS, MIX).events(6)
    compute = [e for e in events if e.lane == "compute"]
    for event in (e for e in events if e.lane == "network" and e.layer in (2, 3)):
        mine = schedule.nano_ops[event.index].tokens
        beside = [e for e in compute if e.start_us < event.end_us and e.end_us > event.start_us]
        assert beside
        assert all(schedule.nano_ops[e.index].tokens != mine for e in beside)


def test_lanes_that_find_no_places_take_turns_and_not_with_what_needs_no_place():
    """60 and 68 SMs both need the remainder of the split."""
    choice = replace(
        whole_gpu_choice(1024, "interleaved", 132),
        compute_sms=68,
        memory_sms=60,
        order="interleaved",
    )
    schedule = ping_pong(GRAPH, COSTS, MIX, choice)
    check(schedule, GRAPH, 132, 8)
    ordered = {nano_op.lane for nano_op in schedule.nano_ops if nano_op.after}
    assert ordered == {"compute", "memory"}


def test_when_the_reduction_is_long_the_whole_gpu_wins_the_search():
    made = reduce_profile(GRAPH, nccl_us_per_row=0.30, copy_us_per_row=0.30)
    space = quick_space(sm_shares=(16, 32, 100, 116), milp_time_limit_s=3.0, simulator_trials=6)
    result = search(GRAPH, costs_of(made), h200(), space, SHORT_KEYS, seed=0)
    best = {}
    for candidate in result.race:
        check(candidate.schedule, GRAPH, 132, 8)
        assert candidate.predicted.period_us >= result.lower_bound_us
        name, us = candidate.schedule.name, candidate.predicted.period_us
        best[name] = min(us, best.get(name, us))
    assert best["overlapped_whole_gpu"] < best["overlapped_ping_pong"]
    assert best["overlapped_whole_gpu"] < 0.9 * best["sequential"]
    won = result.winner.schedule
    assert won.is_overlapped
    assert {n.num_sms for n in won.nano_ops} == {0, 132}
    assert result.certificate.bound_us <= result.certificate.period_us + 1e-6


@pytest.mark.parametrize(("copy_us_per_row", "slowdown"), [(0.005, 1.1), (0.30, 2.5)])
def test_when_splitting_or_interference_costs_more_the_whole_gpu_loses(
    copy_us_per_row: float, slowdown: float
):
    made = reduce_profile(
        GRAPH,
        nccl_us_per_row=copy_us_per_row,
        copy_us_per_row=copy_us_per_row,
        slowdown_beside_copies=slowdown,
    )
    costs, few = costs_of(made), replace(SHORT_KEYS, decode_tokens=256.0, prefill_tokens=256.0)
    base = predict(sequential(GRAPH, costs, few), GRAPH, costs, few)
    choice = whole_gpu_choice(256, "interleaved", 132)
    whole = predict(ping_pong(GRAPH, costs, few, choice), GRAPH, costs, few)
    assert whole.period_us > base.period_us


def test_one_gpu_has_no_whole_gpu_ping_pong():
    graph = graph_of("llama3-8b")
    space = quick_space(milp_time_limit_s=1.0, simulator_trials=4)
    costs = CostModel(linear_profile(graph), h200())
    result = search(graph, costs, h200(), space, MIX, seed=0)
    assert "overlapped_whole_gpu" not in {c.schedule.name for c in result.race}
