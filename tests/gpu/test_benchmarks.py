"""What the benchmark scripts print and write; needs no GPU, which only their figures do."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEADER = {"gpu": "a GPU", "commit": "abc", "command": "python x.py", "date": "2026-01-01"}


@pytest.fixture
def load(monkeypatch):
    """Import a script as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield module
    sys.modules.pop("ab", None)


def turns(ab, name, *times_us, clock=1500.0):
    return ab.Turns(name=name, times_us=times_us, sm_clock_mhz=clock, watts=690.0)


def test_a_ratio_is_formed_within_each_round(load):
    ab = load("ab")
    figure = ab.ratio("f", "c", 0.9, turns(ab, "mine", 10, 20, 10), turns(ab, "other", 11, 18, 9))
    assert figure.values == pytest.approx((1.1, 0.9, 0.9))
    assert figure.value == pytest.approx(0.9)
    assert figure.spread == "0.900-1.100"
    half = ab.ratio("f", "c", 0.9, turns(ab, "mine", 20), turns(ab, "other", 10), 64 / 128)
    assert half.value == pytest.approx(1.0)


def test_table_ends_with_the_worst_case_of_each_figure(load):
    ab = load("ab")
    base = turns(ab, "cublas", 10, 10)
    rows = [
        ab.ratio("gemm", "small", 0.97, turns(ab, "mine", 10, 10), base),
        ab.ratio("gemm", "large", 0.97, turns(ab, "mine", 20, 20), base),
        ab.ratio("other", "no reach", 0.0, turns(ab, "mine", 20, 20), base),
    ]
    lines = ab.table(rows).splitlines()
    assert len({line.index("mine") for line in lines[1:4]}) == 1
    assert lines[4:] == [
        "gemm: worst 0.500 x (large), median 0.750; 1 of 2 cases reach 0.97",
    ]


def test_tables_carry_their_header_and_figures_replace_their_case(load, tmp_path):
    ab = load("ab")
    base = turns(ab, "cublas", 10)
    old = ab.ratio("gemm", "a, b", 0.97, turns(ab, "mine", 20), base)
    new = ab.ratio("gemm", "a, b", 0.97, turns(ab, "mine", 10), base)
    other = ab.ratio("gemm", "c", 0.97, turns(ab, "mine", 10), base)
    shown = ab.ratio("variants", "c", 0.0, turns(ab, "mine", 10), base)
    ab.write_table(tmp_path / "gemm.csv", [new], HEADER)
    text = (tmp_path / "gemm.csv").read_text()
    assert text.startswith("# gpu: a GPU\n# commit: abc\n")
    assert 'gemm,"a, b",1.0000,x,0.97,1.000-1.000,mine,10.00,1500,690,cublas,' in text
    path = tmp_path / "figures.csv"
    ab.update_figures(path, [old, other], HEADER)
    ab.update_figures(path, [new, shown], {**HEADER, "commit": "def"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["value"], row["commit"]) for row in rows] == [
        ("a, b", "1.0000", "def"),
        ("c", "1.0000", "abc"),
    ]


def test_contenders_take_turns_and_the_order_is_reversed_every_round(load):
    ab = load("ab")
    order = []

    class FakeTimer:
        meter = SimpleNamespace(watts=500.0)

        def sample(self, batch):
            return SimpleNamespace(median_us=batch)

        def sustain(self, batch, median_us, warm_s, sample_s):
            order.append((batch, sample_s))
            return SimpleNamespace(median_us=batch, sm_clock_mhz=1500.0)

    found = ab.take_turns(FakeTimer(), {"a": 1.0, "b": 2.0}, 2)
    measured = [batch for batch, sample_s in order if sample_s == ab.TURN_S]
    assert measured == [1.0, 2.0, 2.0, 1.0]
    assert found["b"].times_us == (2.0, 2.0)
    assert found["b"].watts == 500.0


def test_attention_figures_are_bytes_per_clock_and_ratios(load):
    ab, attention = load("ab"), load("attention")
    cases = attention.attention_cases(132)
    few = next(case for case in cases if case.id == "attn_per_sm" and case.num_sms == 8)
    assert few.memory_bytes == pytest.approx(512 * 1024 * 4096 + 2 * 512 * 8192)
    ideal_us = few.memory_bytes / (8 * 64 * 1.5e9) * 1e6
    measured = {
        "triton": turns(ab, "triton", 2 * ideal_us),
        "triton_split": turns(ab, "triton_split", ideal_us),
    }
    own, *variants = attention.figures(few, measured)
    assert (own.unit, own.value) == ("B/clk", pytest.approx(64))
    assert [row.value for row in variants] == pytest.approx([1.0, 2.0])
    full = next(case for case in cases if case.id == "attn_full")
    assert {row.id for row in attention.figures(full, measured)} == {"attn_variants"}
    measured["flashinfer"] = turns(ab, "flashinfer", 1.1 * ideal_us)
    own = attention.figures(full, measured)[0]
    assert (own.id, own.value) == ("attn_full", pytest.approx(1.1))


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
