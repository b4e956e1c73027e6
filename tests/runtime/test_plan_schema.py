from __future__ import annotations

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

from nanoflow_tune.runtime.plan_io import dump_plan, load_plan
from nanoflow_tune.runtime.plan_schema import plan_schema
from nanoflow_tune.search_spaces.record_schema import DIALECT
from nanoflow_tune.search_spaces.records import SpecError

REPORTS = Path(__file__).parents[2] / "results" / "reports"
PLANS = sorted(REPORTS.glob("*/plan.yaml"))


def errors(mapping):
    schema = plan_schema()
    cls = jsonschema.validators.validator_for({"$schema": DIALECT})
    cls.check_schema(schema)
    return list(cls(schema).iter_errors(mapping))


@pytest.fixture(params=PLANS, ids=lambda path: path.parent.name)
def written(request, tmp_path):
    """A shipped plan as this version writes it; older files are still read."""
    path = tmp_path / "plan.yaml"
    dump_plan(load_plan(request.param), path)
    return path


def test_there_are_plans_to_check():
    assert len(PLANS) >= 2


def test_shipped_plans_fit_the_schema_as_they_are_written_now(written):
    assert not errors(yaml.safe_load(written.read_text()))


def first_schedule(plan):
    return next(iter(plan["schedules"].values()))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda plan: plan.update(colour="red"),
        lambda plan: plan.update(schema="nanoflow-plan/0"),
        lambda plan: plan.pop("model"),
        lambda plan: plan.pop("schedules"),
        lambda plan: plan.update(num_gpus="two"),
        lambda plan: plan.update(dtype="float4"),
        lambda plan: plan.update(buckets=[]),
        lambda plan: first_schedule(plan).update(nano_ops=[]),
        lambda plan: first_schedule(plan)["nano_ops"][0].update(tokens=[0]),
        lambda plan: plan["buckets"][0]["winner"]["predicted"].pop("source"),
        lambda plan: plan["buckets"][0]["winner"].update(schedule={"name": "inline"}),
    ],
)
def test_a_damaged_plan_is_refused_by_schema_and_reader(written, break_it):
    mapping = copy.deepcopy(yaml.safe_load(written.read_text()))
    break_it(mapping)
    assert errors(mapping)
    written.write_text(yaml.safe_dump(mapping, sort_keys=False))
    with pytest.raises(SpecError):
        load_plan(written)


def test_fields_say_what_they_mean():
    nano_op = plan_schema()["$defs"]["NanoOp"]["properties"]
    assert "rows" in nano_op["tokens"]["description"]
    assert nano_op["num_sms"]["description"].startswith("0:")
