from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.pair_figure import pair_cells, pairs_png
from nanoflow_tune.autotune.report_sections import (
    energy_by_op,
    energy_section,
    steps_section,
)
from nanoflow_tune.autotune.roofline_figure import RoofPoint, groups_of, roof, roofline_png
from nanoflow_tune.profiler.profile import PairRow, Point

from .fakes import h200


def point(kind, num_sms, tokens=1024):
    return Point(kind=kind, shape="x", variant="v", tokens=tokens, kv_len=0, num_sms=num_sms)


def pair(a, b, slowdown_a, slowdown_b, **changes):
    fields = {"watts": 700.0, "sm_clock_mhz": 1500.0, "n": 100, "source": "measured"}
    return PairRow(a=a, b=b, slowdown_a=slowdown_a, slowdown_b=slowdown_b, **{**fields, **changes})


def test_cells_put_compute_first_and_take_medians():
    pairs = [
        pair(point("gemm", 100), point("decode_attention", 32), 1.1, 1.2),
        pair(point("gemm", 100, 2048), point("decode_attention", 32), 1.3, 1.4),
        # The same pair the other way round is the same cell.
        pair(point("decode_attention", 32), point("gemm", 100), 1.9, 1.2),
        pair(point("norm", 16), point("gemm", 116), 1.5, 1.0),
        pair(point("gemm", 84), point("norm", 48), 9.0, 9.0, source="interpolated"),
    ]
    cells = pair_cells(pairs)
    both = cells[("gemm", "decode_attention"), (100, 32)]
    assert (both.slowdown_a, both.slowdown_b, both.num_kernels) == (1.2, 1.4, 3)
    norm = cells[("gemm", "norm"), (116, 16)]
    assert (norm.slowdown_a, norm.slowdown_b) == (1.0, 1.5)
    assert len(cells) == 2


def test_heat_map_is_drawn_of_measured_pairs_only():
    measured = pair(point("gemm", 100), point("decode_attention", 32), 1.1, 2.6)
    assert pairs_png([measured], title="a", subtitle="b").startswith(b"\x89PNG")
    free = pair(point("gemm", 132), point("all_reduce", 0), 1.1, 1.0)
    assert pairs_png([measured, free], title="a", subtitle="b") is not None
    guessed = replace(measured, source="interpolated")
    assert pairs_png([guessed], title="a", subtitle="b") is None
    assert pairs_png([], title="a", subtitle="b") is None


def roof_point(intensity, tflops, name="op"):
    return RoofPoint(
        name=name, kind="gemm", flops=intensity * 1e6, memory_bytes=1e6, us=intensity / tflops
    )


def test_the_roof_is_bandwidth_up_to_the_ridge_and_peak_beyond():
    assert roof(10, 989e12, 4.8e12) == 48e12
    assert roof(1000, 989e12, 4.8e12) == 989e12
    made = roof_point(500, 700)
    assert made.intensity == 500
    assert made.flops_per_s == pytest.approx(700e12)


def test_close_names_share_a_column_also_by_others_between_them():
    far = roof_point(5, 20, "far")
    chain = [roof_point(x, 700, str(x)) for x in (100, 1500, 700, 250)]
    groups = [{held.name for held in group} for group in groups_of([*chain, far])]
    assert sorted(groups, key=len) == [{"far"}, {"100", "250", "700", "1500"}]


def test_roofline_needs_an_op_with_flops_and_bytes():
    arguments = {
        "sustained_flops_per_s": 800e12, "sustained": "GEMM", "title": "a", "subtitle": "b",
    }  # fmt: skip
    drawn = roofline_png([roof_point(500, 700)], h200(), "bfloat16", **arguments)
    assert drawn.startswith(b"\x89PNG")
    norm = RoofPoint(name="norm", kind="norm", flops=0.0, memory_bytes=1e6, us=1.0)
    assert roofline_png([norm], h200(), "bfloat16", **arguments) is None
    assert roofline_png([], h200(), "bfloat16", **arguments) is None


def op_row(op, joules, alone_us=100.0):
    return {"op": op, "joules": joules, "alone_us": alone_us}


def join(heads, rows):
    return "\n".join("|".join(row) for row in [tuple(heads), *rows])


def test_energy_adds_the_nano_ops_of_an_op():
    rows = [op_row("kqv", 0.01), op_row("down", 0.05), op_row("kqv", 0.02), op_row("norm", 0.0)]
    assert energy_by_op(rows) == [
        ("down", 0.05, pytest.approx(1e-4)),
        ("kqv", pytest.approx(0.03), pytest.approx(2e-4)),
    ]
    text = energy_section({"ops": {"winner": rows}, "dense_batch_tokens": 1000}, join)
    assert "down|50.0|62.5 %|500|50.0" in text
    assert "all|80.0|||80.0" in text


def test_energy_is_left_out_where_it_is_not_known():
    old = [{"op": "kqv", "alone_us": 1.0}]
    assert energy_section({"ops": {"winner": old}, "dense_batch_tokens": 10}, join) == ""
    assert energy_section({"ops": {}, "dense_batch_tokens": 10}, join) == ""


def race_row(name, period_us, *, is_concurrent=True):
    return {
        "name": name,
        "period_us": period_us,
        "is_concurrent": is_concurrent,
        "source": "measured",
    }


def test_steps_run_from_sequential_to_the_best_that_really_overlaps():
    race = [
        race_row("sequential", 100e3, is_concurrent=False),
        race_row("single_batch_milp", 50e3, is_concurrent=False),
        race_row("overlapped_milp", 110e3),
        race_row("overlapped_refined", 105e3),
        race_row("nano_only", 104e3, is_concurrent=False),
    ]
    lines = steps_section({"race": race}, join).splitlines()
    assert [line.split("|")[1] for line in lines[1:]] == [
        "sequential",
        "nano only",
        "overlapped refined",
    ]
    assert lines[-1].split("|")[2:4] == ["105.000", "-4.8 %"]
    assert steps_section({"race": race[:1]}, join) == ""
