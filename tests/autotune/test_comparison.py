from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanoflow_tune.autotune import cli
from nanoflow_tune.autotune.comparison import Side, compare, schedule_difference
from nanoflow_tune.autotune.comparison_page import page
from nanoflow_tune.runtime.plan import NanoBatch, NanoOp, Schedule
from nanoflow_tune.runtime.plan_io import dump_plan, load_plan

REPORTS = Path(__file__).parents[2] / "results" / "reports"
RUN_70B, RUN_8B = REPORTS / "llama2-70b-h200-tp2", REPORTS / "llama3-8b-h200-tp1"


def side(plan):
    return Side(path=Path("plan.yaml"), plan=plan, document={})


def changed(plan, **timing):
    """The plan with another measured time of its winner."""
    bucket = plan.buckets[0]
    winner = replace(bucket.winner, measured=replace(bucket.winner.measured, **timing))
    return replace(plan, buckets=(replace(bucket, winner=winner), *plan.buckets[1:]))


def test_a_plan_beside_itself_is_the_same():
    plan = load_plan(RUN_70B / "plan.yaml")
    values = compare(side(plan), side(plan))
    assert "the same schedule with the same figures" in values["verdict"]
    assert values["warnings"] == []
    assert all(held["same"] for held in values["inputs"].values())
    assert all(held["same"] for held in values["schedules"].values())
    assert values["figures"]["winner"]["b_over_a"]["period_us"] == 1.0


def test_a_difference_within_the_spread_is_not_called_one():
    plan = load_plan(RUN_70B / "plan.yaml")
    own = plan.buckets[0].winner.measured
    assert own is not None
    near_us = (own.p10_us + own.period_us) / 2
    close = compare(side(plan), side(changed(plan, period_us=near_us)))
    assert "within the spread" in close["verdict"]
    far_us = own.period_us / 1.189
    far = changed(plan, period_us=far_us, p10_us=0.99 * far_us, p90_us=1.01 * far_us)
    apart = compare(side(plan), side(far))
    assert "1.189x the tokens/s" in apart["verdict"]
    assert "spread" not in apart["verdict"]
    assert apart["basis"] == "measured"


def test_measured_is_never_set_beside_predicted():
    plan = load_plan(RUN_70B / "plan.yaml")
    bucket = plan.buckets[0]
    roles = ("winner", "sequential", "best_overlapped")
    bare = {role: replace(getattr(bucket, role), measured=None) for role in roles}
    unmeasured = replace(plan, buckets=(replace(bucket, **bare),))
    values = compare(side(plan), side(unmeasured))
    assert values["basis"] == "predicted"
    assert {values["figures"]["winner"][name]["source"] for name in "ab"} == {"predicted"}
    assert any("only A was measured" in warning for warning in values["warnings"])


def test_different_jobs_are_said_to_be_so():
    values = compare(side(load_plan(RUN_70B / "plan.yaml")), side(load_plan(RUN_8B / "plan.yaml")))
    text = " ".join(values["warnings"])
    for words in ("model differs", "num_gpus differs", "batches differ: 1024 and 2048"):
        assert words in text


def op(name, tokens, **fields):
    return NanoOp(op=name, tokens=tokens, lane="compute", num_sms=132, variant="triton", **fields)


def schedule(*nano_ops):
    return Schedule(
        name="s",
        nano_batches=(NanoBatch(tokens=(0, 256), decode_tokens=128),),
        nano_ops=nano_ops,
    )


def test_schedules_differ_op_by_op():
    whole = (0, 256)
    a = schedule(op("kqv", whole), op("o_proj", whole), op("down", (0, 128)))
    b = schedule(
        op("o_proj", whole),
        replace(op("kqv", whole), num_sms=116, variant="cublas"),
        op("down", whole),
    )
    difference = schedule_difference(a, b)
    assert difference["changed"] == [
        {"nano_op": "kqv [0, 256)", "num_sms": [132, 116], "variant": ["triton", "cublas"]}
    ]
    assert difference["only_a"] == ["down [0, 128)"]
    assert difference["only_b"] == ["down [0, 256)"]
    assert not difference["same_order"]
    assert schedule_difference(a, a)["same"]


def test_report_of_two_writes_both_files_and_a_table(tmp_path, capsys):
    folder = tmp_path / "compared"
    arguments = ["report", str(RUN_70B), str(RUN_8B / "plan.yaml"), "--output-dir", str(folder)]
    assert cli.main(arguments) == cli.DONE
    out = capsys.readouterr().out
    values = json.loads(out.splitlines()[-1])
    assert "B / A" in out
    assert {path.name for path in folder.iterdir()} == {"compare.html", "compare.json"}
    held = json.loads((folder / "compare.json").read_text())
    assert held["figures"] == values["figures"]
    assert values["verdict"].startswith("Two different jobs: ")
    html = (folder / "compare.html").read_text()
    assert "llama2-70b" in html
    assert "http" not in html.replace("http-equiv", "")


def test_text_of_a_plan_is_escaped_in_the_page(tmp_path):
    plan = replace(load_plan(RUN_8B / "plan.yaml"), created_by="<script>alert(1)</script>")
    dump_plan(plan, tmp_path / "plan.yaml")
    other = load_plan(tmp_path / "plan.yaml")
    assert "<script>" not in page(compare(side(plan), side(changed(other, period_us=1e4))))


@pytest.mark.parametrize("bad", ["nowhere", "empty"])
def test_a_side_that_is_not_there_is_bad_input(bad, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(RUN_8B), str(tmp_path / bad)]) == cli.BAD_INPUT
    assert str(tmp_path / bad) in capsys.readouterr().err
