from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from builders import NUM_SMS, ping_pong, sequential, tiny_model

from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.plan import (
    BreakEven,
    Bucket,
    Candidate,
    NanoBatch,
    Plan,
    Timing,
    Verification,
)
from nanoflow_tune.runtime.plan_io import dump_plan, load_plan
from nanoflow_tune.runtime.schedule import IllegalScheduleError
from nanoflow_tune.search_spaces.records import SpecError
from nanoflow_tune.search_spaces.schema import HardwareSpec

GRAPH = OpGraph.build(tiny_model())
HARDWARE = HardwareSpec(
    name="card",
    device_name="Card",
    num_sms=NUM_SMS,
    sm_granularity=4,
    peak_flops_per_s={"bfloat16": 1e15},
    memory_bytes=10**11,
    memory_bytes_per_s=4e12,
    l2_bytes=10**7,
    link_bytes_per_s=4e11,
    max_link_gpus=8,
    power_cap_w=700.0,
)


def _candidate(schedule):
    return Candidate(schedule=schedule, predicted=Timing(period_us=10.5, source="predicted"))


def make_plan(overlapped=None):
    overlapped = overlapped or ping_pong(GRAPH, 128, 256, (80, 20))
    bucket = Bucket(
        dense_batch_tokens=256,
        decode_tokens=100,
        decode_context_tokens=30.0,
        prefill_context_tokens=10.5,
        row_order="interleaved",
        winner=_candidate(overlapped),
        sequential=_candidate(sequential(GRAPH, 256, 100)),
        best_overlapped=_candidate(overlapped),
        lower_bound_us=5.0,
        power_limit_us=6.0,
        bound="compute",
        verification=(
            Verification(
                passed=True,
                device="cpu",
                model="tiny",
                num_layers=3,
                num_ranks=1,
                dtype="float32",
                max_relative_error=1e-7,
                max_reference_error=1e-6,
                tolerance=1e-5,
                orders_checked=4,
            ),
        ),
    )
    return Plan(
        model="tiny-llama",
        hardware="card",
        workload="w",
        num_gpus=1,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        page_size=16,
        inputs={"model": "abc"},
        buckets=(bucket,),
    )


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "plans" / "plan.yaml"
    dump_plan(make_plan(), path)
    return path


def _edit(path, change):
    mapping = yaml.safe_load(path.read_text())
    change(mapping)
    path.write_text(yaml.safe_dump(mapping, sort_keys=False))
    return path


def test_a_plan_survives_the_file_and_leaves_no_temporary_one(written):
    assert load_plan(written, GRAPH, HARDWARE) == make_plan()
    assert [path.name for path in written.parent.iterdir()] == ["plan.yaml"]
    lines = written.read_text().splitlines()
    nano_ops = [line for line in lines if "op: decode_attention" in line]
    assert len(nano_ops) == 2 + 1  # the winner is the best overlapped one: written once
    assert "tokens: [0, 128]" in nano_ops[0]


NAME = "overlapped-256-100"


def test_the_schedules_of_a_book_are_written_once_and_kept_apart_by_name(tmp_path):
    plan = make_plan()
    main = plan.buckets[0]
    longer = replace(main, decode_context_tokens=60.0)
    other = ping_pong(GRAPH, 64, 256, (50, 50))
    third = replace(main, decode_context_tokens=90.0, best_overlapped=_candidate(other))
    even = BreakEven(
        mix="steady", decode_context_tokens=30.0, smallest_tokens=256, largest_tokens=256
    )
    book = replace(plan, buckets=(main, longer, third), break_even=(even,))
    path = tmp_path / "plan.yaml"
    dump_plan(book, path)
    assert load_plan(path, GRAPH, HARDWARE) == book
    mapping = yaml.safe_load(path.read_text())
    assert list(mapping["schedules"]) == [NAME, "sequential-256-100", f"{NAME}-2"]
    assert mapping["buckets"][2]["best_overlapped"]["schedule"] == f"{NAME}-2"


def test_a_plan_of_the_first_schema_is_still_read(written):
    mapping = yaml.safe_load(written.read_text())
    schedules = mapping.pop("schedules")
    for role in ("winner", "sequential", "best_overlapped"):
        candidate = mapping["buckets"][0][role]
        candidate["schedule"] = schedules[candidate["schedule"]]
    mapping["schema"] = "nanoflow-plan/1"
    written.write_text(yaml.safe_dump(mapping, sort_keys=False))
    assert load_plan(written, GRAPH, HARDWARE) == make_plan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["buckets"][0]["winner"].update(schedule="fast"),
            r"`buckets\[0\].winner.schedule`: must be a name under `schedules`.*'fast'; known",
        ),
        (
            lambda m: m["schedules"].update(spare=m["schedules"][NAME]),
            r"`schedules`: no bucket refers to spare; remove it",
        ),
        (lambda m: m.pop("schedules"), r"`schedules`: must map names to schedules"),
        (lambda m: m.update(buckets=3), r"`buckets`: must be a list"),
        (lambda m: m.update(buckets=[3], schedules={}), r"`buckets\[0\]`: must be a mapping"),
        (lambda m: m.update(buckets=[], schedules={}), r"`buckets`: must hold at least one"),
    ],
)
def test_a_wrong_reference_is_refused_with_its_path(written, change, message):
    with pytest.raises(SpecError, match=message):
        load_plan(_edit(written, change))


