from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nanoflow_tune.autotune.capacity import dense_batch
from nanoflow_tune.autotune.document import REQUIRED_KEYS, document, json_line
from nanoflow_tune.autotune.html import render
from nanoflow_tune.autotune.op_table import GemmPeak, gemm_peak
from nanoflow_tune.autotune.report import Report, verdict
from nanoflow_tune.autotune.sensitivity import Movement, Sensitivity
from nanoflow_tune.profiler.profile import Point, Profile, Row
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Plan, Verification

from . import report_fakes as fakes

CERTIFICATE = {
    "status": "optimal",
    "period_us": 400.0,
    "bound_us": 396.0,
    "gap": 0.01,
    "seconds": 3.2,
    "num_binaries": 120,
    "solver": "HiGHS",
    "num_tried": 40,
}


def make_report(sequential, overlapped, winner):
    """Reports of llama3-8b from candidates, by name of the winner."""
    model = fakes.model()
    record = Verification(
        passed=True,
        device="cpu",
        model="llama3-8b (scaled down)",
        num_layers=2,
        num_ranks=1,
        dtype="float32",
        max_relative_error=2e-7,
        max_reference_error=1e-6,
        tolerance=1e-5,
        orders_checked=4,
    )
    bucket = Bucket(
        dense_batch_tokens=2048,
        decode_tokens=1024,
        decode_context_tokens=768.0,
        prefill_context_tokens=256.5,
        row_order="decodes_first",
        winner={"sequential": sequential, "overlapped": overlapped}[winner],
        sequential=sequential,
        best_overlapped=overlapped,
        lower_bound_us=33_000.0,
        power_limit_us=62_000.0,
        bound="power",
        verification=(record,),
    )
    plan = Plan(
        model="llama3-8b",
        hardware="h200",
        workload="512-512",
        num_gpus=1,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_size=16,
        buckets=(bucket,),
    )
    return Report(
        plan=plan,
        plan_path="out/plan.yaml",
        model=model,
        hardware=fakes.h200(),
        batch=dense_batch(model, fakes.h200(), fakes.workload(), fakes.space(), 1),
        race=(sequential, overlapped),
        certificate=CERTIFICATE,
        op_tables={"winner": ()},
        gemm_peak=GemmPeak(flops_per_s=700e12, source="measured sustained GEMM"),
        profile="the shipped h200 profile",
        provenance={"seed": "0"},
        elapsed_s=12.3,
    )


@pytest.fixture
def graph():
    return OpGraph.build(fakes.model())


@pytest.fixture
def predicted(graph):
    sequential = fakes.candidate(fakes.sequential(graph), 66_000.0)
    overlapped = fakes.candidate(fakes.overlapped(graph), 60_000.0)
    return make_report(sequential, overlapped, "overlapped")


@pytest.fixture
def measured(graph):
    sequential = fakes.candidate(fakes.sequential(graph), 66_000.0, 65_000.0)
    overlapped = fakes.candidate(fakes.overlapped(graph), 60_000.0, 68_000.0)
    return make_report(sequential, overlapped, "sequential")


def test_last_line_has_the_required_keys_in_order(predicted):
    values = json.loads(json_line(document(predicted)))
    assert tuple(values) == REQUIRED_KEYS
    assert values["source"] == "predicted"
    assert values["speedup"] == pytest.approx(1.1)
    assert values["watts"] is None
    assert values["tokens_per_s_per_gpu"] == pytest.approx(2048 / 60e-3, rel=1e-4)
    assert "\n" not in json_line(document(predicted))


def test_percent_of_optimal_is_of_the_gemm_peak(predicted):
    flops = 2 * fakes.model().num_parameters * 2048
    expected = 100 * flops / 700e12 / 60e-3
    assert document(predicted)["percent_of_optimal"] == pytest.approx(expected, abs=0.01)


def test_sequential_winner_is_said_with_the_overlapped_beside_it(measured):
    text = verdict(measured)
    assert text.startswith("Run the sequential plan: 65.000 ms")
    assert "68.000 ms (0.956x)" in text
    assert text.endswith("measured.")


def test_a_lead_within_the_margin_is_not_called_a_loss(graph):
    sequential = fakes.candidate(fakes.sequential(graph), 66_000.0)
    overlapped = fakes.candidate(fakes.overlapped(graph), 65_500.0)
    text = verdict(make_report(sequential, overlapped, "sequential"))
    assert "too small a lead to be trusted" in text
    assert "does not pay" not in text


def test_prediction_is_never_called_measured(predicted):
    values = document(predicted)
    assert "predicted from the shipped h200 profile, not measured" in values["verdict"]
    assert "Run the same command on 1 x NVIDIA H200" in values["next_step"]
    assert values["prediction_error"] is None


def test_measured_report_compares_measured_with_measured(measured):
    values = document(measured)
    assert values["source"] == "measured"
    assert (values["period_us"], values["best_overlapped_us"]) == (65_000.0, 68_000.0)
    assert (values["watts"], values["sm_clock_mhz"]) == (689.0, 1515)
    assert values["prediction_error"] == pytest.approx(66 / 65 - 1, rel=1e-3)


def test_one_measured_candidate_alone_does_not_make_a_measured_report(graph):
    sequential = fakes.candidate(fakes.sequential(graph), 66_000.0)
    overlapped = fakes.candidate(fakes.overlapped(graph), 60_000.0, 50_000.0)
    report = make_report(sequential, overlapped, "overlapped")
    assert document(report)["source"] == "predicted"
    assert document(report)["period_us"] == 60_000.0


