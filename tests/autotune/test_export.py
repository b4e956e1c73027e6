from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nanoflow_tune.autotune import cli
from nanoflow_tune.autotune.export_facts import PDMUX, SGLANG_FLAGS, VLLM_ARGUMENTS, check_pdmux
from nanoflow_tune.autotune.export_lossy import speedup
from nanoflow_tune.autotune.export_vllm import capture_sizes, export_vllm
from nanoflow_tune.runtime.plan import BreakEven
from nanoflow_tune.runtime.plan_io import dump_plan, load_plan
from nanoflow_tune.runtime.plan_schema import plan_schema
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

REPORTS = Path(__file__).parents[2] / "results" / "reports"
PLAN_70B = REPORTS / "llama2-70b-h200-tp2" / "plan.yaml"
PLAN_8B = REPORTS / "llama3-8b-h200-tp1" / "plan.yaml"


def exported(capsys, *arguments):
    assert cli.main(["export", *map(str, arguments)]) == cli.DONE
    return capsys.readouterr()


@pytest.mark.parametrize("plan", [PLAN_70B, PLAN_8B], ids=["70b", "8b"])
@pytest.mark.parametrize("tpot_ms", [30, 100])
def test_sglang_file_is_one_that_its_loader_and_scheduler_take(plan, tpot_ms, tmp_path, capsys):
    path = tmp_path / "plan.pdmux.yaml"
    out, err = exported(
        capsys, "--to", "sglang", plan, "--tpot-ms", tpot_ms, "--output", path, "--json"
    )
    values = json.loads(out)
    raw = yaml.safe_load(path.read_text())
    rows = raw["manual_divisions"]
    assert raw["sm_group_num"] >= 3
    assert len(rows) == raw["sm_group_num"] - 2
    for prefill_sms, decode_sms, _ in rows:
        assert prefill_sms + decode_sms == 132
        assert prefill_sms % 8 == 0
        assert min(prefill_sms, decode_sms) >= 8
    # What the scheduler does with a decode batch: the last row whose threshold it reaches.
    for decodes in (1, rows[-1][2], 10_000):
        assert any(decodes >= row[2] for row in rows)
    assert set(raw) - PDMUX.keys == {"format", "predicted", "lossy"}
    assert all(part["decode_step_ms"] <= tpot_ms for part in raw["predicted"])
    assert f"--pdmux-config-path {path}" in values["launch"]
    assert f"# launch: {values['launch']}" in path.read_text()
    assert values["verdict"] in err
    assert "not from runs of SGLang" in err


def test_sglang_launch_line_has_what_pd_multiplexing_asserts(capsys):
    out, err = exported(capsys, "--to", "sglang", PLAN_70B)
    launch = next(line for line in out.splitlines() if line.startswith("# launch: "))
    words = launch.split()
    assert words[words.index("--pp-size") + 1] == "1"
    assert words[words.index("--chunked-prefill-size") + 1] == "-1"
    assert {"--enable-pdmux", "--disable-overlap-schedule"} <= set(words)
    assert {word for word in words if word.startswith("--")} <= SGLANG_FLAGS.keys
    assert "DEFAULT IN FORCE: time per token <= 50 ms" in err
    assert yaml.safe_load(out)["format"]["target"] == "sglang"


def test_a_looser_limit_never_costs_decodes_or_throughput(capsys):
    reached = []
    for tpot_ms in (30, 50, 80, 120):
        out, _ = exported(capsys, "--to", "sglang", PLAN_70B, "--tpot-ms", tpot_ms, "--json")
        values = json.loads(out)
        rates = values["lossy"]["predicted_tokens_per_s"]
        reached.append(
            (values["predicted"][-1]["decodes"][1], rates[f"pd_multiplexing_at_{tpot_ms}_ms"])
        )
    assert reached == sorted(reached)


def test_lossy_names_every_decision_of_an_overlapped_schedule(capsys):
    for target in ("sglang", "vllm"):
        out, _ = exported(
            capsys, "--to", target, PLAN_70B, "--schedule", "best_overlapped", "--json"
        )
        lossy = json.loads(out)["lossy"]
        decisions = {loss["decision"] for loss in lossy["decisions"]}
        assert decisions >= {"nano_batches", "lanes", "kernels", "transports", "buckets"}
        assert all(loss["predicted_gain_lost"] for loss in lossy["decisions"])
        bucket = load_plan(PLAN_70B).buckets[0]
        in_a_row, overlapped = bucket.sequential.measured, bucket.best_overlapped.measured
        assert in_a_row is not None
        assert overlapped is not None
        gain = in_a_row.period_us / overlapped.period_us - 1
        assert lossy["best_overlapped_gain"] == pytest.approx(gain, abs=1e-3)
        lost = lossy["exported_gain"] - lossy["target_gain"]
        assert lossy["predicted_gain_lost"] == pytest.approx(lost, abs=1e-3)


