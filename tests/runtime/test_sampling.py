"""Sampling: the right distribution, and the same tokens for a seed whatever is around a row."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import sampling_ranks as on_rank
import torch
from builders import sequential, tiny_model
from sampling_ranks import make_sampler
from served import Served

from nanoflow_tune.runtime.kernels.sampling_rows import gumbel, kept_mass, mix32, row_keys
from nanoflow_tune.runtime.launch import RankContext, RankGroup
from nanoflow_tune.runtime.sampling import (
    GREEDY,
    SamplingMode,
    SamplingTable,
    TokenSampler,
    mode_of,
)
from nanoflow_tune.runtime.sequence import SamplingParams
from nanoflow_tune.runtime.step import SlotTaken
from nanoflow_tune.runtime.truncation import FEW, Limits, Ranks, thresholds_from_few
from nanoflow_tune.runtime.truncation import thresholds_of_any as of_any
from nanoflow_tune.runtime.weights import random_weights

HERE = RankContext(0, 1, "cpu")
VOCAB = 301
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def params(temperature=1.0, top_k=0, top_p=1.0, logprobs=None):
    return SamplingParams(
        max_tokens=9, temperature=temperature, top_k=top_k, top_p=top_p, logprobs=logprobs
    )


def make_logits(rows, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCAB, generator=generator) * scale).to(dtype)


def kept_tokens(logits_V, row):
    """By sorting, token by token, in float64; ties with the last one kept are kept."""
    logits = logits_V.double()
    scaled = logits / row.temperature
    ranked = sorted(set(logits.tolist()), reverse=True)
    if row.top_k:
        last = logits.sort(descending=True).values[min(row.top_k, len(logits)) - 1]
        ranked = [value for value in ranked if value >= last]
    if row.top_p == 1:
        return logits >= ranked[-1]
    of_all = torch.where(logits >= ranked[-1], (scaled - scaled.max()).exp(), 0.0)
    for value in ranked:
        if of_all[logits >= value].sum() >= row.top_p * of_all.sum():
            return logits >= value
    raise AssertionError("the whole mass reaches every top_p")


MIXED = [
    params(0.0),
    params(0.7),
    params(1.0, top_k=5),
    params(1.5, top_k=FEW, top_p=0.6),
    params(0.9, top_k=40, top_p=0.95),
    params(0.3, top_k=1),
    params(2.0, top_k=20, top_p=1e-9),
]
LONG_TAILS = [
    params(1.0, top_p=0.9),
    params(2.5, top_p=0.999),
    params(0.8, top_k=200, top_p=0.5),
    params(1.2, top_k=100),
    params(1.0, top_k=10_000),
    params(1e-9, top_p=0.5),
]


def test_modes_say_what_rows_need():
    assert mode_of([]) == mode_of([params(0.0, top_k=3, top_p=0.1)]) == GREEDY
    assert mode_of([params(), params(0.0)]) == SamplingMode(is_random=True)
    few = SamplingMode(is_random=True, cut="few", has_top_k=True, has_top_p=True)
    assert mode_of(MIXED) == few
    assert mode_of([params(top_p=0.9)]) == replace(few, cut="any", has_top_k=False)
    assert mode_of([params(top_k=FEW + 1)]).cut == "any"
    assert mode_of([params(0.0, logprobs=0)]) == SamplingMode(has_logprobs=True)
    assert mode_of([params(0.0, logprobs=2)]).has_alternatives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["few", "any"])
def test_thresholds_keep_what_sorting_keeps(dtype, cut):
    rows = MIXED if cut == "few" else [*MIXED, *LONG_TAILS]
    rows = [row for row in rows if row.temperature > 1e-5]
    for seed in range(5):
        logits = make_logits(len(rows), dtype, seed=seed).round(decimals=1)  # many are equal
        limits = Limits(
            temperatures_R=torch.tensor([row.temperature for row in rows]),
            top_ks_R=torch.tensor([row.top_k for row in rows]),
            top_ps_R=torch.tensor([row.top_p for row in rows], dtype=torch.float64),
        )
        if cut == "few":
            found = thresholds_from_few(logits, limits, Ranks(1), kept_mass, has_top_p=True)
        else:
            found = of_any(logits, limits, Ranks(1), kept_mass, has_top_k=True, has_top_p=True)
        for row, threshold, logits_V in zip(rows, found, logits, strict=True):
            is_kept = logits_V.float() >= threshold
            assert torch.equal(is_kept, kept_tokens(logits_V, row)), row


@pytest.mark.parametrize(
    "row", [params(0.8), params(1.3, top_k=7), params(1.0, top_p=0.8), params(1.6, 12, 0.7)]
)
def test_tokens_are_drawn_with_the_probabilities_of_the_model(row):
    draws = 20_000
    logits_V = make_logits(1, scale=1.5)[0, :40]
    expected = torch.softmax(logits_V.double() / row.temperature, dim=0)
    expected = expected * kept_tokens(logits_V, row)
    expected = expected / expected.sum()
    sampler = make_sampler(logits_V.expand(draws, -1), [row] * draws, range(draws))
    sampler.mode = mode_of([row])
    sampler(logits_V.expand(draws, -1).contiguous())
    seen = torch.bincount(sampler.next_token_ids_R, minlength=40).double() / draws
    spread = (expected * (1 - expected) / draws).sqrt()
    assert bool(((seen - expected).abs() <= 5 * spread).all())


def test_tokens_of_one_seed_are_as_good_as_those_of_many():
    logits_V, steps = make_logits(1, scale=1.0)[0, :16], 4000
    sampler = make_sampler(logits_V[None], [params()], [7])
    sampler.mode = mode_of([params()])
    tokens = []
    for _ in range(steps):
        sampler(logits_V[None])
        tokens.append(int(sampler.next_token_ids_R))
    expected = torch.softmax(logits_V.double(), dim=0)
    seen = torch.bincount(torch.tensor(tokens), minlength=16) / steps
    assert float((seen - expected).abs().max()) < 0.03
    pairs = torch.zeros(16, 16)
    for before, after in pairwise(tokens):
        pairs[before, after] += 1 / steps
    assert float((pairs - expected[:, None] * expected).abs().max()) < 0.02


def test_noise_is_gumbel_and_its_hash_a_permutation():
    numbers = torch.arange(1 << 16) << 16
    assert mix32(numbers).unique().numel() == 1 << 16
    keys = row_keys(torch.tensor([3, 4, -5, 2**62]), torch.tensor([0, 0, 9, 1]))
    noise = gumbel(keys, torch.arange(200_000))
    assert bool(noise.isfinite().all())
    torch.testing.assert_close(noise.mean(1), torch.full((4,), 0.5772), atol=0.02, rtol=0)
    torch.testing.assert_close(noise.var(1), torch.full((4,), 1.6449), atol=0.05, rtol=0)
    correlation = torch.corrcoef(torch.cat((noise, noise[:1].roll(1, dims=1))))
    assert float((correlation - torch.eye(5)).abs().max()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_token_whatever_is_around_it(dtype):
    rows = [*MIXED, *LONG_TAILS]
    seeds = range(100, 100 + len(rows))
    logits = make_logits(len(rows), dtype)
    together = make_sampler(logits, rows, seeds)
    together.mode = mode_of(rows)
    together(logits)
    for index, row in enumerate(rows):
        alone = make_sampler(logits[index : index + 1], [row], [seeds[index]])
        alone.mode = mode_of([row])
        alone(logits[index : index + 1])
        assert alone.next_token_ids_R[0] == together.next_token_ids_R[index], row


def test_greedy_rows_take_the_first_of_equal_logits_in_every_mode():
    logits = make_logits(3).round()
    for others in (params(0.0), params(1.0), params(1.0, top_k=4), params(1.0, top_p=0.5)):
        rows = [params(0.0), others, params(0.0)]
        sampler = make_sampler(logits, rows, [1, 2, 3])
        sampler.mode = mode_of(rows)
        sampler(logits)
        assert sampler.next_token_ids_R[[0, 2]].tolist() == logits.argmax(dim=1)[[0, 2]].tolist()


def test_a_request_that_comes_back_goes_on_with_the_tokens_it_would_have_had():
    logits = make_logits(2)
    rows = [params(1.1), params(0.8, top_k=30)]

    def tokens(steps, count):
        sampler = make_sampler(logits, rows, [11, 2**64 - 3], steps=steps)
        sampler.mode = mode_of(rows)
        for _ in range(count):
            sampler(logits)
            yield sampler.next_token_ids_R.tolist()

    whole = list(tokens(0, 9))
    assert list(tokens(4, 5)) == whole[4:]
    assert len({tuple(pair) for pair in whole}) > 4


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_draw_and_report_what_one_rank_does(num_ranks):
    rows = [replace(row, logprobs=3) for row in (*MIXED, *LONG_TAILS)]
    few = [replace(row, logprobs=3) for row in MIXED]
    cases = [(rows, torch.bfloat16), (few, torch.float32), (rows, torch.float32)]
    with RankGroup(num_ranks) as ranks:
        for chosen, dtype in cases[: 3 if num_ranks == 2 else 1]:
            logits = make_logits(len(chosen), dtype)
            seeds = list(range(len(chosen)))
            modes = [mode_of(chosen)] * 2 + [mode_of([params(0.0, logprobs=3)])]
            alone = on_rank.sample(HERE, logits, chosen, seeds, modes)
            for result in ranks.call(on_rank.sample, logits, chosen, seeds, modes):
                for (tokens, *reported), (expected, *known) in zip(result, alone, strict=True):
                    assert torch.equal(tokens, expected)
                    for got, want in zip(reported[:2], known[:2], strict=True):
                        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
                    if dtype == torch.float32:  # in bf16 some are equal, in any order
                        assert torch.equal(reported[2], known[2])


def test_log_probabilities_are_those_of_the_model_before_any_truncation():
    logits = make_logits(3)
    rows = [params(0.0, logprobs=0), params(0.4, logprobs=5), params(1.0, top_k=2, logprobs=20)]
    sampler = make_sampler(logits, rows, [1, 2, 3])
    sampler.mode = mode_of(rows)
    sampler(logits)
    expected = torch.log_softmax(logits, dim=1)
    chosen = sampler.next_token_ids_R[:, None]
    torch.testing.assert_close(sampler.logprobs_R, expected.gather(1, chosen)[:, 0])
    best = expected.topk(20, dim=1)
    torch.testing.assert_close(sampler.top_logprobs_RK, best.values)
    assert torch.equal(sampler.top_ids_RK, best.indices)


def test_a_step_that_predicts_nothing_samples_nothing():
    logits = make_logits(1)[:0]
    for mode in (mode_of(MIXED), mode_of(LONG_TAILS), mode_of([params(0.0, logprobs=3)])):
        sampler = make_sampler(logits, [], [])
        sampler.mode = mode
        sampler(logits)
        assert sampler.next_token_ids_R.shape == (0,)


def test_a_slot_keeps_its_parameters_until_another_request_takes_it():
    table = SamplingTable(3, torch.device("cpu"))
    slots = torch.tensor([0, 1, 3])
    table.take([])
    first = SlotTaken(slot=1, sampling=params(0.5, 7, 0.25), seed=2**63 + 5, num_generated=4)
    table.take([first])
    table.count_tokens(slots)
    limits = table.limits(slots)
    assert limits.temperatures_R.tolist() == [0.0, 0.5, 0.0]
    assert limits.top_ks_R.tolist() == [0, 7, 0]
    assert limits.top_ps_R.tolist() == [1.0, 0.25, 1.0]
    expected = row_keys(torch.tensor([0, 5 - 2**63, 0]), torch.tensor([1, 5, 1]))
    assert torch.equal(table.keys(slots), expected)


def test_the_executor_samples_with_any_sampler_or_leaves_the_logits():
    model = tiny_model("mixtral")
    weights = random_weights(model, device=torch.device("cpu"), seed=1)
    prompts = [[5, 9, 1, 33], [8, 8, 30]]
    greedy = Served(model, weights, prompts)
    greedy.generate(5, sequential)

    def served(rows):
        table = SamplingTable(2, torch.device("cpu"))
        table.take(
            [
                SlotTaken(slot=slot, sampling=row, seed=slot, num_generated=0)
                for slot, row in enumerate(rows)
            ]
        )

        def make(weights, num_rows):
            sampler = TokenSampler(weights, num_rows, table=table, slots_R=torch.arange(2))
            sampler.mode = mode_of(rows)
            return sampler

        result = Served(model, weights, prompts, make_sampler=make)
        result.generate(5, sequential)
        return result.texts

    assert served([params(0.0)] * 2) == greedy.texts
    drawn = served([params(0.0), params(5.0)])
    assert drawn[0] == greedy.texts[0]
    assert drawn[1] != greedy.texts[1]
    assert drawn == served([params(0.0), params(5.0)])
