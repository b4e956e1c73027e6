"""`results/figures.csv`: rows replace their own case only, the worst case decides."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest


@pytest.fixture
def figures(load):
    return load("figures")


def row(figures, **changes):
    base = figures.FigureRow(
        id="gemm_full",
        case="a, b",
        value=0.98,
        unit="x",
        reach=">= 0.97",
        spread="0.970-0.990",
        command="python benchmarks/gemm_full.py --rounds 4",
        commit="abc",
        gpu="a GPU",
        date="2026-01-01",
    )
    return replace(base, **changes)


def test_a_case_replaces_its_former_row_and_keeps_all_others(figures, tmp_path):
    path = tmp_path / "results" / "figures.csv"
    figures.write_figures([row(figures), row(figures, case="c"), row(figures, id="x")], path)
    figures.write_figures([row(figures, value=1.25, commit="def")], path)
    found = {(r.id, r.case): (r.value, r.commit) for r in figures.read_figures(path)}
    assert found == {
        ("gemm_full", "a, b"): (1.25, "def"),
        ("gemm_full", "c"): (0.98, "abc"),
        ("x", "a, b"): (0.98, "abc"),
    }
    assert [file.name for file in path.parent.iterdir()] == ["figures.csv"]


def test_the_file_has_the_columns_of_the_issue_and_is_sorted(figures, tmp_path):
    path = tmp_path / "figures.csv"
    figures.write_figures([row(figures, case="z"), row(figures, case="b"), row(figures)], path)
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert ",".join(lines[0]) == "id,case,value,unit,reach,spread,command,commit,gpu,date"
    assert [line[1] for line in lines[1:]] == ["a, b", "b", "z"]
    assert figures.read_figures(path)[0] == row(figures)


def test_the_worst_case_is_the_highest_where_the_reach_is_an_upper_bound(figures):
    low, high = row(figures, value=0.9), row(figures, value=1.1)
    assert figures.worst([low, high]) is low
    assert not low.is_reached
    assert high.is_reached
    low, high = (replace(r, reach="<= 1.05") for r in (low, high))
    assert figures.worst([low, high]) is high
    assert low.is_reached
    assert not high.is_reached


def test_the_summary_names_the_worst_case_of_each_id_with_a_reach(figures):
    rows = [
        row(figures, case="small", value=1.0),
        row(figures, case="large", value=0.5),
        row(figures, id="shown", reach="", value=0.1),
    ]
    assert figures.summary(rows) == (
        "gemm_full: worst 0.500 x (large), median 0.750; 1 of 2 cases reach >= 0.97"
    )


def test_a_reach_without_a_direction_and_other_columns_are_refused(figures, tmp_path):
    with pytest.raises(ValueError, match="must read '>= NUMBER' or '<= NUMBER'"):
        row(figures, reach="0.97")
    (tmp_path / "figures.csv").write_text("id,case\n")
    with pytest.raises(ValueError, match="must have the columns id,case,value"):
        figures.write_figures([row(figures)], tmp_path / "figures.csv")
