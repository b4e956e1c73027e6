"""The two forms of the attention's output: graph, legality, and numerics on gloo ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from builders import GATHER, gathering, gathering_bucket, ping_pong, sequential, tiny_model

from nanoflow_tune.runtime.batching import DenseBatch
from nanoflow_tune.runtime.executor import Executor, Resources
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.launch import RankGroup
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OpGraph, RowMix
from nanoflow_tune.runtime.plan import NanoBatch
from nanoflow_tune.runtime.schedule import (
    IllegalScheduleError,
    data_edges,
    has_o_columns,
    output_forms,
)
from nanoflow_tune.runtime.steady_state import steady_requests
from nanoflow_tune.runtime.verify import cpu_case, verify_schedule
from nanoflow_tune.runtime.weights import random_weights
from nanoflow_tune.search_spaces.loader import load_model

MODEL = tiny_model(num_attention_heads=16, num_key_value_heads=8)
GRAPH = OpGraph.build(MODEL, 2)
PING_PONG = ping_pong(GRAPH, 96, 256, (40, 60))
MIX = RowMix(
    decode_tokens=1024, prefill_tokens=1024, decode_context_tokens=768, prefill_context_tokens=256
)


def test_both_forms_have_the_flops_weights_and_link_bytes_of_one_projection():
    graph = OpGraph.build(load_model("llama2-70b"), 8)
    (chain,) = graph.alternatives
    replaced = [graph.op(name) for name in chain.replaces]
    rows, hidden = MIX.tokens, 8192
    assert [op.name for op in chain.ops] == list(GATHER)
    assert sum(op.weight_elements for op in chain.ops) == hidden * hidden / 8
    multiplied = sum(op.flops(MIX) for op in chain.ops)
    added = graph.op("attn_all_reduce").flops(MIX)
    assert multiplied == 2 * rows * hidden * hidden / 8
    assert multiplied + added == sum(op.flops(MIX) for op in replaced)
    # 64 heads of 128 are as wide as hidden: two gathers of 7/8 send what one all-reduce sends.
    sent = 2 * rows * hidden * 7 / 8
    assert [op.link_bytes(MIX) for op in chain.ops] == [sent, 0, sent]
    assert sum(op.link_bytes(MIX) for op in chain.ops) == replaced[1].link_bytes(MIX)
    gather, projection, _ = chain.ops
    assert gather.memory_bytes(MIX) == 2 * rows * (hidden / 8 + hidden)
    assert projection.memory_bytes(MIX) == 2 * (hidden * hidden / 8 + rows * (hidden + hidden / 8))
    assert projection.shape == "n1024_k8192"


def test_one_rank_and_columns_that_do_not_divide_have_one_form():
    assert OpGraph.build(MODEL).forms == ("all_reduce",)
    assert OpGraph.build(replace(MODEL, hidden_size=33), 2).forms == ("all_reduce",)
    with pytest.raises(ValueError, match=r"`form` must be one of all_reduce on 1 rank"):
        OpGraph.build(MODEL).in_form("all_gather")


def test_a_graph_of_one_form_waits_for_its_own_ops():
    gathered = GRAPH.in_form("all_gather")
    names = list(gathered.op_names)
    assert names[names.index("prefill_attention") + 1 : names.index("ffn_norm")] == list(GATHER)
    assert [on.op for on in gathered.op("ffn_norm").dependencies] == ["o_all_gather"]
    assert GRAPH.in_form("all_reduce").op_names == GRAPH.op_names
    assert gathered.alternatives == ()


def test_what_waits_for_the_output_waits_for_the_form_of_its_rows():
    schedule = gathering(PING_PONG, (True, False))
    place = {(n.op, n.tokens): index for index, n in enumerate(schedule.nano_ops)}
    edges = set(data_edges(schedule, GRAPH))
    a, b = (0, 96), (96, 256)
    assert (place["o_all_gather", a], place["ffn_norm", a], 0) in edges
    assert (place["attn_all_reduce", b], place["ffn_norm", b], 0) in edges
    assert (place["decode_attention", a], place["attn_all_gather", a], 0) in edges
    assert output_forms(schedule, GRAPH) == (("all_gather",), ("all_reduce",))
    assert has_o_columns([schedule])
    assert not has_o_columns([PING_PONG])


def test_a_norm_over_rows_of_both_forms_waits_for_both():
    schedule = gathering(PING_PONG, (True, False))
    norms = [n for n in schedule.nano_ops if n.op == "ffn_norm"]
    whole = replace(norms[1], tokens=(0, 256))
    kept = [n for n in schedule.nano_ops if n.op != "ffn_norm"]
    schedule = replace(schedule, nano_ops=(*kept, whole))
    producers = {
        schedule.nano_ops[before].op
        for before, after, _ in data_edges(schedule, GRAPH)
        if schedule.nano_ops[after].op == "ffn_norm"
    }
    assert producers == {"o_all_gather", "attn_all_reduce"}


@pytest.mark.parametrize("gathers", list(product((False, True), repeat=2)))
def test_every_mix_of_forms_is_legal(gathers):
    check(gathering(PING_PONG, gathers), GRAPH, 132, 8)


def _without(op, tokens):
    schedule = gathering(PING_PONG, (True, False))
    kept = [n for n in schedule.nano_ops if (n.op, n.tokens) != (op, tokens)]
    return replace(schedule, nano_ops=tuple(kept))


def _moved(op, old, new):
    schedule = gathering(PING_PONG, (True, False))
    return replace(
        schedule,
        nano_ops=tuple(
            replace(n, tokens=new) if (n.op, n.tokens) == (op, old) else n
            for n in schedule.nano_ops
        ),
    )


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (_without("o_all_gather", (0, 96)), r"o_all_gather miss the rows \[0, 96\); rows take one"),
        (_without("o_proj", (96, 256)), r"o_proj miss the rows \[96, 256\)"),
        # Then o_proj and its all-reduce would have to take these rows.
        (_without("attn_all_gather", (0, 96)), r"o_proj miss rows: \[96, 256\) where row 0 comes"),
        (_moved("o_proj", (96, 256), (64, 256)), r"o_proj overlap: \[64, 256\) where row 96"),
        (_moved("o_proj_columns", (0, 96), (0, 97)), r"o_proj_columns hold rows of another form"),
        (_moved("attn_all_gather", (0, 96), (0, 97)), r"o_proj overlap: \[96, 256\) where row 97"),
    ],
)
def test_rows_of_no_form_or_of_two_are_refused(schedule, message):
    with pytest.raises(IllegalScheduleError, match=message):
        check(schedule, GRAPH, 132, 8)


def test_one_rank_has_no_all_gather():
    schedule = gathering(ping_pong(OpGraph.build(MODEL), 96, 256, (40, 60)), (True, True))
    with pytest.raises(IllegalScheduleError, match="unknown op 'attn_all_gather'"):
        check(schedule, OpGraph.build(MODEL), 132, 8)


def test_random_weights_of_the_second_form_are_the_same_matrix_cut_the_other_way():
    cpu = torch.device("cpu")
    whole = random_weights(MODEL, device=cpu, seed=4)
    ranks = [
        random_weights(MODEL, rank=r, tp_degree=4, device=cpu, seed=4, with_o_columns=True)
        for r in range(4)
    ]
    for layer, full in enumerate(whole.layers):
        parts = [rank.layers[layer] for rank in ranks]
        assert torch.equal(torch.cat([part.o_proj_DQ for part in parts], dim=1), full.o_proj_DQ)
        assert torch.equal(torch.cat([part.o_columns_WA for part in parts]), full.o_proj_DQ)
    assert whole.layers[0].o_columns_WA is None


def executor_of(rows: int, gathers: bool, with_o_columns: bool = True) -> Executor:
    """One rank's executor of a sequential schedule, not to be run."""
    cpu = torch.device("cpu")
    half = rows // 2
    mix = replace(MIX, decode_tokens=half, prefill_tokens=half, decode_context_tokens=9)
    mix = replace(mix, prefill_context_tokens=2.5)
    cache = PagedKvCache(MODEL, num_pages=64, device=cpu, tp_degree=2)
    requests = steady_requests(mix, cache, vocab_size=61, seed=0, mixed_lengths=False)
    batches = (NanoBatch(tokens=(0, rows), decode_tokens=half),)
    batch = DenseBatch.build(batches, requests, page_size=cache.page_size, device=cpu)
    weights = random_weights(MODEL, tp_degree=2, device=cpu, with_o_columns=with_o_columns)
    schedule = gathering(sequential(GRAPH, rows, half), (gathers,))
    resources = Resources(groups={"compute": None})
    return Executor(GRAPH, weights, cache, batch, schedule, resources)


