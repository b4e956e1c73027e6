"""Strict conversion between plain mappings and the frozen dataclasses that flow through the tool.

Every record that is kept in a file (specs, plans) is read with `from_mapping` and written with
`to_mapping`. Whatever does not fit the dataclass exactly is refused, with the file, the dotted key
path, the rule and the remedy; nothing is guessed, coerced or dropped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin
from typing import get_type_hints as _get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_INT_LIMIT = 2**53
"""Whole numbers below it are exact as floats too."""
_FLOAT_LIMIT = 1e30
"""Products and quotients of several numbers between this and its inverse are still finite."""
_MAX_FILE_BYTES = 32 << 20
RecordT = TypeVar("RecordT", bound="DataclassInstance")


class SpecError(ValueError):
    """A spec or plan file that breaks a rule; the message names file, key, rule and remedy."""


def read_bounded(path: Path | Traversable) -> bytes:
    """The content of a file that people or this tool wrote, which is never this large.

    Raises:
        OSError: it cannot be read, or goes on and on as a device does.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"more than {_MAX_FILE_BYTES >> 20} MiB", str(path))
    return content


def from_mapping(cls: type[RecordT], mapping: object, where: str) -> RecordT:
    """Build a record from plain YAML or JSON values, strictly.

    Args:
        cls: a dataclass; nested dataclasses, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`,
            `X | None` and `Literal` are understood. An int is accepted for a float, a bool never
            for a number.
        mapping: what the file holds.
        where: what to call the source in messages, usually the file's path.

    Raises:
        SpecError: an unknown or missing key, a wrong type, or a value that the record refuses.
    """
    return _record(cls, mapping, where, "")


def to_mapping(record: DataclassInstance) -> dict[str, Any]:
    """The record as plain dicts and lists, in field order; `from_mapping` reads it back.

    Fields left at a default of `None` or of an empty collection are omitted.
    """
    return {
        field.name: _plain(value)
        for field in fields(record)
        if not _is_empty_default(field, value := getattr(record, field.name))
    }


def content_hash(record: DataclassInstance) -> str:
    """First 16 hex digits of the SHA-256 of the record's canonical JSON.

    Equal records have equal hashes, also when one was built with 512 and the other with 512.0.
    """
    canonical = json.dumps(
        _integral(to_mapping(record)), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def closest(name: str, known: tuple[str, ...]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, `;` when none is near."""
    matches = get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else ";"


def _fail(where: str, path: str, message: str) -> SpecError:
    return SpecError(f"{where}: `{path}`: {message}" if path else f"{where}: {message}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _record(cls: type[RecordT], value: object, where: str, path: str) -> RecordT:
    mapping = _string_keys(value, where, path)
    known = {field.name: field for field in fields(cls) if field.init}
    for key in mapping:
        if key not in known:
            raise _fail(
                where,
                _join(path, reprlib.repr(key).strip("'\"")),
                f"unknown key{closest(key, tuple(known))} {cls.__name__} takes {', '.join(known)}",
            )
    missing = [
        name
        for name, field in known.items()
        if name not in mapping and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise _fail(where, path, f"{cls.__name__} needs {', '.join(missing)}; add what is missing")
    hints = _get_type_hints(cls)
    arguments = {
        key: _value(hints[key], item, where, _join(path, key)) for key, item in mapping.items()
    }
    try:
        return cls(**arguments)
    except SpecError:
        raise
    except ValueError as err:
        raise _fail(where, path, str(err)) from err


def _string_keys(value: object, where: str, path: str) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise _mismatch("a mapping (`key: value` lines)", value, where, path)
    mapping = cast("Mapping[object, object]", value)
    for key in mapping:
        if not isinstance(key, str):
            raise _fail(
                where,
                path,
                f"keys must be text, but got {_short(key)} ({type(key).__name__}); quote it",
            )
        if not _is_unicode(key):
            raise _fail(where, path, f"keys must be Unicode text, but got {_short(key)}")
    return cast("dict[str, object]", dict(mapping))


def _mismatch(expected: str, value: object, where: str, path: str) -> SpecError:
    got = f"{_short(value)} ({type(value).__name__})"
    return _fail(where, path, f"must be {expected}, but got {got}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a huge number"


def _value(hint: Any, value: object, where: str, path: str) -> object:  # noqa: ANN401
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        assert len(kinds) == 1, f"only `X | None` is supported, not {hint}"
        return None if value is None else _value(kinds[0], value, where, path)
    if origin is Literal:
        if not any(type(value) is type(option) and value == option for option in arguments):
            options = ", ".join(str(option) for option in arguments)
            raise _mismatch(f"one of {options}", value, where, path)
        return value
    if origin is tuple:
        return _tuple(arguments, value, where, path)
    if origin is dict:
        assert arguments[0] is str, f"only `dict[str, X]` is supported, not {hint}"
        mapping = _string_keys(value, where, path)
        return {
            key: _value(arguments[1], item, where, _join(path, key))
            for key, item in mapping.items()
        }
    if is_dataclass(hint):
        return _record(cast("type[DataclassInstance]", hint), value, where, path)
    return _scalar(hint, value, where, path)


def _tuple(arguments: tuple[Any, ...], value: object, where: str, path: str) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise _mismatch("a list", value, where, path)
    items = list(cast("list[object]", value))
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        hints = (arguments[0],) * len(items)
    else:
        hints = arguments
        if len(items) != len(hints):
            raise _mismatch(f"a list of {len(hints)} values", value, where, path)
    return tuple(
        _value(hint, item, where, f"{path}[{i}]")
        for i, (hint, item) in enumerate(zip(hints, items, strict=True))
    )


def _scalar(hint: Any, value: object, where: str, path: str) -> object:  # noqa: ANN401
    if hint is float:
        return _float(value, where, path)
    assert hint in (int, str, bool), f"no strict reader for {hint}"
    if type(value) is not hint:
        names = {int: "a whole number", str: "text (quote it)", bool: "true or false"}
        raise _mismatch(names[hint], value, where, path)
    if hint is str and not _is_unicode(cast("str", value)):
        raise _mismatch("Unicode text without lone surrogates", value, where, path)
    if hint is int and not -_INT_LIMIT < cast("int", value) < _INT_LIMIT:
        # Its digits may be too many to print.
        raise _fail(where, path, f"must be less than 2^53 = {_INT_LIMIT}, and more than -2^53")
    return value


def _float(value: object, where: str, path: str) -> float:
    if isinstance(value, str) and _reads_as_number(value):
        raise _mismatch("a number: YAML wants a dot and a signed exponent", value, where, path)
    if type(value) not in (int, float):
        raise _mismatch("a number", value, where, path)
    try:
        number = float(cast("float", value))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _mismatch("a finite number", value, where, path)
    if number and not 1 / _FLOAT_LIMIT <= abs(number) <= _FLOAT_LIMIT:
        raise _mismatch("0, or between 1e-30 and 1e+30 in size", value, where, path)
    return number


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: object) -> Any:  # noqa: ANN401
    if is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("tuple[object, ...]", value)]
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, object]", value)
        return {key: _plain(item) for key, item in mapping.items()}
    return value


def _is_empty_default(field: Field[Any], value: object) -> bool:
    if value is None:
        return field.default is None
    is_empty = isinstance(value, tuple | list | Mapping) and not value
    return is_empty and (field.default is not MISSING or field.default_factory is not MISSING)


def _integral(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_integral(item) for item in cast("list[object]", value)]
    if isinstance(value, dict):
        mapping = cast("dict[str, object]", value)
        return {key: _integral(item) for key, item in mapping.items()}
    return value
