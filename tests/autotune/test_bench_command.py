"""The verb `bench` without a GPU: what it runs, what it says, what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from nanoflow_tune.autotune import bench_command, cli
from nanoflow_tune.autotune.ablation import BOOKS
from nanoflow_tune.autotune.cli_parser import build_parser
from nanoflow_tune.autotune.gpu_stage import NO_DEVICES, Devices
from nanoflow_tune.profiler.serving_case import ServingRun
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Candidate, NanoBatch, NanoOp, Plan, Schedule, Timing
from nanoflow_tune.runtime.plan_io import dump_plan
from nanoflow_tune.runtime.sequence import EngineStats
from nanoflow_tune.search_spaces.loader import content_hash, load_hardware, load_model

H200 = Devices(name="NVIDIA H200", count=8, memory_bytes=150_754_820_096)
ROWS, DECODES = 64, 32


def _candidate(graph, name, cuts, period_us):
    batches = tuple(
        NanoBatch(tokens=cut, decode_tokens=max(0, min(cut[1], DECODES) - cut[0])) for cut in cuts
    )
    nano_ops = tuple(
        NanoOp(
            op=op,
            tokens=cut,
            lane="memory" if op == "decode_attention" and len(cuts) > 1 else "compute",
            num_sms=132 if len(cuts) == 1 else 40 if op == "decode_attention" else 92,
            variant="torch",
        )
        for op in graph.op_names
        for cut in cuts
    )
    return Candidate(
        schedule=Schedule(name=name, nano_batches=batches, nano_ops=nano_ops),
        predicted=Timing(period_us=period_us, source="predicted"),
    )


def _plan(name, num_gpus=1):
    model = load_model(name)
    graph = OpGraph.build(model, num_gpus)
    winner = _candidate(graph, "overlapped", ((0, 24), (24, ROWS)), 900.0)
    bucket = Bucket(
        dense_batch_tokens=ROWS,
        decode_tokens=DECODES,
        decode_context_tokens=768.0,
        prefill_context_tokens=256.5,
        row_order="decodes_first",
        winner=winner,
        sequential=_candidate(graph, "sequential", ((0, ROWS),), 1000.0),
        best_overlapped=winner,
        lower_bound_us=1.0,
        power_limit_us=1.0,
        bound="compute",
    )
    return Plan(
        model=model.name,
        hardware="h200",
        workload="512-512",
        num_gpus=num_gpus,
        dtype=model.torch_dtype,
        kv_dtype=model.torch_dtype,
        page_size=16,
        inputs={"model": content_hash(model)},
        buckets=(bucket,),
    )


@pytest.fixture
def plan_path(tmp_path):
    return dumped(tmp_path, _plan("llama3-8b"))


def dumped(tmp_path, plan):
    dump_plan(plan, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(bench_command, "find_devices", lambda: NO_DEVICES)


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def test_a_scaled_down_model_serves_every_book_on_the_cpu_and_it_says_so(plan_path, capsys):
    command = ["bench", str(plan_path), "--requests", "40", "--books", ",".join(BOOKS)]
    assert cli.main(command) == cli.DONE
    out = capsys.readouterr().out
    assert "a scaled-down llama3-8b serves requests" in out
    values = last_json(out)
    assert (values["device"], values["is_scaled_down"], values["peaks"]) == ("cpu", True, {})
    assert values["num_tokens"] == 40 * bench_command.CPU_TOKENS
    rows = {row["book"]: row for row in values["books"]}
    assert tuple(rows) == BOOKS
    for row in rows.values():
        assert row["tokens_per_s_per_gpu"] > 0
        assert row["joules_per_token"] is row["watts"] is None
        assert "percent_of_optimal" not in row


def test_a_small_checkpoint_is_served_as_it_is(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny, folder = load_model("tiny-llama"), tmp_path / "small"
    config = LlamaConfig(
        vocab_size=tiny.vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.num_hidden_layers,
        num_attention_heads=tiny.num_attention_heads,
        num_key_value_heads=tiny.num_key_value_heads,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    plan = dumped(tmp_path, _plan(folder))
    flags = ["--weights", str(folder), "--requests", "8", "--books", "winner", "--json"]
    assert cli.main(["bench", str(plan), *flags, "--workload", "20/4"]) == cli.DONE
    values = last_json(capsys.readouterr().out)
    assert (values["model"], values["is_scaled_down"]) == ("small", False)
    assert values["num_tokens"] == 8 * 24
    assert cli.main(["bench", str(plan), *flags, "--model", "tiny-llama"]) == cli.BAD_INPUT


def test_contexts_shrink_with_the_requests_so_that_the_winner_applies(plan_path, capsys):
    options = build_parser().parse_args(["bench", str(plan_path)])
    plan, model = _plan("llama3-8b"), load_model("llama3-8b")
    weights = bench_command.Weights.parse("random:3")
    case, shown = bench_command._case(
        options, plan, model, load_hardware("h200"), weights, is_gpu=False
    )
    assert set(case.lengths) == {(24, 24)}
    assert shown.buckets[0].decode_context_tokens == pytest.approx(36.0)
    assert (case.seed, case.weights, len(case.lengths)) == (3, None, bench_command.CPU_REQUESTS)
    assert (case.model.hidden_size, case.num_pages) == (64, 3 * len(case.lengths))
    whole, same = bench_command._case(
        options, plan, model, load_hardware("h200"), weights, is_gpu=True
    )
    assert (whole.model, same, whole.num_pages) == (model, plan, None)
    assert whole.lengths == ((512, 512),) * bench_command.GPU_REQUESTS


def test_a_dry_run_says_what_the_plans_gpus_would_take_and_serves_nothing(
    plan_path, capsys, monkeypatch
):
    monkeypatch.setattr(bench_command, "serve", None)
    command = ["bench", str(plan_path), "--dry-run", "--requests", "12", "--workload", "40/20"]
    assert cli.main(command) == cli.DONE
    out = capsys.readouterr().out
    assert "llama3-8b, 1 x h200, predicted, 40/20, 12 requests" in out
    values = last_json(out)
    assert (values["dry_run"], values["source"], values["num_tokens"]) == (True, "predicted", 720)
    for row in values["books"]:
        # A prompt's last row predicts the first answer.
        assert row["steps"] * row["mean_rows"] == pytest.approx(12 * (40 + 19), rel=0.01)
        assert row["source"] == "predicted"
    assert cli.main([*command, "--dense-batch", "32", "--json"]) == cli.DONE
    narrow = last_json(capsys.readouterr().out)
    assert narrow["books"][0]["steps"] > values["books"][0]["steps"]
    assert cli.main([*command, "--dense-batch", "65"]) == cli.BAD_INPUT
    assert "1 to 64 rows" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["workload", "trace"])
def test_requests_that_come_when_they_are_due_are_told_latencies_of(
    plan_path, tmp_path, capsys, source
):
    flags = ["--requests", "12", "--books", "winner", "--rate", "40"]
    if source == "trace":
        trace = tmp_path / "trace.csv"
        rows = "".join(f"2023-11-16 18:00:{n // 2:02d}.5000000,40,20\n" for n in range(12))
        trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
        flags += ["--trace", str(trace)]
    assert cli.main(["bench", str(plan_path), *flags]) == cli.DONE
    out = capsys.readouterr().out
    assert "TTFT ms" in out
    values = last_json(out)
    assert values["rate_per_s"] == 40
    (row,) = values["books"]
    assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
    assert row["tpot_ms_mean"] > 0
    assert 0 < row["normalised_ms_mean"] <= row["normalised_ms_p99"]
    assert row["elapsed_s"] > 0.05
    if source == "trace":
        assert row["elapsed_s"] > 11 / 40


def _run(name, elapsed_s):
    return ServingRun(
        name=name,
        elapsed_s=elapsed_s,
        num_tokens=10_000,
        num_gpus=1,
        joules=200.0,
        watts=math.nan,
        sm_clock_mhz=1500.0,
        stats=EngineStats(),
    )


def test_on_a_gpu_percentages_are_of_the_measured_peak_and_of_the_datasheet(
    plan_path, capsys, monkeypatch
):
    asked = []

    def serve(case, contenders, rounds, *, is_gpu):
        asked.append((case.model.name, [c.name for c in contenders], rounds, is_gpu))
        return [_run("sequential", s) for s in (1.0, 0.5, 2.0)]

    monkeypatch.setattr(bench_command, "find_devices", lambda: H200)
    monkeypatch.setattr(bench_command, "serve", serve)
    flags = ["--books", "sequential", "--rounds", "3"]
    assert cli.main(["bench", str(plan_path), *flags]) == cli.DONE
    assert asked == [("llama3-8b", ["sequential"], 3, True)]
    out = capsys.readouterr().out
    assert "% sustained: measured" in out
    values = last_json(out)
    assert (values["device"], values["is_scaled_down"]) == ("NVIDIA H200", False)
    (row,) = values["books"]
    assert (row["tokens_per_s_per_gpu"], row["joules_per_token"]) == (10_000, 0.02)
    assert row["watts"] is None
    flops = 2 * load_model("llama3-8b").num_active_parameters * 10_000
    for name, peak in values["peaks"].items():
        assert row[f"percent_of_{name}"] == pytest.approx(100 * flops / peak["flops_per_s"], 1e-2)
    assert values["peaks"]["optimal"]["flops_per_s"] < values["peaks"]["datasheet"]["flops_per_s"]
    assert len(values["runs"]) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--books", "winner,loser"], "--books must be some of"),
        (["--books", "winner,winner"], "each once"),
        (["--weights", "nowhere"], "--weights must be"),
        (["--weights", "random:x"], "needs a number"),
        (["--workload", "no-such"], "no-such"),
        (["--trace", "nowhere.csv"], "cannot be read"),
        (["--model", "llama2-70b"], "llama2-70b"),
        (["--max-model-len", "999999"], "positions"),
        (["--dry-run", "--rate", "3"], "without --rate"),
    ],
)
def test_bad_input_exits_with_2_and_names_what_is_wrong(plan_path, flags, said, capsys):
    assert cli.main(["bench", str(plan_path), *flags]) == cli.BAD_INPUT
    assert said in capsys.readouterr().err


def test_a_bad_plan_or_profile_is_bad_input(tmp_path, plan_path, capsys, monkeypatch):
    assert cli.main(["bench", str(tmp_path / "none.yaml")]) == cli.BAD_INPUT
    monkeypatch.setattr(bench_command, "find_devices", lambda: H200)
    assert cli.main(["bench", str(plan_path), "--profile", "nowhere"]) == cli.BAD_INPUT
    assert "--profile must be" in capsys.readouterr().err
    other = replace(_plan("llama3-8b"), dtype="float16")
    assert cli.main(["bench", str(dumped(tmp_path, other))]) == cli.BAD_INPUT


def test_a_checkpoint_too_large_for_a_cpu_is_refused(tmp_path, plan_path, monkeypatch):
    model = load_model("llama3-8b")
    weights = bench_command.Weights(folder=tmp_path)
    with pytest.raises(ValueError, match="at most 4 GB"):
        bench_command._cpu_model(_plan("llama3-8b"), model, weights)
    tiny = load_model("tiny-llama")
    assert bench_command._cpu_model(_plan("tiny-llama"), tiny, weights) is tiny
