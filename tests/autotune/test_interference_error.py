"""Errors of predicted co-runs: held-out pairs, triples as products, the README's section."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanoflow_tune.autotune.interference_error import (
    END,
    START,
    held_out_pairs,
    triples_from_pairs,
    write_section,
)
from nanoflow_tune.profiler.profile import PairRow, Point, Profile, TripleRow
from nanoflow_tune.search_spaces.loader import load_hardware

H200 = load_hardware("h200")
COMMON = {"watts": 690.0, "sm_clock_mhz": 1500.0, "n": 50}


def point(kind, shape, num_sms):
    return Point(kind=kind, shape=shape, variant="v", tokens=512, kv_len=0, num_sms=num_sms)


def gemm(num_sms):
    return point("gemm", "n4096_k4096", num_sms)


def decode(num_sms):
    return point("decode_attention", "q32_kv8_d128", num_sms)


def norm(num_sms):
    return point("norm", "d4096", num_sms)


def pair(a, b, slowdown_a, slowdown_b):
    return PairRow(a=a, b=b, slowdown_a=slowdown_a, slowdown_b=slowdown_b, **COMMON)


def profile(pairs, triples=()):
    return Profile(hardware="h200", dtype="bfloat16", rows=(), pairs=pairs, triples=triples)


SHARES = (68, 84, 100, 116)
SAME = tuple(pair(gemm(s), decode(132 - s), 1.2, 1.5) for s in SHARES)


def test_pairs_that_are_all_alike_are_predicted_exactly():
    misses = held_out_pairs(profile(SAME), H200)
    assert len(misses) == len(SHARES)  # half of the pairs, both of their kernels
    assert all(miss.error == pytest.approx(0.0) for miss in misses)
    assert {miss.kinds[0] for miss in misses} == {"gemm", "decode_attention"}


def test_a_held_out_pair_is_predicted_without_its_own_row():
    """In order of shares every other pair is held out: those of 84 and 116 SMs, or the others."""
    pairs = tuple(replace(p, slowdown_a=2.0 if p.a.num_sms in (84, 116) else 1.0) for p in SAME)
    errors = [m.error for m in held_out_pairs(profile(pairs), H200) if m.kinds[0] == "gemm"]
    assert errors in (pytest.approx([-0.5, -0.5]), pytest.approx([1.0, 1.0]))


def test_a_triple_is_predicted_as_the_product_of_its_pairs():
    pairs = (
        pair(gemm(100), decode(32), 1.2, 1.5),
        pair(gemm(116), norm(16), 1.1, 1.3),
        pair(decode(116), norm(16), 1.4, 1.6),
    )
    triple = TripleRow(
        a=gemm(100),
        b=decode(16),
        c=norm(16),
        slowdown_a=1.2 * 1.1,
        slowdown_b=1.5 * 1.4,
        slowdown_c=1.0,
        **COMMON,
    )
    misses = triples_from_pairs(profile(pairs, (triple,)), H200)
    assert [miss.error for miss in misses] == pytest.approx([0.0, 0.0, 1.3 * 1.6 - 1])
    assert misses[0].kinds == ("gemm", "decode_attention", "norm")


def test_the_section_is_replaced_and_the_rest_of_the_readme_is_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\nBefore.\n\n{START}\nold\n{END}\n\nAfter.\n")
    values = write_section(path, profile(SAME), H200)
    text = path.read_text()
    assert text.startswith(f"# Title\n\nBefore.\n\n{START}\n")
    assert text.endswith(f"{END}\n\nAfter.\n")
    assert "old" not in text
    assert "| gemm | decode_attention | 2 | 1.20 to 1.20 | 0.0% |" in text
    assert "None was measured." in text
    assert values["median_pair_error"] == pytest.approx(0.0, abs=1e-4)
    write_section(path, profile(SAME), H200)
    assert path.read_text() == text


def test_too_few_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least two measured pairs"):
        write_section(tmp_path / "README.md", profile(SAME[:1]), H200)
