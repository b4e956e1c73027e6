"""The feed of a run: requests when they are due, times of their tokens, what was not served."""

from __future__ import annotations

from nanoflow_tune.profiler.request_feed import RequestFeed
from nanoflow_tune.runtime.sequence import (
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)


def requests(count):
    return [
        GenerationRequest(
            request_id=str(n), prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=2)
        )
        for n in range(count)
    ]


def serve(request, on_event, reason="length"):
    name = request.request_id
    for token in (5, 6):
        on_event(TokenEvent(request_id=name, token_id=token))
    on_event(
        FinishEvent(
            request_id=name,
            reason=reason,
            num_prompt_tokens=3,
            num_generated_tokens=2,
            message="why",
        )
    )


def test_requests_are_sent_when_they_are_due_and_their_times_are_kept():
    feed, ticks = RequestFeed(requests(3), (0.0, 0.02, 0.03)), []
    feed.run(serve, ticks.append, 0.01)
    served = feed.served()
    assert [item.due_s for item in served] == [0.0, 0.02, 0.03]
    for item in served:
        assert item.due_s <= item.sent_s <= item.first_token_s <= item.end_s <= feed.elapsed_s
        assert (item.prompt_tokens, item.decode_tokens) == (3, 2)
    assert ticks == sorted(ticks)
    assert not feed.failures


def test_all_at_once_keeps_no_times():
    feed = RequestFeed(requests(3), ())
    feed.run(serve, lambda _: None, None)
    assert feed.served() == []
    assert feed.elapsed_s > 0


def test_what_does_not_run_to_its_length_is_a_failure():
    feed = RequestFeed(requests(2), ())
    feed.run(lambda r, on: serve(r, on, "error"), lambda _: None, None)
    assert feed.failures == ["0 ended with error: why", "1 ended with error: why"]
