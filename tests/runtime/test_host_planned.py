"""Schedules whose attention plans on the host, and what an engine on a GPU runs in its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_builders import CPU, MODEL, ROWS, book_of, bucket, make_engine, plan_of
from engine_builders import make_request as request_of
from test_engine import run_all

from nanoflow_tune.runtime import serving_setup
from nanoflow_tune.runtime.host_planned import without_host_planned
from nanoflow_tune.runtime.kernels import graph_variants as held
from nanoflow_tune.runtime.kernels import registry
from nanoflow_tune.runtime.model_runner import ModelRunner
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan_io import dump_plan
from nanoflow_tune.runtime.plan_match import LiveGpus
from nanoflow_tune.runtime.weights import random_weights
from nanoflow_tune.search_spaces.loader import content_hash, load_hardware, load_model

GRAPH = OpGraph.build(MODEL)
STAND_INS = {"decode_attention": "sm90", "prefill_attention": "triton"}
GUESTS = {"decode_attention": "flashinfer", "prefill_attention": "flashinfer_fa3"}
REMARKS = {
    "decode_attention flashinfer -> sm90: it plans on the host, which no CUDA graph holds",
    "prefill_attention flashinfer_fa3 -> triton: it plans on the host, which no CUDA graph holds",
}


def guest(candidate):
    """The candidate with FlashInfer's attention."""
    nano_ops = tuple(
        replace(n, variant=GUESTS.get(GRAPH.op(n.op).kind, n.variant))
        for n in candidate.schedule.nano_ops
    )
    return replace(candidate, schedule=replace(candidate.schedule, nano_ops=nano_ops))


