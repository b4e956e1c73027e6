"""The generic reader, on every kind of field that records use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.search_spaces.records import SpecError, content_hash, from_mapping, to_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    span: tuple[int, int]
    label: str = "x"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    leaves: tuple[Leaf, ...]
    best: Leaf | None = None
    by_name: dict[str, float] = field(default_factory=dict)
    mode: Literal["fast", "slow"] = "fast"
    note: str | None
    """Required, but may be null."""

    def __post_init__(self):
        if not self.leaves:
            raise ValueError("`leaves` must not be empty, but got ()")


def test_defaults_that_are_empty_are_left_out():
    tree = Tree(leaves=(Leaf(span=(0, 4)),), note=None)
    assert to_mapping(tree) == {
        "leaves": [{"span": [0, 4], "label": "x"}],
        "mode": "fast",
        "note": None,
    }


whole = st.integers(1 - 2**53, 2**53 - 1)
leaf_records = st.builds(Leaf, span=st.tuples(whole, whole), label=st.text())
trees = st.builds(
    Tree,
    leaves=st.lists(leaf_records, min_size=1, max_size=3).map(tuple),
    best=st.none() | leaf_records,
    by_name=st.dictionaries(
        st.text(), st.floats(-1e30, 1e30).filter(lambda x: not 0 < abs(x) < 1e-30), max_size=3
    ),
    mode=st.sampled_from(["fast", "slow"]),
    note=st.none() | st.text(),
)


@settings(max_examples=50, deadline=None)
@given(tree=trees)
def test_records_round_trip(tree):
    again = from_mapping(Tree, to_mapping(tree), "tree")
    assert again == tree
    assert content_hash(again) == content_hash(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leaves": [{"span": [0]}]}, r"`leaves\[0\].span`: must be a list of 2 values, but got"),
        ({"leaves": [{"span": [0, 1], "x": 2}]}, r"`leaves\[0\].x`: unknown key; Leaf takes span"),
        ({"leaves": [{}]}, r"`leaves\[0\]`: Leaf needs span; add what is missing"),
        ({"leaves": [3]}, r"`leaves\[0\]`: must be a mapping .* but got 3 \(int\)"),
        ({"leaves": []}, "^file: `leaves` must not be empty"),
        ({"best": {"span": [0, True]}}, r"`best.span\[1\]`: must be a whole number, but got True"),
        ({"by_name": {"a": "b"}}, "`by_name.a`: must be a number"),
        ({"by_name": {1: 1.0}}, r"`by_name`: keys must be text, but got 1 \(int\); quote it"),
        ({"mode": "quick"}, "`mode`: must be one of fast, slow, but got 'quick'"),
        ({"note": 1}, r"`note`: must be text \(quote it\), but got 1 \(int\)"),
    ],
)
def test_refusals_name_the_path(changes, message):
    mapping = {"leaves": [{"span": [0, 1]}], "note": None} | changes
    with pytest.raises(SpecError, match=message):
        from_mapping(Tree, mapping, "file")


def test_an_int_is_a_float_and_becomes_one():
    tree = from_mapping(
        Tree, {"leaves": [{"span": [0, 1]}], "note": "n", "by_name": {"a": 1}}, "file"
    )
    assert type(tree.by_name["a"]) is float


def test_long_values_are_shortened_in_messages():
    with pytest.raises(SpecError) as caught:
        from_mapping(Tree, {"leaves": [list(range(10_000))], "note": "n"}, "file")
    assert len(str(caught.value)) < 200
