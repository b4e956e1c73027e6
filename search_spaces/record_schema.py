"""JSON Schema (2020-12) of a record type, from its fields, types and docstrings.

The schema accepts what `records.from_mapping` accepts as far as types and keys go: no unknown keys,
required fields, literals, `X | None`. Rules between fields (`__post_init__`) stay with the records.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean"}


def json_schema(cls: type[DataclassInstance], *, title: str, schema_id: str) -> dict[str, Any]:
    """The schema of files that hold one such record.

    Args:
        cls: a dataclass; its nested dataclasses become `$defs`.
        title: of the schema.
        schema_id: name and version, e.g. `nanoflow-plan/1`.
    """
    definitions: dict[str, Any] = {}
    _define(cls, definitions)
    root = definitions.pop(cls.__name__)
    return {
        "$schema": DIALECT,
        "$id": f"urn:nanoflow-tune:{schema_id}",
        "title": title,
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _define(cls: type[DataclassInstance], definitions: dict[str, Any]) -> None:
    if cls.__name__ in definitions:
        return
    definitions[cls.__name__] = {}  # a record that holds its own kind ends here
    hints, comments = get_type_hints(cls), _field_docstrings(cls)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for field in fields(cls):
        value = _value(hints[field.name], definitions)
        if field.name in comments:
            value = {**value, "description": comments[field.name]}
        properties[field.name] = value
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
    definitions[cls.__name__] = {
        "type": "object",
        "description": inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _value(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_value(argument, definitions) for argument in arguments]}
    if hint is type(None):
        return {"type": "null"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return _array(arguments, definitions)
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(arguments[1], definitions)}
    if is_dataclass(hint):
        record = cast("type[DataclassInstance]", hint)
        _define(record, definitions)
        return {"$ref": f"#/$defs/{record.__name__}"}
    assert hint in _SCALARS, f"no JSON type for {hint}"
    return {"type": _SCALARS[hint]}


def _array(arguments: tuple[Any, ...], definitions: dict[str, Any]) -> dict[str, Any]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return {"type": "array", "items": _value(arguments[0], definitions)}
    items = [_value(argument, definitions) for argument in arguments]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


@cache
def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """The string under each field; Python keeps none of them, so the source is read."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # no source at hand: a schema without descriptions
        return {}
    body = cast("ast.ClassDef", ast.parse(source).body[0]).body
    found: dict[str, str] = {}
    for statement, following in pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        value = following.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            name = cast("ast.Name", statement.target).id
            found[name] = " ".join(value.value.split())
    return found
