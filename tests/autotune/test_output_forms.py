"""All-gathers as decisions of the search: costs, macro ops, baselines, MILP, refinement."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import optuna
import pytest

from nanoflow_tune.autotune.baselines import (
    PingPongChoice,
    nano_only,
    ping_pong,
    sequential,
    sequential_forms,
    whole_gpu_choice,
)
from nanoflow_tune.autotune.brute_force import random_instance, shortest_period_us
from nanoflow_tune.autotune.copy_transport import norm_behind
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.gather_rows import with_gather_rows
from nanoflow_tune.autotune.milp import Model
from nanoflow_tune.autotune.milp_input import Instance
from nanoflow_tune.autotune.patterns import macro_ops
from nanoflow_tune.autotune.profile_faults import profile_warnings
from nanoflow_tune.autotune.race import forms_in_words
from nanoflow_tune.autotune.refine import Family, checked, placed_of
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.autotune.structure import find_structure
from nanoflow_tune.profiler.profile import Point, Profile
from nanoflow_tune.runtime.legality import check
from nanoflow_tune.runtime.op_graph import OUTPUT_FORMS, OpGraph
from nanoflow_tune.runtime.schedule import IllegalScheduleError, output_forms

from .fakes import MIX, TOKENS, graph_of, h200, linear_profile, quick_space, reduce_profile, row_of

GRAPH = graph_of("llama2-70b", 2)
PAIRS = list(product(OUTPUT_FORMS, repeat=2))


def gather_profile(
    us_per_row: float, *, has_copies: bool = True, projection: float = 1.0
) -> Profile:
    """`reduce_profile` (0.08 us a row) with all-gathers of this speed.

    `projection`: time of the projection by columns, of that by rows.
    """
    profile = reduce_profile(GRAPH, nccl_us_per_row=0.08, copy_us_per_row=0.2)
    fixed = {"kind": "all_gather", "shape": "d8192_r2", "kv_len": 0}
    rows = [row for row in profile.rows if row.point.kind != "all_gather"]
    for tokens in TOKENS:
        for num_sms in (8, 16, 32, 132):
            nccl = Point(**fixed, variant="nccl", tokens=tokens, num_sms=num_sms)  # pyright: ignore
            rows.append(row_of(nccl, 5 + us_per_row * tokens))
        if has_copies:
            free = Point(**fixed, variant="copy_engine", tokens=tokens, num_sms=0)  # pyright: ignore
            rows.append(row_of(free, 5 + us_per_row * tokens))
    own = GRAPH.op("o_proj").shape
    for row in profile.rows:
        if row.point.shape == own:
            point = replace(row.point, shape=GRAPH.op("o_proj_columns").shape)
            rows.append(replace(row_of(point, projection * row.median_us)))
    return replace(profile, rows=tuple(rows))


def test_macro_ops_stand_for_the_ops_of_each_form():
    by_name = {macro.name: macro for macro in macro_ops(GRAPH)}
    gather, output, last = (by_name[n] for n in ("attn_all_gather", "o_proj", "attn_all_reduce"))
    assert [m.ops_of("all_reduce") for m in (gather, output, last)] == [
        (),
        (GRAPH.op("o_proj"),),
        (GRAPH.op("attn_all_reduce"),),
    ]
    for macro, name in (
        (gather, "attn_all_gather"),
        (output, "o_proj_columns"),
        (last, "o_all_gather"),
    ):
        assert macro.ops_of("all_gather") == (GRAPH.op(name),)
    assert (gather.lane, output.lane, last.lane) == ("network", "compute", "network")
    assert by_name["up_gate"].ops_of("all_gather") == by_name["up_gate"].ops
    assert all(not macro.others for macro in macro_ops(graph_of("llama3-8b")))


def test_a_profile_without_all_gathers_gets_them_from_all_reduces_of_as_many_bytes():
    profile = reduce_profile(GRAPH, nccl_us_per_row=0.08, copy_us_per_row=0.05)
    hardware = h200()
    made = with_gather_rows(profile, hardware, "bfloat16").rows[len(profile.rows) :]
    assert {row.point.kind for row in made} == {"all_gather"}
    assert {row.source for row in made} == {"interpolated"}
    by_point = {(r.point.variant, r.point.tokens, r.point.num_sms): r.median_us for r in made}
    assert by_point["copy_engine", 2048, 0] == pytest.approx(5 + 0.05 * 1024)
    layout_us = 1e6 * 2 * 2048 * 8192 * 2 / hardware.memory_bytes_per_s
    assert by_point["nccl", 2048, 132] == pytest.approx(5 + 0.08 * 1024 + layout_us)
    again = with_gather_rows(gather_profile(0.1), hardware, "bfloat16")
    assert again == gather_profile(0.1)
    costs = CostModel(profile, hardware)
    assert costs.best(GRAPH.op("o_all_gather"), MIX, 132)[1].source == "interpolated"
    assert "attn_all_gather" not in str(
        with_gather_rows(linear_profile(graph_of("llama3-8b")), hardware, "bfloat16").rows
    )


def test_without_measurements_both_forms_cost_the_same_on_the_link():
    costs = CostModel(None, h200())
    periods = [
        predict(schedule, GRAPH, costs, MIX).period_us
        for schedule in sequential_forms(GRAPH, costs, MIX).values()
    ]
    assert periods[1] == pytest.approx(periods[0], rel=0.02)


@pytest.mark.parametrize(("us_per_row", "form"), [(0.01, "all_gather"), (0.2, "all_reduce")])
def test_the_sequential_baseline_takes_the_faster_form(us_per_row, form):
    costs = CostModel(gather_profile(us_per_row), h200())
    chosen = sequential(GRAPH, costs, MIX)
    check(chosen, GRAPH, 132, 8)
    assert output_forms(chosen, GRAPH) == ((form,),)
    both = sequential_forms(GRAPH, costs, MIX)
    assert set(both) == set(OUTPUT_FORMS)
    periods = {f: predict(s, GRAPH, costs, MIX).period_us for f, s in both.items()}
    assert periods[form] == min(periods.values())
    assert predict(nano_only(GRAPH, costs, MIX), GRAPH, costs, MIX).period_us == pytest.approx(
        min(
            predict(nano_only(GRAPH.in_form(f), costs, MIX), GRAPH.in_form(f), costs, MIX).period_us
            for f in OUTPUT_FORMS
        ),
        rel=1e-9,
    )


@pytest.mark.parametrize("forms", PAIRS)
@pytest.mark.parametrize("order", ["blocks", "interleaved", "alternating"])
def test_every_order_takes_every_mix_of_forms(order, forms):
    costs = CostModel(gather_profile(0.05), h200())
    if order == "alternating":
        choice = whole_gpu_choice(1024, "interleaved", 132, forms)
    else:
        choice = PingPongChoice(
            first_tokens=768,
            row_order="decodes_first",
            compute_sms=100,
            memory_sms=32,
            network_sms=16,
            order=order,
            forms=forms,
        )
    schedule = ping_pong(GRAPH, costs, MIX, choice)
    check(schedule, GRAPH, 132, 8)
    assert output_forms(schedule, GRAPH) == ((forms[0],), (forms[1],))
    assert predict(schedule, GRAPH, costs, MIX).period_us > 0


def test_a_gather_that_needs_sms_is_not_put_on_none():
    costs = CostModel(gather_profile(0.05, has_copies=False), h200())
    choice = whole_gpu_choice(1024, "interleaved", 132, ("all_gather", "all_reduce"))
    with pytest.raises(IllegalScheduleError, match="no variant of attn_all_gather goes without"):
        ping_pong(GRAPH, costs, MIX, choice)
    space = replace(quick_space(), milp_time_limit_s=2.0)
    structure, _ = find_structure(GRAPH, costs, space, MIX, seed=0, least_batches=2)
    assert structure is not None
    for nano_op in structure.nano_ops:
        assert nano_op.num_sms or nano_op.op.endswith("all_reduce")


def _formed(seed: int) -> Instance:
    """A random instance whose second node is one of two forms; now and then idle in form 0."""
    rng, plain = Random(seed), random_instance(seed)
    nodes = range(len(plain.lanes))
    held = sorted(rng.sample(nodes, rng.randint(1, min(2, len(nodes)))))
    form_us = {
        key: rng.uniform(0.3, 1.5) * us for key, us in plain.duration_us.items() if key[0] in held
    }
    duration_us, idle = dict(plain.duration_us), frozenset[int]()
    if rng.random() < 0.4:
        idle = frozenset(held[:1])
        duration_us |= {key: 0.0 for key in duration_us if key[0] in idle}
    return replace(
        plain,
        duration_us=duration_us,
        sum_us={},
        nodes_of_forms=(tuple(held),),
        form_us=form_us,
        idle_nodes=idle,
    )


def _in_form(instance: Instance, is_form_1: bool) -> Instance:
    """Without a choice; what is idle meets nobody."""
    duration_us, lanes, shares = dict(instance.duration_us), list(instance.lanes), instance.shares
    if is_form_1:
        duration_us |= instance.form_us
    else:
        for node in instance.idle_nodes:
            lanes[node] = "idle"
            shares = (*shares[:node], (0,), *shares[node + 1 :])
            duration_us |= {(node, g, 0): 0.0 for g in range(instance.num_splits)}
    return replace(
        instance,
        lanes=tuple(lanes),
        shares=shares,
        duration_us=duration_us,
        nodes_of_forms=(),
        form_us={},
        idle_nodes=frozenset(),
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_milp_chooses_forms_as_well_as_trying_both(seed):
    instance = _formed(seed)
    exact_us = [shortest_period_us(_in_form(instance, is_form_1)) for is_form_1 in (False, True)]
    solution, certificate = Model(instance).solve(60.0, 1e-6, 0)
    assert solution is not None
    assert certificate.period_us == pytest.approx(min(exact_us), rel=1e-3)
    if abs(exact_us[0] - exact_us[1]) > 1e-2 * min(exact_us):
        assert solution.is_form_1 == (exact_us[1] < exact_us[0],)


@pytest.mark.parametrize(("us_per_row", "form"), [(0.005, "all_gather"), (0.3, "all_reduce")])
def test_the_structure_takes_the_form_that_is_clearly_faster_somewhere(us_per_row, form):
    costs = CostModel(gather_profile(us_per_row), h200())
    space = replace(quick_space(), milp_time_limit_s=4.0)
    known = [sequential(GRAPH, costs, MIX)]
    schedule, certificate = find_structure(GRAPH, costs, space, MIX, seed=0, known=known)
    assert schedule is not None
    check(schedule, GRAPH, 132, 8)
    assert form in {taken for forms in output_forms(schedule, GRAPH) for taken in forms}
    assert certificate.bound_us <= certificate.period_us


@pytest.mark.parametrize("forms", PAIRS)
def test_trials_may_change_the_forms_of_a_structure(forms):
    costs = CostModel(gather_profile(0.05), h200())
    choice = PingPongChoice(
        first_tokens=1024,
        row_order="interleaved",
        compute_sms=100,
        memory_sms=32,
        network_sms=16,
        order="interleaved",
        forms=("all_reduce", "all_gather"),
    )
    structure = ping_pong(GRAPH, costs, MIX, choice)
    family = Family(
        graph=GRAPH,
        cost_model=costs,
        space=quick_space(),
        mix=MIX,
        structure=placed_of(structure, GRAPH),
    )
    own = family.structure_parameters(structure)
    assert (own["form.0"], own["form.1"]) == choice.forms
    assert checked(family, optuna.trial.FixedTrial(own)) == replace(
        structure, name="overlapped_refined"
    )
    changed = own | {"form.0": forms[0], "form.1": forms[1]}
    trial = optuna.trial.FixedTrial(changed)
    assert output_forms(checked(family, trial), GRAPH) == ((forms[0],), (forms[1],))


def test_a_gather_leaves_nothing_to_the_norm_behind_it():
    costs = CostModel(gather_profile(0.001), h200())
    schedule = ping_pong(
        GRAPH, costs, MIX, whole_gpu_choice(1024, "interleaved", 132, ("all_gather",) * 2)
    )
    from nanoflow_tune.autotune.copy_transport import ops_as_run

    run = dict(zip(schedule.ids, ops_as_run(schedule, GRAPH), strict=True))
    plain = norm_behind(GRAPH.op("attn_all_reduce"), GRAPH)
    assert run["ffn_norm.0"].row_elements == plain.row_elements
    assert run["attn_norm.0"].row_elements > plain.row_elements  # the all-reduce of the FFN


def test_forms_are_told_by_nano_batch():
    costs = CostModel(gather_profile(0.05), h200())

    def told(*forms):
        choice = whole_gpu_choice(1024, "interleaved", 132, forms)
        return forms_in_words(ping_pong(GRAPH, costs, MIX, choice), GRAPH)

    assert told("all_gather", "all_gather") == "all-gathers"
    assert told("all_reduce", "all_reduce") == "all-reduces"
    mixed = told("all_gather", "all_reduce")
    assert mixed == "all-gathers in nano-batch 1 and all-reduces in nano-batch 2"


@pytest.mark.parametrize("form", OUTPUT_FORMS)
def test_a_graph_of_one_form_is_searched_like_any_other(form):
    costs, graph = CostModel(gather_profile(0.05), h200()), GRAPH.in_form(form)
    space = replace(quick_space(), milp_time_limit_s=1.0)
    known = [ping_pong(graph, costs, MIX, whole_gpu_choice(1024, "interleaved", 132))]
    schedule, certificate = find_structure(graph, costs, space, MIX, seed=0, known=known)
    assert schedule is not None
    check(schedule, graph, 132, 8)
    check(schedule, GRAPH, 132, 8)
    assert output_forms(schedule, GRAPH) == ((form,),) * len(schedule.nano_batches)
    assert certificate.period_us > 0


def test_one_rank_has_nothing_to_choose():
    graph = OpGraph.build(graph_of("llama3-8b").model)
    costs = CostModel(linear_profile(graph), h200())
    assert set(sequential_forms(graph, costs, MIX)) == {"all_reduce"}


def test_a_search_says_when_all_gathers_were_not_measured():
    warned = "profile has no all-gathers"
    for profile, is_warned in (
        (reduce_profile(GRAPH, nccl_us_per_row=0.08, copy_us_per_row=0.2), True),
        (gather_profile(0.05), False),
    ):
        told = profile_warnings(CostModel(profile, h200()).profile, GRAPH)
        assert any(line.startswith(warned) for line in told) == is_warned
