from __future__ import annotations

import pytest
import torch
from builders import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.runtime.batching import DenseBatch, Request
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.plan import NanoBatch
from nanoflow_tune.runtime.steady_state import batch_mix, steady_pages, steady_requests

CPU = torch.device("cpu")
PAGE = 4


def _cache(num_pages=400):
    return PagedKvCache(tiny_model(), num_pages=num_pages, device=CPU, page_size=PAGE)


def _decode(cache, kv_len):
    return Request(
        token_ids=(kv_len,),
        first_position=kv_len - 1,
        pages=cache.allocate(kv_len),
        is_decode=True,
    )


def _prefill(cache, start, count, is_complete=True):
    return Request(
        token_ids=tuple(range(count)),
        first_position=start,
        pages=cache.allocate(start + count),
        is_decode=False,
        is_complete=is_complete,
    )


def _build(nano_batches, requests):
    return DenseBatch.build(nano_batches, requests, page_size=PAGE, device=CPU)


def test_a_prompt_is_cut_exactly_at_the_nano_batch_boundary():
    cache = _cache()
    requests = [_decode(cache, 5), _decode(cache, 9), _prefill(cache, 0, 5), _prefill(cache, 6, 3)]
    nano_batches = (
        NanoBatch(tokens=(0, 4), decode_tokens=1),
        NanoBatch(tokens=(4, 10), decode_tokens=1),
    )
    batch = _build(nano_batches, requests)
    assert batch.positions_T.tolist() == [4, 0, 1, 2, 8, 3, 4, 6, 7, 8]
    assert batch.logical_rows == (0, 2, 3, 4, 1, 5, 6, 7, 8, 9)
    assert batch.straddling_requests(nano_batches) == (2,)
    first, second = batch.prefill_rows((0, 4)), batch.prefill_rows((4, 10))
    assert first.segment_rows == (3,)
    assert first.position_starts_S.tolist() == [0]
    assert second.segment_rows == (2, 3)
    assert second.row_starts_S.tolist() == [5, 7]
    assert second.position_starts_S.tolist() == [3, 6]
    assert second.max_kv_len == 9
    assert batch.logit_rows_R.tolist() == [0, 4, 6, 9]
    assert batch.decode_rows((4, 10)).kv_lens_R.tolist() == [9]
    assert batch.decode_rows((5, 10)) is None
    assert batch.prefill_rows((0, 1)) is None


def test_a_chunk_that_does_not_complete_predicts_nothing():
    cache = _cache()
    requests = [_decode(cache, 3), _prefill(cache, 0, 3, is_complete=False)]
    batch = _build((NanoBatch(tokens=(0, 4), decode_tokens=1),), requests)
    assert batch.logit_requests == (0,)


def test_requests_that_do_not_fit_the_nano_batches_are_refused():
    cache = _cache()
    with pytest.raises(ValueError, match=r"hold 2 decode and 1 prefill rows, but .* bring 1 and 2"):
        _build(
            (NanoBatch(tokens=(0, 3), decode_tokens=2),), [_decode(cache, 3), _prefill(cache, 0, 2)]
        )


@st.composite
def _layouts(draw):
    """Requests and two different ways to lay them out."""
    num_decodes = draw(st.integers(0, 12))
    prompts = draw(st.lists(st.integers(1, 9), max_size=4))
    if num_decodes + sum(prompts) == 0:
        num_decodes = 1

    def split():
        cuts = sorted(draw(st.lists(st.integers(0, num_decodes), max_size=3)))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, num_decodes], strict=True)]
        total = sum(prompts)
        prefill_cuts = sorted(draw(st.integers(0, total)) for _ in range(len(shares) - 1))
        prefills = [b - a for a, b in zip([0, *prefill_cuts], [*prefill_cuts, total], strict=True)]
        nano_batches, start = [], 0
        for decodes, prefill in zip(shares, prefills, strict=True):
            if decodes + prefill:
                end = start + decodes + prefill
                nano_batches.append(NanoBatch(tokens=(start, end), decode_tokens=decodes))
                start = end
        return tuple(nano_batches)

    kv_lens = draw(st.lists(st.integers(1, 20), min_size=num_decodes, max_size=num_decodes))
    return kv_lens, prompts, split(), split()


@settings(max_examples=60, deadline=None)
@given(_layouts())
def test_two_layouts_hold_the_same_logical_batch(case):
    kv_lens, prompts, one, other = case
    cache = _cache()
    requests = [_decode(cache, n) for n in kv_lens]
    requests += [_prefill(cache, 2, n) for n in prompts]
    a, b = _build(one, requests), _build(other, requests)
    assert sorted(a.logical_rows) == list(range(a.num_rows))
    for name in ("token_ids_T", "positions_T", "slots_T"):
        x, y = a.to_logical(getattr(a, name)), b.to_logical(getattr(b, name))
        assert torch.equal(x, y)
    assert a.logit_requests == b.logit_requests
    assert a.slots_T.unique().numel() == a.num_rows
    for batch, nano_batches in ((a, one), (b, other)):
        seen = []
        for nano_batch in nano_batches:
            decodes = batch.decode_rows(nano_batch.tokens)
            prefills = batch.prefill_rows(nano_batch.tokens)
            assert (decodes.num_rows if decodes else 0) == nano_batch.decode_tokens
            seen += decodes.row_ids_R.tolist() if decodes else []
            for start, count in zip(
                prefills.row_starts_S.tolist() if prefills else [],
                prefills.segment_rows if prefills else (),
                strict=True,
            ):
                seen += range(start, start + count)
        assert sorted(seen) == list(range(batch.num_rows))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 80), st.floats(6, 40), st.floats(1, 20), st.booleans())
def test_a_steady_batch_has_the_rows_contexts_and_pages_it_was_asked_for(
    decodes, prefills, context, prefill_context, mixed
):
    nano_batches = (NanoBatch(tokens=(0, decodes + prefills), decode_tokens=decodes),)
    mix = batch_mix(nano_batches, context, prefill_context)
    needed = steady_pages(mix, PAGE, mixed_lengths=mixed)
    cache = _cache(needed)
    requests = steady_requests(mix, cache, vocab_size=50, seed=0, mixed_lengths=mixed)
    assert cache.num_free_pages == 0
    kv_lens = [request.kv_len for request in requests if request.is_decode]
    assert abs(sum(kv_lens) / len(kv_lens) - context) <= 0.51
    if not mixed:
        assert len(set(kv_lens)) == 1
    assert _build(nano_batches, requests).num_rows == decodes + prefills