def test_a_gain_that_the_power_cap_does_not_allow_is_doubted(predicted):
    assert "power cap allows (about 62.000 ms at 700 W): expect less" in verdict(predicted)
    assert "power cap" not in verdict(replace(predicted, power_limit_error=0.08))
    bucket = replace(predicted.bucket, power_limit_us=59_000.0)
    report = replace(predicted, plan=replace(predicted.plan, buckets=(bucket,)))
    assert "power cap" not in verdict(report)


def test_unknown_joules_are_null_and_a_dash(predicted):
    winner = predicted.bucket.winner
    unknown = replace(winner, predicted=replace(winner.predicted, joules=0.0))
    bucket = replace(predicted.bucket, winner=unknown, power_limit_us=0.0)
    report = replace(predicted, plan=replace(predicted.plan, buckets=(bucket,)), race=(unknown,))
    values = document(report)
    assert values["joules_per_token"] is None
    assert values["power_limit_us"] is None
    assert "- mJ" in render(values, {})


def test_page_is_self_contained_and_escaped(predicted):
    report = replace(predicted, reasons=("<script>",))
    page = render(document(report), {"timeline": b"\x89PNG"})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_is_the_same_from_the_saved_document(predicted):
    values = document(predicted)
    assert render(json.loads(json.dumps(values)), {}) == render(values, {})


def test_gemm_peak_is_the_best_row_on_all_sms():
    def row(tokens, num_sms, us, kind="gemm", shape="n28672_k4096"):
        point = Point(
            kind=kind,
            shape=shape,
            variant="cublas",
            tokens=tokens,
            kv_len=0,
            num_sms=num_sms,
        )
        return Row(
            point=point,
            median_us=us,
            p10_us=us,
            p90_us=us,
            n=9,
            joules=0.0,
            joules_source="missing",
            sm_clock_mhz=1500.0,
            watts=690.0,
        )

    experts = row(2048, 132, 1.0, "grouped_gemm", "e8_t2_n28672_k4096")
    rows = (row(2048, 132, 700.0), row(2048, 100, 1.0), row(1024, 132, 360.0), experts)
    peak = gemm_peak(
        Profile(hardware="h200", dtype="bfloat16", rows=rows), fakes.h200(), "bfloat16"
    )
    assert peak.flops_per_s == pytest.approx(2 * 28672 * 4096 * 2048 / 700e-6)
    assert gemm_peak(None, fakes.h200(), "bfloat16").source == "datasheet peak"


def test_page_says_how_often_noise_changes_the_choice(predicted):
    assert document(predicted)["sensitivity"] is None
    movement = Movement(
        role="winner", name="overlapped", period_us=60_000.0, p10=-0.01, p50=0.0, p90=0.012
    )
    found = Sensitivity(
        noise=0.05, trials=20, seed=0, movements=(movement,), choice="overlapped", flip_share=0.15
    )
    values = document(replace(predicted, sensitivity=found))
    assert values["sensitivity"]["movements"][0]["p90"] == 0.012
    page = render(values, {})
    assert "off by up to 5 %" in page
    assert "(overlapped) changes in 3 of 20 trials." in page
    assert "<td>-1.00 %</td><td>+0.00 %</td><td>+1.20 %</td>" in page
    del values["sensitivity"]  # a report from before it was there
    assert "Sensitivity" not in render(values, {})


def faster_overlapped(graph):
    """Overlap wins, measured, below the power limit of 62 ms, at lower clocks."""
    sequential = fakes.candidate(fakes.sequential(graph), 66_000.0, 65_000.0)
    overlapped = fakes.candidate(fakes.overlapped(graph), 66_500.0, 60_000.0)
    timing = replace(overlapped.measured, sm_clock_mhz=1380.0, joules=27.9)
    return make_report(sequential, replace(overlapped, measured=timing), "overlapped")


def test_a_measured_winner_below_the_power_limit_makes_that_an_estimate(graph):
    values = document(faster_overlapped(graph))
    assert "62.000 ms at 700 W, an estimate that the measured winner beats" in values["next_step"]
    assert "or about" not in values["next_step"]
    assert "only the first row is one" in render(values, {})
    slower = faster_overlapped(graph)
    bucket = replace(slower.bucket, power_limit_us=50_000.0)
    values = document(replace(slower, plan=replace(slower.plan, buckets=(bucket,))))
    assert "or about 50.000 ms at 700 W" in values["next_step"]
    assert "only the first row is one" not in render(values, {})


def test_a_winner_at_the_cap_says_what_it_saves(graph, measured):
    text = document(faster_overlapped(graph))["next_step"]
    assert "1380 MHz instead of 1515, and a token costs 10% fewer joules" in text
    assert text.startswith("`nanoflow-tune bench plan.yaml`")
    assert "fewer joules" not in document(measured)["next_step"]  # sequential won


def test_the_page_sets_commands_as_code_and_says_measured_once(graph):
    page = render(document(faster_overlapped(graph)), {})
    assert "<p><code>nanoflow-tune bench plan.yaml</code> serves it" in page


def test_a_measured_winner_that_noise_does_not_explain_is_said(graph):
    movement = Movement(role="winner", name="overlapped", period_us=6e4, p10=0.0, p50=0.0, p90=0.0)
    found = Sensitivity(
        noise=0.05, trials=20, seed=0, movements=(movement,), choice="sequential", flip_share=0.0
    )
    page = render(document(replace(faster_overlapped(graph), sensitivity=found)), {})
    assert "Measured, overlapped wins: predictions miss by more than this noise" in page
