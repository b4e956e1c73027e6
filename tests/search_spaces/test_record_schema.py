from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.runtime.plan import SCHEMA, Plan
from nanoflow_tune.runtime.plan_io import load_plan
from nanoflow_tune.search_spaces.record_schema import DIALECT, json_schema
from nanoflow_tune.search_spaces.records import SpecError, from_mapping

REPORTS = Path(__file__).parents[2] / "results" / "reports"
PLANS = sorted(REPORTS.glob("*/plan.yaml"))


def plan_schema():
    return json_schema(Plan, title="plan", schema_id=SCHEMA)


def validator(schema):
    cls = jsonschema.validators.validator_for({"$schema": DIALECT})
    cls.check_schema(schema)
    return cls(schema)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_shipped_plans_fit_the_schema_and_the_strict_reader(path):
    mapping = yaml.safe_load(path.read_text())
    assert not list(validator(plan_schema()).iter_errors(mapping))
    assert load_plan(path).model == mapping["model"]


def test_there_are_plans_to_check():
    assert len(PLANS) >= 2


@pytest.mark.parametrize(
    "break_it",
    [
        lambda plan: plan.update(colour="red"),
        lambda plan: plan.pop("model"),
        lambda plan: plan.update(num_gpus="two"),
        lambda plan: plan.update(dtype="float4"),
        lambda plan: plan["buckets"][0]["winner"]["schedule"]["nano_ops"][0].update(tokens=[0]),
        lambda plan: plan["buckets"][0]["winner"]["predicted"].pop("source"),
    ],
)
def test_a_damaged_plan_is_refused_by_both(break_it):
    mapping = copy.deepcopy(yaml.safe_load(PLANS[0].read_text()))
    break_it(mapping)
    assert list(validator(plan_schema()).iter_errors(mapping))
    with pytest.raises(SpecError):
        from_mapping(Plan, mapping, "damaged")


def test_fields_carry_their_docstrings():
    nano_op = plan_schema()["$defs"]["NanoOp"]["properties"]
    assert "rows" in nano_op["tokens"]["description"]
    assert nano_op["num_sms"]["description"].startswith("0:")


@dataclass(frozen=True, kw_only=True)
class Inner:
    pair: tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class Outer:
    kind: Literal["a", "b"]
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    named: dict[str, int] | None = None


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b", "x"]),
    lambda leaves: (
        st.lists(leaves, max_size=2)
        | st.dictionaries(st.sampled_from(["kind", "inner", "many", "named", "pair"]), leaves)
    ),
    max_leaves=6,
)
outers = st.fixed_dictionaries(
    {"kind": st.sampled_from(["a", "b", "x"])},
    optional={
        "inner": st.fixed_dictionaries({"pair": values}) | values,
        "many": st.lists(st.fixed_dictionaries({"pair": st.just([1, 2])}), max_size=2) | values,
        "named": st.dictionaries(st.sampled_from(["p", "q"]), values) | values,
    },
)


@given(outers)
def test_schema_and_strict_reader_accept_the_same(mapping):
    is_valid = not list(
        validator(json_schema(Outer, title="o", schema_id="o/1")).iter_errors(mapping)
    )
    try:
        from_mapping(Outer, mapping, "outer")
    except SpecError:
        assert not is_valid
    else:
        assert is_valid
