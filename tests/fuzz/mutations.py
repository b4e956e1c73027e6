"""Damaged files: valid ones with bytes flipped, parts cut, types swapped, hostile insertions."""

from __future__ import annotations

import copy
import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CANARY = "pwned"
"""A file that hostile input would make if any of it were run."""
HOSTILE_BYTES = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b"\t",
    b"\x0c",
    b"\x85",
    b'"',
    b"'",
    b": ",
    b"- ",
    b"%",
    b"!!map [a]",
    b"!!int ''",
    b"!!binary x",
    b"!!set {a, b}",
    b"!!omap [a]",
    b"!!timestamp 2001-99-99",
    b"<<: [{a: 1}, 2]\n",
    b"&a [*a, *a]",
    b"? [a, b]\n: c\n",
    f"!!python/object/apply:os.system ['touch {CANARY}']".encode(),
    f"x: !!python/object/new:os.system ['touch {CANARY}']\n".encode(),
    f"!!python/name:os.system touch {CANARY}".encode(),
    f"$(touch {CANARY})`touch {CANARY}`".encode(),
    b"[" * 3000,
    b"{a: " * 3000,
    b'{"a":' * 3000,
    b"- " * 3000,
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    b"1:" * 500 + b"1",
    b".nan",
    b"NaN",
    b"-.inf",
    b"1e999",
    b"long " * 40_000,
    b"\n" * 5000,
    b"\xe2\x80\xa8",
    "\u202e\u00e9\U0001f600".encode(),
)
BOMB = (
    "a: &a {x: 1, y: 2}\n"
    + "".join(
        f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 20)}]\n"
        for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
).encode()
"""20^9 merged keys."""
LAUGHS = (
    "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
).encode()
HOSTILE_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53, 2**63, 10**400, 0.5, -0.0),
    *(1e-320, 1e-29, 1e29, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "1", "1e5", "nan", "../../x", "/", "..", "a/b", "\0", "\n", "[/x]", "[bold]"),
    *("{}", "%s", "<script>", "\ud800", "\u00e9", "a" * 5000, "bfloat16", "true"),
    *([], {}, [[]], {"": {}}, [None], {"a": 1}, [1, 2, 3], ["x"] * 2000),
)
IS_LONG = settings.get_current_profile_name() == "long"


def tries(short, long):
    """How many examples a test looks at, in the default run and in the long one."""
    return settings(
        max_examples=(long // 8) if IS_LONG else short,
        deadline=None,
        database=None,
        derandomize=not IS_LONG,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged_bytes(draw, valid):
    """The bytes of a valid file after one to three accidents or attacks."""
    held = valid
    for _ in range(draw(st.integers(1, 3))):
        held = draw(st.sampled_from(_ACCIDENTS))(draw, held)
    return held


def _flip(draw, held):
    if not held:
        return held
    at = draw(st.integers(0, len(held) - 1))
    return held[:at] + bytes([held[at] ^ (1 << draw(st.integers(0, 7)))]) + held[at + 1 :]


def _cut(draw, held):
    return held[: draw(st.integers(0, len(held)))]


def _span(draw, held):
    start = draw(st.integers(0, len(held)))
    return start, min(len(held), start + draw(st.integers(0, 200)))


def _drop(draw, held):
    start, end = _span(draw, held)
    return held[:start] + held[end:]


def _repeat(draw, held):
    start, end = _span(draw, held)
    return held[:end] + held[start:end] * draw(st.sampled_from((1, 2, 50))) + held[end:]


def _insert(draw, held):
    at = draw(st.integers(0, len(held)))
    return held[:at] + draw(st.sampled_from(HOSTILE_BYTES)) + held[at:]


def _number(draw, held):
    """Another number in the place of one."""
    at = draw(st.integers(0, len(held)))
    while at < len(held) and not held[at : at + 1].isdigit():
        at += 1
    end = at
    while end < len(held) and held[end : end + 1] in b"0123456789.":
        end += 1
    numbers = (b"0", b"-1", b"1", b"1e30", b"nan", b"-inf", b"99999999999999999999", b"true", b"x")
    return held[:at] + draw(st.sampled_from(numbers)) + held[end:]


def _line(draw, held):
    """A line twice, or two lines changed over."""
    lines = held.split(b"\n")
    a, b = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    if draw(st.booleans()):
        lines.insert(b, lines[a])
    else:
        lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _recode(draw, held):
    text = held.decode("utf-8", "replace")
    ways = (
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: text.replace("\n", "\r").encode(),
        lambda: b"\xef\xbb\xbf" + held,
        lambda: text.encode("utf-16"),
        lambda: b"",
        lambda: b"\x80" + held,
        lambda: text.replace(" ", "\t").encode(),
        lambda: BOMB + held,
        lambda: held + b"\n" + LAUGHS,
    )
    return draw(st.sampled_from(ways))()


_ACCIDENTS = (_flip, _cut, _drop, _repeat, _insert, _number, _number, _line, _recode)


@st.composite
def damaged_document(draw, valid):
    """A JSON text (which is YAML too) of a mapping with one to three values or keys changed."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value)
    return json.dumps(value).encode()


def _changed(draw, value):
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if not keys:
        return copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))
    key = draw(st.sampled_from(keys))
    inner = value[key]
    if isinstance(inner, dict | list) and inner and draw(st.integers(0, 5)):
        value[key] = _changed(draw, inner)
        return value
    what = draw(st.sampled_from(("value", "value", "value", "drop", "add")))
    if what == "drop":
        del value[key]
    elif what == "add" and isinstance(value, dict):
        value[draw(st.sampled_from(("unknown", "", "a" * 5000, "\0")))] = inner
    elif what == "add":
        value.extend([inner] * draw(st.sampled_from((1, 1000))))
    else:
        value[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))
    return value
