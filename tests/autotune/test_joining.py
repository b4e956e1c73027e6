"""Joined GEMMs: their order, what is left alone, and that a joined plan computes the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from nanoflow_tune.autotune.joining import joined_gemms, joins
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.runtime.verify import cpu_case, verify_schedule
from nanoflow_tune.search_spaces.loader import load_model

MODEL = replace(
    load_model("llama3-8b"),
    hidden_size=64,
    intermediate_size=128,
    vocab_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
)
GRAPH = OpGraph.build(MODEL)
CUT = (0, 24), (24, 40)
SMS = 132


def in_turn(**changes):
    """Each op of the first nano-batch, then of the second one: block by block."""
    head = [op for op in GRAPH.layer if op.name not in ("ffn_norm", "up_gate", "down")]
    tail = [op for op in GRAPH.layer if op not in head]
    nano_ops = tuple(
        NanoOp(op=op.name, tokens=tokens, lane="compute", num_sms=SMS, variant="torch", **changes)
        for block in (head, tail)
        for tokens in CUT
        for op in block
    )
    batches = tuple(NanoBatch(tokens=tokens, decode_tokens=8) for tokens in CUT)
    return Schedule(name="in_turn", nano_batches=batches, nano_ops=nano_ops)


def is_legal(schedule):
    try:
        check(schedule, GRAPH, SMS, 8)
    except ValueError:
        return False
    return True


def names(schedule):
    return [(nano_op.op, nano_op.tokens) for nano_op in schedule.nano_ops]


def test_each_gemm_joins_behind_both_inputs_and_before_both_readers():
    legal = [schedule for schedule in joins(in_turn(), GRAPH) if is_legal(schedule)]
    whole = {op for s in legal for op, tokens in names(s) if tokens == (0, 40)}
    assert whole == {"kqv", "o_proj", "up_gate", "down"}
    (order,) = {tuple(names(s)) for s in legal if ("up_gate", (0, 40)) in names(s)}
    place = order.index(("up_gate", (0, 40)))
    assert {("ffn_norm", tokens) for tokens in CUT} <= set(order[:place])
    assert {("down", tokens) for tokens in CUT} <= set(order[place:])


def test_joins_that_pay_are_kept_one_after_the_other_and_others_are_not():
    def period_us(schedule):
        if not is_legal(schedule):
            return None
        cost = {"up_gate": 50.0, "down": 30.0, "kqv": 5.0}
        total = sum(cost.get(nano_op.op, 1.0) for nano_op in schedule.nano_ops)
        return total + 10.0 * (("kqv", (0, 40)) in names(schedule))

    found = joined_gemms(in_turn(), GRAPH, period_us)
    assert found is not None
    assert found.name == "in_turn_joined"
    whole = {op for op, tokens in names(found) if tokens == (0, 40)}
    assert whole == {"up_gate", "down", "o_proj"}
    assert joined_gemms(in_turn(), GRAPH, lambda schedule: 1.0) is None


def test_what_edges_name_and_what_lies_in_other_stages_or_lanes_stays_apart():
    schedule = in_turn()
    edge = replace(schedule.nano_ops[-1], after=("up_gate.0",))
    named = replace(schedule, nano_ops=(*schedule.nano_ops[:-1], edge))
    assert not any(("up_gate", (0, 40)) in names(s) for s in joins(named, GRAPH))
    moved = tuple(
        replace(op, lane="memory") if op.tokens == CUT[1] else op for op in schedule.nano_ops
    )
    assert not list(joins(replace(schedule, nano_ops=moved), GRAPH))


def test_a_joined_plan_computes_what_the_sequential_one_does():
    found = joined_gemms(in_turn(), GRAPH, lambda s: len(s.nano_ops) if is_legal(s) else None)
    assert found is not None
    assert sum(nano_op.tokens == (0, 40) for nano_op in found.nano_ops) >= 3
    record = verify_schedule(*single_rank(), cpu_case(MODEL, found, 1))
    assert record.passed


def single_rank():
    from nanoflow_tune.runtime.launch import RankContext

    return (RankContext(0, 1, "cpu"),)
