from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_tune.search_spaces.record_schema import DIALECT, json_schema
from nanoflow_tune.search_spaces.records import SpecError, from_mapping


def validator(schema):
    cls = jsonschema.validators.validator_for({"$schema": DIALECT})
    cls.check_schema(schema)
    return cls(schema)


@dataclass(frozen=True, kw_only=True)
class Inner:
    pair: tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Holds others.

    More of it.
    """

    kind: Literal["a", "b"]
    """Which of
    the two."""
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    named: dict[str, int] | None = None


def test_fields_carry_their_docstrings_and_records_their_first_paragraph():
    schema = json_schema(Outer, title="o", schema_id="o/1")
    assert schema["properties"]["kind"]["description"] == "Which of the two."
    assert schema["description"] == "Holds others."
    assert "description" not in schema["properties"]["many"]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b", "x"]),
    lambda leaves: (
        st.lists(leaves, max_size=2)
        | st.dictionaries(st.sampled_from(["kind", "inner", "many", "named", "pair"]), leaves)
    ),
    max_leaves=6,
)
outers = st.fixed_dictionaries(
    {"kind": st.sampled_from(["a", "b", "x"])},
    optional={
        "inner": st.fixed_dictionaries({"pair": values}) | values,
        "many": st.lists(st.fixed_dictionaries({"pair": st.just([1, 2])}), max_size=2) | values,
        "named": st.dictionaries(st.sampled_from(["p", "q"]), values) | values,
    },
)


@given(outers)
def test_schema_and_strict_reader_accept_the_same(mapping):
    is_valid = not list(
        validator(json_schema(Outer, title="o", schema_id="o/1")).iter_errors(mapping)
    )
    try:
        from_mapping(Outer, mapping, "outer")
    except SpecError:
        assert not is_valid
    else:
        assert is_valid
