from __future__ import annotations

from nanoflow_tune.runtime.choice import Choice
from nanoflow_tune.runtime.sequence import (
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)

END = 0


def _decode(ids):
    return "".join(chr(96 + i) for i in ids)  # 1 -> a


def _choice(*, stops=(), decode=_decode, **sampling):
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=(26,),
        sampling=SamplingParams(max_tokens=9, **sampling),
    )
    return Choice(0, request, end_token_ids=(END,), decode=decode, stops=stops)


def _tokens(*ids):
    return [TokenEvent(request_id="r", token_id=i, logprob=-float(i)) for i in ids]


def _end(reason="length", message=""):
    return FinishEvent(
        request_id="r",
        reason=reason,
        num_prompt_tokens=1,
        num_generated_tokens=0,
        message=message,
    )


def test_tokens_become_text_and_records_with_offsets():
    choice = _choice()
    first = choice.push(_tokens(1, 2))
    last = choice.push([*_tokens(3), _end()])
    assert (first.text, last.text, first.finish_reason) == ("ab", "c", None)
    assert [r.text_offset for r in (*first.records, *last.records)] == [0, 1, 2]
    assert last.finish_reason == "length"
    assert choice.num_generated_tokens == 3
    assert not choice.needs_cancel


def test_the_end_token_counts_but_has_no_text_and_no_record():
    choice = _choice()
    delta = choice.push([*_tokens(1, END), _end("stop")])
    assert (delta.text, delta.finish_reason, delta.token_ids) == ("a", "stop", (1, END))
    assert [record.token_id for record in delta.records] == [1]
    assert choice.num_generated_tokens == 2


def test_stop_token_ids_end_like_the_end_token_unless_ends_are_ignored():
    assert _choice(stop_token_ids=(2,)).push(_tokens(1, 2)).text == "a"
    assert _choice(stop_token_ids=(2,), ignore_eos=True).push(_tokens(1, 2)).text == "ab"


def test_a_stop_string_over_several_tokens_ends_the_choice_and_wants_a_cancel():
    choice = _choice(stops=["cd"])
    assert choice.push(_tokens(1, 2, 3)).text == "ab"
    delta = choice.push(_tokens(4, 5))
    assert (delta.text, delta.finish_reason) == ("", "stop")
    assert choice.needs_cancel
    assert choice.num_generated_tokens == 4
    after = choice.push([*_tokens(6), _end("cancelled")])
    assert (after.text, after.token_ids) == ("", ())
    assert choice.finish_reason == "stop"
    assert not choice.needs_cancel


def test_records_come_with_their_text_and_those_of_a_stop_string_never():
    choice = _choice(stops=["cd"])
    assert [r.token_id for r in choice.push(_tokens(1, 3)).records] == [1]  # c is held back
    assert [r.token_id for r in choice.push(_tokens(1)).records] == [3, 1]  # "ca" is no stop
    assert choice.push(_tokens(3)).records == ()
    assert choice.push(_tokens(4)).records == ()


def test_what_was_held_back_comes_with_the_end():
    choice = _choice(stops=["cd"])
    assert choice.push(_tokens(3)).text == ""
    delta = choice.push([_end("length")])
    assert (delta.text, delta.finish_reason) == ("c", "length")
    assert [r.token_id for r in delta.records] == [3]


def test_without_a_tokenizer_there_are_ids_and_records_but_no_text():
    delta = _choice(decode=None).push([*_tokens(1, 2, END), _end("stop")])
    assert (delta.text, delta.token_ids) == ("", (1, 2, END))
    assert [r.token_id for r in delta.records] == [1, 2]


def test_errors_keep_their_message():
    delta = _choice().push([*_tokens(1), _end("error", "out of memory")])
    assert (delta.finish_reason, delta.message) == ("error", "out of memory")


def test_however_events_are_grouped_the_sum_is_the_same():
    events = [*_tokens(1, 3, 4, 5), _end()]
    whole = _choice(stops=["cx", "de"]).push(events)
    choice = _choice(stops=["cx", "de"])
    parts = [choice.push([event]) for event in events]
    assert "".join(part.text for part in parts) == whole.text == "ac"
    assert sum((part.records for part in parts), ()) == whole.records
