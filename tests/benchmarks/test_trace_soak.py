"""The soak test's short form, and that its judgement finds faults."""

from __future__ import annotations

from dataclasses import replace

import pytest


@pytest.fixture
def trace_soak(load):
    return load("trace_soak")


def test_a_few_minutes_of_traffic_lose_and_alter_nothing(trace_soak):
    verdict = trace_soak.soak(150.0, seed=1)
    assert verdict.faults == 0
    assert verdict.requests > 50
    assert verdict.cancelled > 0
    assert verdict.preemptions > 0
    assert verdict.prefix_tokens > 0
    assert verdict.fullest_cache > 0.9


def test_an_altered_answer_is_noticed(trace_soak):
    weights = trace_soak.random_weights(trace_soak.tiny_model(), device=trace_soak.CPU)
    sampling = trace_soak.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    request = trace_soak.GenerationRequest(
        request_id="a", prompt_token_ids=(5, 6, 7), sampling=sampling
    )
    text = list(request.prompt_token_ids)
    for _ in range(3):
        text.append(int(trace_soak._logits(weights, tuple(text))[-1].argmax()))
    tokens = [trace_soak.TokenEvent(request_id="a", token_id=token) for token in text[3:]]
    end = trace_soak.FinishEvent(
        request_id="a", reason="length", num_prompt_tokens=3, num_generated_tokens=3
    )
    assert trace_soak.is_as_alone(weights, request, [*tokens, end])
    wrong = replace(tokens[1], token_id=(tokens[1].token_id + 1) % weights.model.vocab_size)
    assert not trace_soak.is_as_alone(weights, request, [tokens[0], wrong, tokens[2], end])
    assert not trace_soak.is_as_alone(weights, request, [*tokens[:2], end])
    early = replace(end, reason="stop")
    assert not trace_soak.is_as_alone(weights, request, [*tokens, early])