def guest_buckets():
    own = bucket(GRAPH, ROWS, ROWS // 2)
    names = ("winner", "sequential", "best_overlapped")
    return (replace(own, **{name: guest(getattr(own, name)) for name in names}),)


def variants_of(schedule):
    return {(GRAPH.op(n.op).kind, n.variant) for n in schedule.nano_ops}


def test_only_variants_that_plan_on_the_host_change():
    schedule = guest_buckets()[0].winner.schedule
    changed, remarks = without_host_planned(schedule, GRAPH, STAND_INS)
    assert set(remarks) == REMARKS
    assert len(remarks) == 2  # once, however many nano-ops there are
    for before, after in zip(schedule.nano_ops, changed.nano_ops, strict=True):
        kind = GRAPH.op(before.op).kind
        assert after == replace(before, variant=STAND_INS.get(kind, before.variant))
    assert replace(changed, nano_ops=schedule.nano_ops) == schedule
    again, none = without_host_planned(changed, GRAPH, STAND_INS)
    assert again is changed
    assert none == ()


def test_a_kind_without_a_stand_in_keeps_its_variant():
    schedule = guest_buckets()[0].sequential.schedule
    changed, remarks = without_host_planned(schedule, GRAPH, {"prefill_attention": "triton"})
    assert ("decode_attention", "flashinfer") in variants_of(changed)
    assert len(remarks) == 1


def test_every_choice_of_a_book_can_be_captured_and_says_that_its_times_are_not_its_own():
    book, native = book_of(buckets=guest_buckets()), book_of()
    before = dict(book.choices)
    label = book.choose(32, 32, 24.0).label
    assert not any(choice.is_capturable for choice in before.values())
    assert set(book.hold_in_graphs(GRAPH, STAND_INS)) == REMARKS
    assert set(book.replaced) == REMARKS
    assert book.choices.keys() == before.keys()
    assert book.sizes == native.sizes
    for key, choice in book.choices.items():
        assert choice.is_capturable
        assert choice.is_replaced
        assert choice.period_us == before[key].period_us
    chosen = book.choose(32, 32, 24.0)
    assert chosen.choice is book.choices["bucket 0"]
    assert chosen.label == f"{label[:-1]}; not with the kernels it was timed with)"
    after = dict(book.choices)
    assert set(book.hold_in_graphs(GRAPH, STAND_INS)) == REMARKS  # of the first time
    assert book.choices == after


def test_a_book_of_capturable_kernels_stays_as_it_is():
    book = book_of()
    before = dict(book.choices)
    assert book.hold_in_graphs(GRAPH, STAND_INS) == ()
    assert all(book.choices[key] is choice for key, choice in before.items())
    assert "not with the kernels" not in book.choose(32, 32, 24.0).label


@pytest.mark.parametrize(
    ("changes", "page_size", "major", "decode"),
    [
        ({}, 16, 9, "sm90"),
        ({"head_dim": 64}, 16, 9, "sm90"),
        ({"head_dim": 256}, 16, 9, "triton"),
        ({"torch_dtype": "float16"}, 16, 9, "triton"),
        ({"num_attention_heads": 136}, 16, 9, "triton"),  # 17 query heads a kv head
        ({}, 32, 9, "triton"),
        ({}, 16, 8, "triton"),
        ({}, 16, 10, "triton"),
    ],
)
def test_decode_attention_for_hopper_stands_in_where_it_runs(changes, page_size, major, decode):
    pytest.importorskip("triton")  # the kernels for GPUs are written in it
    graph = OpGraph.build(replace(load_model("llama3-8b"), **changes))
    found = held.graph_variants(graph, page_size, major)
    assert found == {"decode_attention": decode, "prefill_attention": "triton"}


def test_the_registry_says_what_is_there(monkeypatch):
    pytest.importorskip("triton")
    held.graph_variants(GRAPH, 16, 9)  # has loaded them
    there = dict(registry._VARIANTS)
    for name in ("sm90", "triton"):
        there.pop(("decode_attention", name, "cuda"))
    guests = {
        ("decode_attention", "flashinfer", "cuda"): registry.Variant(
            kind="decode_attention", name="flashinfer", device_type="cuda", kernel=print
        )
    }
    monkeypatch.setattr(registry, "_VARIANTS", guests | there)
    monkeypatch.setattr(held, "load", lambda group: None)
    graph = OpGraph.build(load_model("llama3-8b"))
    assert held.graph_variants(graph, 16, 9)["decode_attention"] == "torch"


def test_serving_on_a_gpu_replaces_them_and_says_so_once(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    hardware = load_hardware("h200")
    plan = replace(plan_of(buckets=guest_buckets()), inputs={"model": content_hash(MODEL)})
    dump_plan(plan, tmp_path / "plan.yaml")
    gpus = LiveGpus(name=hardware.device_name, count=1, num_sms=hardware.num_sms)
    monkeypatch.setattr(serving_setup, "_live_gpus", lambda: gpus)
    monkeypatch.setattr(serving_setup, "load_model", lambda _: MODEL)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    books = {}
    for device in ("cuda", "cpu"):
        said = []
        options = serving_setup.ServingOptions(
            plan=tmp_path / "plan.yaml",
            weights="random",
            device=device,
            cache_bytes=1 << 26,
            max_model_len=64,
        )
        books[device] = serving_setup.prepare(options, say=said.append).book
        replaced = [line for line in said if "plans on the host" in line]
        assert len(replaced) == (2 if device == "cuda" else 0)
    assert all(choice.is_capturable for choice in books["cuda"].choices.values())
    assert not any(choice.is_replaced for choice in books["cpu"].choices.values())
    # The tiny model is fp32: decode attention for Hopper takes bf16 alone.
    served = variants_of(books["cuda"].choices["sequential 64"].schedule)
    assert {("decode_attention", "triton"), ("prefill_attention", "triton")} <= served


def test_the_engine_tells_of_replaced_kernels_and_of_steps_that_no_graph_held(monkeypatch, caplog):
    launch = ModelRunner.launch

    def eagerly(self, inputs):
        return replace(launch(self, inputs), is_eager=True)

    book = book_of(buckets=guest_buckets())
    book.hold_in_graphs(GRAPH, {"decode_attention": "torch"})
    requests = [request_of("a", 20, 4, ignore_eos=True)]
    for is_eager in (False, True):
        if is_eager:
            monkeypatch.setattr(ModelRunner, "launch", eagerly)
        engine = make_engine(book, random_weights(MODEL, device=CPU))
        caplog.clear()
        run_all(engine, requests)
        stats = engine.stats
        assert len(stats.replaced_kernels) == 1
        assert stats.eager_steps_total == (stats.steps_total if is_eager else 0)
        named = "prefill_attention flashinfer_fa3 plans on the host" in stats.eager_why
        assert named == is_eager
        said = [r for r in caplog.records if "without CUDA graphs" in r.getMessage()]
        assert len(said) == is_eager