def test_lossy_names_shares_and_order_of_a_ping_pong(capsys):
    out, _ = exported(capsys, "--to", "vllm", PLAN_8B, "--json")
    decisions = {loss["decision"] for loss in json.loads(out)["lossy"]["decisions"]}
    assert decisions >= {"nano_batches", "sm_shares", "lanes", "order", "kernels"}


def test_gains_are_predicted_where_one_side_was_not_measured():
    bucket = load_plan(PLAN_70B).buckets[0]
    unmeasured = replace(bucket.best_overlapped, measured=None)
    gain = bucket.sequential.predicted.period_us / unmeasured.predicted.period_us
    assert speedup(bucket, unmeasured) == (gain, "predicted")
    assert speedup(bucket, bucket.best_overlapped)[1] == "measured"


def test_a_sequential_schedule_loses_no_overlap(capsys):
    out, _ = exported(capsys, "--to", "vllm", PLAN_70B, "--schedule", "sequential", "--json")
    lossy = json.loads(out)["lossy"]
    decisions = {loss["decision"] for loss in lossy["decisions"]}
    assert not decisions & {"nano_batches", "lanes", "order", "row_order"}
    assert lossy["predicted_gain_lost"] == 0.0


def test_vllm_arguments_follow_the_plan(capsys):
    out, _ = exported(capsys, "--to", "vllm", PLAN_70B)
    values = yaml.safe_load(out)
    arguments = values["arguments"]
    assert arguments["--max-num-batched-tokens"] == 1024
    assert arguments["--max-num-seqs"] == 513
    assert set(arguments) <= VLLM_ARGUMENTS.keys
    sizes = arguments["-cc.cudagraph_capture_sizes"]
    assert {512, 1024} <= set(sizes)
    assert sizes[0] == 2
    tokens = load_plan(PLAN_70B).break_even[0].tokens
    assert arguments["-cc.pass_config.sp_min_token_num"] == tokens
    assert "--enable-dbo" in " ".join(values["left_out"])
    assert "-cc.cudagraph_capture_sizes=[2,4,8" in values["command"]


def even(mix, tokens):
    return BreakEven(
        mix=mix,
        decode_context_tokens=768.0,
        smallest_tokens=256,
        largest_tokens=2048,
        tokens=tokens,
    )


def made_for_vllm(plan, model="llama2-70b"):
    bucket = plan.buckets[0]
    return export_vllm(
        plan, bucket.winner, "winner", load_model(model), load_hardware("h200")
    ).document


def test_vllm_fuses_collectives_from_the_break_even_of_the_book_on():
    plan = replace(load_plan(PLAN_70B), break_even=(even("steady", 768),))
    arguments = made_for_vllm(plan)["arguments"]
    assert arguments["-cc.pass_config.sp_min_token_num"] == 768
    assert arguments["-cc.pass_config.enable_sp"] is True


def test_vllm_leaves_fusion_out_where_overlap_never_pays_and_on_one_gpu():
    plan = replace(load_plan(PLAN_70B), break_even=(even("steady", None),))
    left_out = made_for_vllm(plan)["left_out"]
    assert any("256 to 2048 rows" in reason for reason in left_out.values())
    alone = made_for_vllm(load_plan(PLAN_8B), "llama3-8b")["left_out"]
    assert "one GPU has no collectives" in alone.values()


def test_micro_batches_only_for_experts_and_only_conditionally():
    plan = replace(
        load_plan(PLAN_70B), break_even=(even("decode_only", 256), even("prefill_heavy", None))
    )
    document = made_for_vllm(plan, "mixtral-8x7b")
    conditional = document["only_with_data_and_expert_parallelism"]
    assert conditional == {"--enable-dbo": True, "--dbo-decode-token-threshold": 256}
    assert "--enable-dbo" not in document["arguments"]


