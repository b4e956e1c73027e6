"""Forecasts: steps as the engine forms them, times as the plan has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.profiler.serving_case import ServingCase
from nanoflow_tune.profiler.serving_forecast import KV_BANDWIDTH, fitting_pages, forecast
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import Bucket, Candidate, NanoBatch, NanoOp, Plan, Schedule, Timing
from nanoflow_tune.runtime.plan_choice import PlanBook
from nanoflow_tune.search_spaces.loader import load_hardware, load_model

MODEL = load_model("tiny-llama")
GRAPH = OpGraph.build(MODEL)
WHOLE = (0, 64)
SEQUENTIAL = Candidate(
    schedule=Schedule(
        name="sequential",
        nano_batches=(NanoBatch(tokens=WHOLE, decode_tokens=32),),
        nano_ops=tuple(
            NanoOp(op=op, tokens=WHOLE, lane="compute", num_sms=132, variant="torch")
            for op in GRAPH.op_names
        ),
    ),
    predicted=Timing(period_us=1000.0, source="predicted"),
)
BUCKET = Bucket(
    dense_batch_tokens=64,
    decode_tokens=32,
    decode_context_tokens=24.0,
    prefill_context_tokens=8.0,
    row_order="decodes_first",
    winner=SEQUENTIAL,
    sequential=SEQUENTIAL,
    best_overlapped=SEQUENTIAL,
    lower_bound_us=1.0,
    power_limit_us=1.0,
    bound="compute",
)
H200 = load_hardware("h200")
PLAN = Plan(
    model=MODEL.name,
    hardware="h200",
    workload="512-512",
    num_gpus=1,
    dtype="float32",
    kv_dtype="float32",
    page_size=16,
    buckets=(BUCKET,),
)
BOOK = PlanBook.from_plan(GRAPH, PLAN, H200)


def case_of(*lengths, num_pages=400):
    return ServingCase(
        model=MODEL, hardware=H200, tp_degree=1, lengths=lengths, num_pages=num_pages
    )


def test_one_request_takes_its_prompt_and_a_step_for_each_further_token():
    found = forecast(case_of((100, 10)), PLAN, BOOK)
    assert found.steps == 2 + 9  # 64 and 36 tokens of the prompt, the last with the first answer
    assert found.mean_rows == pytest.approx((100 + 9) / 11)
    assert found.full_steps == 1
    assert found.padding_rows == 28 + 9 * 15  # of 64 and of 16 rows
    assert found.num_tokens == 110
    assert found.preemptions == 0


def test_times_are_those_of_the_plan_but_for_the_keys_that_are_read():
    whole = forecast(case_of((64, 1)), PLAN, BOOK)
    key_s = MODEL.kv_bytes_per_token / (KV_BANDWIDTH * H200.memory_bytes_per_s)
    bucket_s = 1e-6 * PLAN.buckets[0].sequential.predicted.period_us
    own_s = PLAN.buckets[0].decode_tokens * PLAN.buckets[0].decode_context_tokens * key_s
    assert whole.elapsed_s == pytest.approx(bucket_s - own_s)
    more = forecast(case_of((64, 2)), PLAN, BOOK)
    assert more.elapsed_s - whole.elapsed_s == pytest.approx(
        (bucket_s - own_s) * 16 / 64 + 65 * key_s
    )


def test_what_does_not_fit_the_pages_waits():
    lengths = [(30, 30)] * 20
    roomy, tight = (forecast(case_of(*lengths, num_pages=n), PLAN, BOOK) for n in (200, 20))
    assert tight.steps > roomy.steps
    assert 0.5 < tight.mean_pages < tight.peak_pages <= 1.0


def test_the_pages_are_those_that_the_card_has_room_for():
    case = replace(case_of((1, 1), num_pages=None), model=load_model("llama3-8b"))
    assert 50_000 < fitting_pages(case) < 62_000  # 141 GB less 16 of weights and 8 for others
    large = replace(case, model=load_model("llama2-70b"))
    assert 0 < fitting_pages(replace(large, tp_degree=2)) < fitting_pages(case)
    small = replace(H200, memory_bytes=10**10)
    with pytest.raises(ValueError, match="must fit 1 x h200 beside a KV cache"):
        fitting_pages(replace(large, hardware=small))