def test_a_schedule_that_gathers_asks_for_the_second_form_of_the_weights():
    with pytest.raises(ValueError, match="make them with `with_o_columns`"):
        executor_of(8, gathers=True, with_o_columns=False)


def test_executors_that_share_buffers_get_those_of_their_form():
    plain, gathering_one = (executor_of(16, gathers).prepare() for gathers in (False, True))
    assert plain.buffers.heads_TA is None
    smaller = executor_of(8, gathers=True).prepare(shares_with=plain)
    assert smaller.buffers.heads_TA.shape == (8, MODEL.qo_size)
    assert smaller.buffers.qkv_TC.data_ptr() == plain.buffers.qkv_TC.data_ptr()
    assert smaller.buffers.o_TD.data_ptr() != plain.buffers.o_TD.data_ptr()
    for gathers in (False, True):
        smaller = executor_of(8, gathers).prepare(shares_with=gathering_one)
        for name in ("heads_TA", "o_columns_TW", "o_TD"):
            own, shared = (getattr(e.buffers, name) for e in (smaller, gathering_one))
            assert own.data_ptr() == shared.data_ptr()


@pytest.mark.parametrize("tp_degree", [2, 4, 8])
def test_forms_and_mixes_are_verified_on_every_rank(tp_degree):
    graph = OpGraph.build(MODEL, tp_degree)
    schedules = [gathering(sequential(graph, 64, 40), (True,))]
    mixes = ((True, False), (True, True), (False, True)) if tp_degree == 2 else ((True, False),)
    for gathers in mixes:
        schedules.append(gathering(ping_pong(graph, 24, 64, (10, 16)), gathers))
    with RankGroup(tp_degree) as ranks:
        for schedule in schedules:
            case = replace(cpu_case(MODEL, schedule, tp_degree), num_random_orders=1)
            results = ranks.call(verify_schedule, case)
            assert [result.num_ranks for result in results] == [tp_degree] * tp_degree
            assert all(result.max_relative_error <= 1e-5 for result in results)
            assert all(result.max_reference_error <= 1e-5 for result in results)
        if tp_degree == 2:  # behind experts nothing changes
            model = tiny_model("mixtral", num_attention_heads=16, num_key_value_heads=8)
            schedule = ping_pong(OpGraph.build(model, 2), 24, 64, (10, 16))
            case = cpu_case(model, gathering(schedule, (True, False)), 2)
            assert all(result.passed for result in ranks.call(verify_schedule, case))


def test_a_plan_that_gathers_is_written_read_and_verified(tmp_path):
    from engine_builders import bucket, plan_of

    from nanoflow_tune.runtime.plan_io import dump_plan, load_plan
    from nanoflow_tune.runtime.verify import verify_plan
    from nanoflow_tune.search_spaces.loader import load_hardware

    own = gathering_bucket(bucket(GRAPH, 64, 32))
    plan, hardware = plan_of(MODEL, 2, (own,)), load_hardware("h200")
    dump_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml", GRAPH, hardware) == plan
    with RankGroup(2) as ranks:
        verified = verify_plan(plan, MODEL, hardware, ranks)
    assert all(record.passed for record in verified.buckets[0].verification)
    with pytest.raises(IllegalScheduleError, match="unknown op 'attn_all_gather'"):
        load_plan(tmp_path / "plan.yaml", OpGraph.build(MODEL), hardware)