def test_capture_sizes_cover_every_bucket_and_divide_among_ranks():
    plan = load_plan(PLAN_70B)
    sizes = capture_sizes(plan)
    assert all(size % 2 == 0 for size in sizes)
    assert sizes == sorted(set(sizes))
    assert 1 in capture_sizes(load_plan(PLAN_8B))


def test_schema_is_written_whole_and_equals_the_records(tmp_path, capsys):
    path = tmp_path / "new" / "plan.schema.json"
    exported(capsys, "--to", "schema", "--output", path)
    assert json.loads(path.read_text()) == plan_schema()
    assert [held.name for held in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "vllm"], "needs a plan"),
        (["--to", "sglang", PLAN_70B, "--tpot-ms", "1"], "give a larger --tpot-ms"),
        (["--to", "sglang", PLAN_70B, "--tpot-ms", "-5"], "--tpot-ms must be positive"),
        (["--to", "sglang", PLAN_70B, "--sm-groups", "2"], "--sm-groups at least 3"),
        (["--to", "sglang", PLAN_70B, "--profile", "nowhere.csv"], "does not exist"),
        (["--to", "vllm", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_said_and_exits_2(arguments, message, capsys):
    assert cli.main(["export", *map(str, arguments)]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_plans_that_pd_multiplexing_cannot_serve_are_refused(tmp_path, capsys):
    plan = load_plan(PLAN_8B)
    dump_plan(replace(plan, hardware="b200"), tmp_path / "b200.yaml")
    arguments = ["export", "--to", "sglang", str(tmp_path / "b200.yaml"), "--profile", "roofline"]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "compute capability 10" in capsys.readouterr().err


def test_roofline_curves_say_so(capsys):
    _, err = exported(
        capsys, "--to", "sglang", PLAN_8B, "--profile", "roofline", "--tpot-ms", 60, "--json"
    )
    assert "datasheet" in err


def test_a_plan_of_another_element_width_gets_no_curves_of_the_shipped_profile(tmp_path, capsys):
    plan = replace(load_plan(PLAN_8B), dtype="float32", kv_dtype="float32")
    dump_plan(plan, tmp_path / "wide.yaml")
    arguments = ["--to", "sglang", tmp_path / "wide.yaml", "--tpot-ms", 200, "--json"]
    _, err = exported(capsys, *arguments)
    assert "datasheet" in err
    assert "the shipped profile is of bfloat16, the plan of float32" in err


def test_vllm_captures_no_batch_larger_than_it_may_form():
    plan = load_plan(PLAN_70B)
    small = replace(plan, buckets=(*plan.buckets[-1:], *plan.buckets))
    assert max(capture_sizes(small)) <= small.buckets[0].dense_batch_tokens


@pytest.mark.parametrize(
    ("groups", "rows"),
    [
        (2, []),
        (4, [[112, 20, 1]]),
        (3, [[112, 20, 2]]),
        (3, [[104, 20, 1]]),
        (3, [[126, 6, 1]]),
        (3, [[100, 32, 1]]),
        (4, [[112, 20, 1], [96, 36, 1]]),
    ],
)
def test_tables_that_sglang_would_refuse_or_misuse_are_caught(groups, rows):
    with pytest.raises(AssertionError):
        check_pdmux(groups, rows, 132, 8)


def test_unknown_keys_are_never_emitted():
    with pytest.raises(AssertionError, match="sm_groups"):
        PDMUX.check(["sm_group_num", "sm_groups"])


def test_all_gathers_of_a_plan_are_named_as_lost():
    from nanoflow_tune.autotune.export_lossy import losses
    from nanoflow_tune.runtime.plan import NanoOp

    schedule = load_plan(PLAN_70B).buckets[0].sequential.schedule
    target = dict.fromkeys(("kernels", "lanes", "sm_shares", "transports"), "its own")
    assert "output_form" not in {loss.decision for loss in losses(schedule, 132, target)}
    rows = schedule.nano_batches[0].tokens
    gather = NanoOp(op="o_all_gather", tokens=rows, lane="network", num_sms=132, variant="nccl")
    gathering = replace(schedule, nano_ops=(*schedule.nano_ops, gather))
    (lost,) = [x for x in losses(gathering, 132, target) if x.decision == "output_form"]
    assert (
        lost.plan == f"all-gathers before and behind the output projection of rows [0, {rows[1]})"
    )