def test_another_schema_is_refused(written):
    _edit(written, lambda m: m.update(schema="nanoflow-plan/9"))
    with pytest.raises(SpecError, match=r"plan.yaml: `schema`: must be 'nanoflow-plan/3'.*anew"):
        load_plan(written)


def test_an_unknown_key_is_refused_with_its_path(written):
    _edit(written, lambda m: m["schedules"][NAME]["nano_ops"][1].update(sms=3))
    with pytest.raises(
        SpecError,
        match=r"plan.yaml: `schedules.overlapped-256-100`: .*nano_ops\[1\].sms`: unknown key",
    ):
        load_plan(written)


def test_a_wrong_type_is_refused_with_its_path(written):
    _edit(written, lambda m: m["buckets"][0].update(dense_batch_tokens="256"))
    with pytest.raises(SpecError, match=r"`buckets\[0\].dense_batch_tokens`: must be a whole num"):
        load_plan(written)


def test_a_schedule_for_other_rows_than_the_bucket_is_refused(written):
    _edit(written, lambda m: m["buckets"][0].update(decode_tokens=99))
    with pytest.raises(SpecError, match=r"`buckets\[0\].winner.schedule`: .* make them agree"):
        load_plan(written)


def _with_nano_op(schedule, index, **changes):
    nano_ops = list(schedule.nano_ops)
    nano_ops[index] = replace(nano_ops[index], **changes)
    return replace(schedule, nano_ops=tuple(nano_ops))


GOOD = ping_pong(GRAPH, 128, 256, (80, 20))
KQV = next(i for i, nano_op in enumerate(GOOD.nano_ops) if nano_op.op == "kqv")


def _swapped(schedule):
    nano_ops = list(schedule.nano_ops)
    nano_ops[KQV], nano_ops[KQV + 1] = nano_ops[KQV + 1], nano_ops[KQV]
    return replace(schedule, nano_ops=tuple(nano_ops))


ILLEGAL = {
    "order": (_swapped(GOOD), r"illegal order: rope_append.0 .* needs kqv.0"),
    "overlap": (
        _with_nano_op(GOOD, KQV, tokens=(0, 132)),
        r"token ranges of kqv overlap: \[128, 256\)",
    ),
    "missing": (
        _with_nano_op(GOOD, KQV, tokens=(0, 124)),
        r"token ranges of kqv miss rows: \[128, 256\) where row 124",
    ),
    "outside": (
        _with_nano_op(GOOD, KQV, tokens=(128, 300)),
        r"token ranges of kqv",
    ),
    "share": (_with_nano_op(GOOD, KQV, num_sms=140), r"kqv.0 asks for 140 SMs, but .* has 132"),
    "granularity": (_with_nano_op(GOOD, KQV, num_sms=77), r"kqv.0 asks for 77 SMs; a share must"),
    "sum": (_with_nano_op(GOOD, KQV, num_sms=100), r"kqv.0 .*100 SMs.* same time"),
    "op": (_with_nano_op(GOOD, KQV, op="kvq"), r"unknown op 'kvq'; this graph has attn_norm, kqv"),
    "old op": (
        _with_nano_op(GOOD, KQV, op="silu_mul"),
        r"unknown op 'silu_mul'.* by another version say, cannot run: tune again",
    ),
    "nano-batch": (
        replace(
            GOOD,
            nano_batches=(
                NanoBatch(tokens=(0, 100), decode_tokens=80),
                NanoBatch(tokens=(128, 256), decode_tokens=20),
            ),
        ),
        r"nano-batches must tile the dense batch",
    ),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_schedule_that_must_not_run_is_refused_by_name(tmp_path, name):
    schedule, message = ILLEGAL[name]
    path = tmp_path / "plan.yaml"
    dump_plan(make_plan(schedule), path)
    with pytest.raises(
        IllegalScheduleError, match=r"plan.yaml: `buckets\[0\].winner.schedule`: .*" + message
    ):
        load_plan(path, GRAPH, HARDWARE)
