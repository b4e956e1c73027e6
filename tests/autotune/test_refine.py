from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from nanoflow_tune.autotune.baselines import equal_split, equal_split_choice, whole_gpu_choice
from nanoflow_tune.autotune.cost_model import CostModel
from nanoflow_tune.autotune.refine import Family, placed_of, refine, study_name
from nanoflow_tune.autotune.simulator import predict
from nanoflow_tune.runtime.legality import check

from .fakes import MIX, graph_of, h200, linear_profile, quick_space, reduce_profile, row_of

GRAPH = graph_of("llama3-8b")
COSTS = CostModel(linear_profile(GRAPH), h200())
SPACE = quick_space()
EQUAL = equal_split(GRAPH, COSTS, MIX, SPACE)


def family(**changes: object) -> Family:
    fields: dict[str, object] = {"graph": GRAPH, "cost_model": COSTS, "space": SPACE, "mix": MIX}
    return Family(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def first_trial() -> list[dict[str, object]]:
    return [family().parameters(equal_split_choice(GRAPH, MIX, h200(), SPACE))]


def test_what_is_enqueued_is_tried_first_and_nothing_returned_is_illegal():
    candidates = refine(family(), trials=25, seed=1, enqueue=first_trial())
    assert candidates[0].schedule.nano_ops == EQUAL.nano_ops
    for candidate in candidates:
        check(candidate.schedule, GRAPH, 132, 8)
        assert candidate.predicted == predict(candidate.schedule, GRAPH, COSTS, MIX)
    best = min(candidates, key=lambda c: c.predicted.period_us)
    assert best.predicted.period_us < candidates[0].predicted.period_us


def test_a_structure_is_reproduced_exactly_by_its_own_parameters():
    around = family(structure=placed_of(EQUAL, GRAPH))
    parameters = around.structure_parameters(EQUAL)
    assert parameters["structure"] == "milp"
    (candidate,) = refine(around, trials=1, seed=0, enqueue=[parameters])
    assert candidate.schedule.nano_ops == EQUAL.nano_ops


def test_the_same_seed_gives_the_same_trials():
    runs = [refine(family(), trials=15, seed=3, enqueue=first_trial()) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != refine(family(), trials=15, seed=4, enqueue=first_trial())


def test_a_killed_study_resumes_and_a_changed_space_starts_anew(tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/search.db"
    part = refine(family(), trials=6, seed=0, storage=storage, enqueue=first_trial())
    whole = refine(family(), trials=10, seed=0, storage=storage, enqueue=first_trial())
    assert whole[: len(part)] == part
    study = optuna.load_study(study_name=study_name(family(), 0, "simulator"), storage=storage)
    assert len(study.trials) == 10
    other = family(space=quick_space(sm_shares=(32, 100)))
    assert study_name(other, 0, "simulator") != study.study_name


def test_an_illegal_trial_fails_with_its_reason(tmp_path: Path):
    storage = f"sqlite:///{tmp_path}/search.db"
    backwards = tuple(replace(place, stage=0) for place in reversed(placed_of(EQUAL, GRAPH)))
    broken = family(structure=backwards)
    parameters = broken.structure_parameters(EQUAL)
    assert refine(broken, trials=1, seed=0, storage=storage, enqueue=[parameters]) == ()
    study = optuna.load_study(study_name=study_name(broken, 0, "simulator"), storage=storage)
    assert study.trials[0].state == optuna.trial.TrialState.FAIL
    assert "illegal order" in study.trials[0].user_attrs["reason"]


@pytest.mark.parametrize("row_order", ["decodes_first", "interleaved"])
def test_a_single_row_order_is_kept(row_order: str):
    space = quick_space(row_orders=(row_order,))
    for candidate in refine(family(space=space), trials=5, seed=0):
        first = candidate.schedule.nano_batches[0]
        halves = first.decode_tokens * 2 == first.num_tokens
        assert halves == (row_order == "interleaved") or first.num_tokens == 2048


def test_trials_choose_among_variants_within_5_percent_of_the_fastest():
    extra = [
        row_of(replace(row.point, variant=name), factor * row.median_us)
        for name, factor in (("close", 1.04), ("far", 1.3))
        for row in linear_profile(GRAPH).rows
        if row.point.variant == "triton" and row.point.kind == "decode_attention"
    ]
    profile = linear_profile(GRAPH)
    costs = CostModel(replace(profile, rows=(*profile.rows, *extra)), h200())
    op = GRAPH.op("decode_attention")
    assert costs.variants(op, 132) == ("close", "far", "triton")
    assert family(cost_model=costs).close_variants(op) == ["close", "triton"]


def test_with_collectives_that_take_no_sms_trials_are_legal_and_the_whole_gpu_is_one_of_them():
    graph = graph_of("llama2-70b", 2)
    costs = CostModel(reduce_profile(graph, nccl_us_per_row=0.3, copy_us_per_row=0.3), h200())
    around = family(graph=graph, cost_model=costs, is_variant_free=True)
    whole = around.parameters(whole_gpu_choice(1024, "interleaved", 132))
    candidates = refine(around, trials=25, seed=0, enqueue=[whole])
    assert {n.num_sms for n in candidates[0].schedule.nano_ops} == {0, 132}
    assert len(candidates) == 25
    for candidate in candidates:
        check(candidate.schedule, graph, 132, 8)
        for nano_op in candidate.schedule.nano_ops:
            assert (nano_op.variant == "copy_engine") == (nano_op.num_sms == 0)
