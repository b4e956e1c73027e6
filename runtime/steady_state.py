"""Requests of a steady dense batch: what a serving engine has in flight at a bucket's mix.

Decoding requests are spread evenly over their decode phase, prompts arrive one after the other and
are chunked: the first one of the iteration may be in its middle, the last one may not complete.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .batching import Request
from .kv_cache import PagedKvCache, pages_for
from .op_graph import RowMix
from .plan import NanoBatch


@dataclass(frozen=True, slots=True)
class _Lengths:
    first_position: int
    num_rows: int
    is_decode: bool
    is_complete: bool


def batch_mix(
    nano_batches: Sequence[NanoBatch], decode_context: float, prefill_context: float
) -> RowMix:
    """The mix of a dense batch: rows from its nano-batches, mean contexts from its bucket."""
    decodes = sum(nano_batch.decode_tokens for nano_batch in nano_batches)
    return RowMix(
        decode_tokens=decodes,
        prefill_tokens=nano_batches[-1].tokens[1] - decodes,
        decode_context_tokens=decode_context,
        prefill_context_tokens=prefill_context,
    )


def steady_pages(mix: RowMix, page_size: int, *, mixed_lengths: bool) -> int:
    """Pages that the requests of `steady_requests` need."""
    return sum(
        pages_for(item.first_position + item.num_rows, page_size)
        for item in _lengths(mix, mixed_lengths)
    )


def steady_requests(
    mix: RowMix, cache: PagedKvCache, *, vocab_size: int, seed: int, mixed_lengths: bool
) -> tuple[Request, ...]:
    """Requests of a steady batch, with pages allocated in `cache` and random token ids.

    Args:
        mix: whole numbers of rows; a prompt is 2 x prefill context - 1 tokens long, and decode
            contexts spread evenly from the prompt's length to as far above the mean.
        cache: pages come from here; its contents are what earlier iterations would have left.
        vocab_size: bound of the token ids.
        seed: of the token ids.
        mixed_lengths: spread the decode contexts; otherwise all have the mean.

    Raises:
        OutOfPagesError: the cache is too small.
    """
    rng = random.Random(seed)
    return tuple(
        Request(
            token_ids=tuple(rng.randrange(vocab_size) for _ in range(item.num_rows)),
            first_position=item.first_position,
            pages=cache.allocate(item.first_position + item.num_rows),
            is_decode=item.is_decode,
            is_complete=item.is_complete,
        )
        for item in _lengths(mix, mixed_lengths)
    )


def _lengths(mix: RowMix, mixed_lengths: bool) -> list[_Lengths]:
    prompt = max(1, round(2 * mix.prefill_context_tokens - 1))
    return [*_decodes(mix, prompt, mixed_lengths), *_prefills(mix, prompt, mixed_lengths)]


def _decodes(mix: RowMix, prompt: int, mixed_lengths: bool) -> list[_Lengths]:
    count, mean = round(mix.decode_tokens), mix.decode_context_tokens
    spread = min(mean - 1, max(0.0, mean - prompt)) if mixed_lengths else 0.0
    kv_lens = [
        max(1, round(mean + spread * ((2 * index + 1) / count - 1))) for index in range(count)
    ]
    random.Random(count).shuffle(kv_lens)  # ages are not sorted in a running engine
    return [_Lengths(kv_len - 1, 1, True, True) for kv_len in kv_lens]


def _prefills(mix: RowMix, prompt: int, mixed_lengths: bool) -> list[_Lengths]:
    segments: list[_Lengths] = []
    remaining = round(mix.prefill_tokens)
    done = prompt // 2 if mixed_lengths else 0  # of the first prompt, in earlier iterations
    while remaining:
        rows = min(prompt - done, remaining)
        segments.append(_Lengths(done, rows, False, done + rows == prompt))
        remaining -= rows
        done = 0
    return segments
