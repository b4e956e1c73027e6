"""Profiles on disk: round trip, resume after a kill, damage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.profiler.profile import PairRow, Point, Row, TripleRow
from nanoflow_tune.profiler.store import (
    ProfileError,
    ProfileWriter,
    load_profile,
    profile_files,
    read_pairs,
    read_rows,
    read_triples,
    shipped_files,
    shipped_profile,
    tidy,
)

HEADER = {"hardware": "h200", "dtype": "bfloat16", "gpu": "NVIDIA H200", "static_w": "120.0"}


def point(**changes):
    base = Point(kind="gemm", shape="n64_k32", variant="cublas", tokens=256, kv_len=0, num_sms=132)
    return replace(base, **changes)


def row(**changes):
    base = Row(
        point=point(),
        median_us=12.5,
        p10_us=12.0,
        p90_us=13.0,
        n=11,
        joules=0.01,
        joules_source="measured",
        sm_clock_mhz=1500.0,
        watts=690.0,
    )
    return replace(base, **changes)


def write(path, rows, header=HEADER):
    with ProfileWriter.solo(path, header) as writer:
        for item in rows:
            writer.append(item)


def test_rows_and_header_come_back_as_written(tmp_path):
    rows = [row(), row(point=point(tokens=512), error="out of memory", median_us=0.0)]
    write(tmp_path / "a.csv", rows)
    header, read = read_rows(tmp_path / "a.csv")
    assert header == HEADER
    assert read == rows


@given(
    us=st.floats(0.01, 1e7),
    tokens=st.integers(1, 10**6),
    error=st.text(st.characters(codec="ascii", exclude_characters="\r\n\x00"), max_size=20),
)
@settings(max_examples=50, deadline=None)
def test_any_row_survives_to_six_digits(tmp_path_factory, us, tokens, error):
    path = tmp_path_factory.mktemp("profile") / "a.csv"
    write(path, [row(median_us=us, point=point(tokens=tokens), error=error)])
    (read,) = read_rows(path)[1]
    assert read.median_us == pytest.approx(us, rel=1e-5)
    assert read.point.tokens == tokens
    assert read.error == error


def test_pairs_come_back_as_written(tmp_path):
    pair = PairRow(
        a=point(num_sms=100),
        b=point(kind="decode_attention", shape="q8_kv2_d64", kv_len=512, num_sms=32),
        slowdown_a=1.25,
        slowdown_b=1.5,
        watts=700.0,
        sm_clock_mhz=1600.0,
        n=40,
    )
    with ProfileWriter.pairs(tmp_path / "a.pairs.csv", HEADER) as writer:
        writer.append(pair)
    assert read_pairs(tmp_path / "a.pairs.csv")[1] == [pair]


def test_triples_come_back_as_written_and_are_part_of_the_profile(tmp_path):
    triple = TripleRow(
        a=point(num_sms=100),
        b=point(kind="decode_attention", shape="q8_kv2_d64", kv_len=512, num_sms=16),
        c=point(kind="norm", shape="d64", num_sms=16),
        slowdown_a=1.25,
        slowdown_b=1.5,
        slowdown_c=2.0,
        watts=700.0,
        sm_clock_mhz=1600.0,
        n=40,
    )
    write(tmp_path / "a.csv", [row()])
    with ProfileWriter.triples(tmp_path / "a.triples.csv", HEADER) as writer:
        writer.append(triple)
    assert read_triples(tmp_path / "a.triples.csv")[1] == [triple]
    assert profile_files(tmp_path) == [tmp_path / "a.csv"]
    assert load_profile(profile_files(tmp_path)).triples == (triple,)


def test_a_tidied_file_has_the_last_row_of_each_point_in_order(tmp_path):
    path = tmp_path / "a.csv"
    first, again, other = row(), row(median_us=13.0), row(point=point(tokens=128))
    write(path, [first, again, other])
    tidy(path)
    assert read_rows(path) == (HEADER, [other, again])
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_killed_within_a_row_resumes_behind_the_last_whole_one(tmp_path):
    path = tmp_path / "a.csv"
    write(path, [row(), row(point=point(tokens=512))])
    text = path.read_text()
    path.write_text(text[:-20])
    assert [r.point.tokens for r in read_rows(path)[1]] == [256]
    write(path, [row(point=point(tokens=1024))])
    assert [r.point.tokens for r in read_rows(path)[1]] == [256, 1024]


def test_columns_and_cells_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("# hardware: h200\nop,shape\n")
    with pytest.raises(ProfileError, match="must have the columns op,shape,variant"):
        read_rows(path)
    write(tmp_path / "b.csv", [row()])
    text = (tmp_path / "b.csv").read_text().replace("12.5", "fast")
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(ProfileError, match="row 2: column median_us must be float"):
        read_rows(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="cannot read the profile"):
        read_rows(tmp_path / "c.csv")


def test_an_unknown_source_is_refused(tmp_path):
    write(tmp_path / "a.csv", [row()])
    text = (tmp_path / "a.csv").read_text().replace("690,measured", "690,guessed")
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ProfileError, match="source must be one of measured, interpolated"):
        read_rows(tmp_path / "a.csv")


def test_profiles_of_two_gpus_do_not_mix(tmp_path):
    write(tmp_path / "a.csv", [row()])
    write(tmp_path / "b.csv", [row()], {**HEADER, "hardware": "a100-80"})
    with pytest.raises(ProfileError, match="different hardware cannot be mixed"):
        load_profile(profile_files(tmp_path))
    with pytest.raises(ProfileError, match="no profile files"):
        load_profile([])


def test_of_several_files_the_newest_header_speaks(tmp_path):
    old = {**HEADER, "date": "2026-11-23", "static_w": "110"}
    new = {**HEADER, "date": "2026-11-24", "sustained_gemm_flops_per_s": "6.6e14"}
    new.pop("static_w", None)
    write(tmp_path / "a.csv", [row()], old)
    write(tmp_path / "b.csv", [row(point=point(tokens=77))], new)
    for order in (("a", "b"), ("b", "a")):
        header = load_profile([tmp_path / f"{name}.csv" for name in order]).header
        assert header["date"] == "2026-11-24"
        assert header["sustained_gemm_flops_per_s"] == "6.6e14"
        assert header["static_w"] == "110", "what only the older one says is kept"


def test_joules_that_were_not_measured_are_fitted_and_tagged(tmp_path):
    static_w, per_flop, per_byte = 120.0, 1e-12, 1e-10
    rows = []
    for index in range(12):
        n, k, tokens = 1024 * (index + 1), 2048, 256 * (1 + index % 4)
        flops, moved = 2.0 * tokens * n * k, 2.0 * (n * k + tokens * (n + k))
        us = 1e6 * flops / 6e14
        joules = per_flop * flops + per_byte * moved + static_w * us * 1e-6
        is_measured = index < 10
        rows.append(
            row(
                point=point(shape=f"n{n}_k{k}", tokens=tokens),
                median_us=us,
                joules=joules if is_measured else 0.0,
                joules_source="measured" if is_measured else "missing",
                watts=joules / (us * 1e-6) if is_measured else 0.0,
            )
        )
        expected = joules
    write(tmp_path / "a.csv", rows)
    profile = load_profile([tmp_path / "a.csv"])
    assert profile.energy is not None
    assert profile.energy.joules_per_flop == pytest.approx(per_flop, rel=1e-3)
    assert profile.energy.joules_per_byte == pytest.approx(per_byte, rel=1e-2)
    assert profile.rows[-1].joules_source == "fitted"
    assert profile.rows[-1].joules == pytest.approx(expected, rel=1e-3)


def test_the_shipped_h200_profile_is_whole():
    profile = shipped_profile("h200")
    assert profile is not None
    assert not [r for r in profile.rows if r.error]
    shapes = {r.point.shape for r in profile.rows if r.point.kind in ("gemm", "gemm_silu")}
    assert {"n28672_k4096", "n4096_k14336", "n28672_k8192", "n8192_k14336"} <= shapes
    measured = [r for r in profile.rows if r.joules_source == "measured"]
    assert len(measured) >= 0.03 * len(profile.rows)
    assert profile.energy is not None
    assert 0.5e-12 < profile.energy.joules_per_flop < 1.5e-12
    assert shipped_profile("no-such-gpu") is None
    assert shipped_files("h200", "NVIDIA H200") == shipped_files("h200")
    assert shipped_files("h200", "another card") == []
