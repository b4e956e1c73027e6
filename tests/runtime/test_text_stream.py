from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_fallback, byte_level

from nanoflow_tune.runtime.text_stream import REPLACEMENT, IncrementalText, StopMatcher

BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def _decode(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def _pieces(tokenizer, ids, context=()):
    text = IncrementalText(_decode(tokenizer), context)
    return [*(text.push(token_id) for token_id in ids), text.flush()]


@given(st.text(max_size=30))
def test_pieces_of_a_text_give_the_text_and_never_half_a_character(content):
    pieces = _pieces(BYTE_LEVEL, BYTE_LEVEL.encode(content).ids)
    assert "".join(pieces) == content
    if REPLACEMENT not in content:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_whole_with_its_last_one():
    ids = BYTE_LEVEL.encode("a\u20ac!").ids
    assert len(ids) == 5
    assert _pieces(BYTE_LEVEL, ids) == ["a", "", "", "\u20ac", "!", ""]


def test_byte_fallback_keeps_the_space_of_words_and_joins_bytes():
    token = BYTE_FALLBACK.token_to_id
    ids = [
        token("\u2581is"),
        token("\u2581Paris"),
        *(token(f"<0x{byte:02X}>") for byte in "\u00e9\u20ac".encode()),
        token("\u2581a"),
    ]
    after_prompt = _pieces(BYTE_FALLBACK, ids, context=[token("\u2581a")])
    assert "".join(after_prompt) == " is Paris\u00e9\u20ac a"
    assert not any(REPLACEMENT in piece for piece in after_prompt)
    assert "".join(_pieces(BYTE_FALLBACK, ids)) == "is Paris\u00e9\u20ac a"


def test_what_stays_broken_comes_out_at_the_end():
    ids = BYTE_LEVEL.encode("a\u20ac").ids[:-1]
    assert _pieces(BYTE_LEVEL, ids) == ["a", "", "", REPLACEMENT]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=200))
def test_random_tokens_lose_nothing_but_may_end_in_a_broken_character(ids):
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    assert "".join(_pieces(BYTE_LEVEL, ids)).rstrip(REPLACEMENT) == whole.rstrip(REPLACEMENT)


def test_tokens_that_never_make_a_character_are_given_out_all_the_same():
    lonely = BYTE_LEVEL.encode("\u20ac").ids[1]
    pieces = _pieces(BYTE_LEVEL, [lonely] * 500)
    assert "".join(pieces) == REPLACEMENT * 500
    assert max(map(len, pieces)) < 100


def _first_completed(text, stops):
    """Oracle: read character by character until some stop string has just been completed."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(st.text("abc", max_size=5), max_size=12), STOPS)
def test_stops_are_found_wherever_the_text_is_cut(pieces, stops):
    matcher = StopMatcher(stops)
    given_out = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    assert (given_out, matcher.matched) == _first_completed("".join(pieces), stops)


@given(st.lists(st.text("abc", max_size=5), max_size=12), STOPS)
def test_only_what_may_be_a_stop_is_held_back(pieces, stops):
    matcher, out = StopMatcher(stops), ""
    for count, piece in enumerate(pieces, start=1):
        out += matcher.push(piece)
        if matcher.matched is not None:
            break
        held = "".join(pieces[:count])[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopMatcher(["a", ""])
