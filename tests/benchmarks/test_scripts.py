"""What the benchmark scripts print and write; needs no GPU, which only their figures do."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from .conftest import BENCHMARKS

HEADER = {"gpu": "a GPU", "commit": "abc", "command": "python x.py", "date": "2026-01-01"}


def turns(ab, name, *times_us, clock=1500.0):
    clocks = (clock,) * len(times_us)
    return ab.Turns(name=name, times_us=times_us, clocks_mhz=clocks, watts=690.0)


def test_a_ratio_is_formed_within_each_round(load):
    ab = load("ab")
    figure = ab.ratio(
        "f", "c", ">= 0.9", turns(ab, "mine", 10, 20, 10), turns(ab, "other", 11, 18, 9)
    )
    assert figure.values == pytest.approx((1.1, 0.9, 0.9))
    assert figure.value == pytest.approx(0.9)
    assert ab.figure_row(figure, HEADER).spread == "0.900-1.100"
    half = ab.ratio("f", "c", ">= 0.9", turns(ab, "mine", 20), turns(ab, "other", 10), 64 / 128)
    assert half.value == pytest.approx(1.0)


def test_details_carry_their_header_and_a_figure_its_origin(load, tmp_path):
    ab = load("ab")
    figure = ab.ratio("gemm", "a, b", ">= 0.97", turns(ab, "mine", 10), turns(ab, "cublas", 10))
    ab.write_table(tmp_path / "gemm.csv", [figure], HEADER)
    text = (tmp_path / "gemm.csv").read_text()
    assert text.startswith("# gpu: a GPU\n# commit: abc\n")
    cells = 'gemm,"a, b",1.0000,x,>= 0.97,1.000-1.000,mine,10.00,1500,cublas,10.00,1500,690,1'
    assert cells in text
    row = ab.figure_row(figure, HEADER)
    assert (row.commit, row.gpu, row.is_reached) == ("abc", "a GPU", True)


def test_contenders_take_turns_and_the_order_is_reversed_every_round(load, monkeypatch):
    ab = load("ab")
    from nanoflow_tune.profiler import timing

    order = []

    class FakeBatch:
        num_calls = 2

        def __init__(self, us):
            self.us = us

        def replay(self):
            pass

    class FakeMeter:
        watts = 500.0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def timed_replays(replay, count, meter):
        order.append(replay.__self__.us)
        return [replay.__self__.us] * count, 1500.0 + len(order)

    monkeypatch.setattr(timing, "timed_replays", timed_replays)
    timer = SimpleNamespace(meter=FakeMeter(), replay_us=lambda batch: batch.us)
    found = ab.take_turns(timer, {"a": FakeBatch(10.0), "b": FakeBatch(20.0)}, 2)
    assert order == [10.0, 20.0, 20.0, 10.0]
    assert found["b"].times_us == (10.0, 10.0)
    assert found["b"].clocks_mhz == (1502.0, 1503.0)
    assert found["b"].watts == 500.0


def test_every_gemm_of_the_layers_is_a_case_at_each_number_of_tokens(load):
    cases = load("ab").gemm_cases((512, 1024, 2048))
    assert len(cases) == 24
    assert ("n28672_k4096", 2048) in cases.values()


def test_attention_figures_are_bytes_per_clock_and_ratios(load):
    ab, attention = load("ab"), load("attention")
    cases = attention.attention_cases(132)
    few = next(case for case in cases if case.id == "attn_per_sm" and case.num_sms == 8)
    assert few.memory_bytes == pytest.approx(512 * 1024 * 4096 + 2 * 512 * 8192)
    ideal_us = few.memory_bytes / (8 * 64 * 1.5e9) * 1e6
    measured = {
        "triton": turns(ab, "triton", 2 * ideal_us),
        "sm90": turns(ab, "sm90", ideal_us),
    }
    own, *variants = attention.figures(few, measured)
    assert (own.unit, own.value) == ("B/clk", pytest.approx(64))
    assert [row.value for row in variants] == pytest.approx([1.0, 2.0])
    full = next(case for case in cases if case.id == "attn_full")
    assert {row.id for row in attention.figures(full, measured)} == {"attn_variants"}
    measured["flashinfer"] = turns(ab, "flashinfer", 1.1 * ideal_us)
    own = attention.figures(full, measured)[0]
    assert (own.id, own.value) == ("attn_full", pytest.approx(1.1))
    fast = turns(ab, "triton", ideal_us, ideal_us, clock=1500.0)
    slow_clock = attention.figures(few, {"triton": fast})[0]
    assert slow_clock.values == pytest.approx((64, 64))


@pytest.mark.parametrize("script", ["gemm_full", "gemm_share", "attention"])
def test_dry_run_prints_the_cases_and_the_seconds(script, tmp_path):
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), "--dry-run", "--only", "llama2-70b TP2"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    *cases, last = found.stdout.splitlines()
    assert cases
    assert all("llama2-70b TP2" in case for case in cases)
    assert last.startswith(f"{len(cases)} cases, about ")
    assert not list(tmp_path.iterdir())


def test_variants_are_ranked_by_a_burst_and_slow_or_failing_ones_left_out(load, capsys):
    ab = load("ab")
    times = {"a": 12.0, "b": 10.0, "c": 10.5, "d": None}

    def measure(point, with_joules):
        us = times[point.variant]
        return SimpleNamespace(median_us=us or 0.0, error="" if us else "refused")

    bench = object.__new__(ab.Bench)
    bench.sweep = SimpleNamespace(measure=measure)
    points = [SimpleNamespace(variant=name, num_sms=132) for name in times]
    assert [p.variant for p in bench.ranked(points)] == ["b", "c", "a"]
    assert [p.variant for p in bench.ranked(points, 1.06)] == ["b", "c"]
    assert bench.fastest(points).variant == "b"
    assert "d on 132 SMs: refused" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no variant ran"):
        bench.ranked(points[3:])
