from __future__ import annotations

import pytest
import torch
from builders import tiny_model

from nanoflow_tune.runtime.kv_cache import OutOfPagesError, PagedKvCache, cache_bytes

CPU = torch.device("cpu")


def test_pages_are_handed_out_at_random_once_and_never_page_zero():
    cache = PagedKvCache(tiny_model(), num_pages=20, device=CPU, page_size=4, seed=1)
    pages = [page for _ in range(5) for page in cache.allocate(13)]
    assert sorted(pages) == list(range(1, 21))
    assert pages != sorted(pages)
    again = PagedKvCache(tiny_model(), num_pages=20, device=CPU, page_size=4, seed=1)
    assert [page for _ in range(5) for page in again.allocate(13)] == pages


def test_running_out_of_pages_says_what_was_needed_and_what_is_free():
    cache = PagedKvCache(tiny_model(), num_pages=3, device=CPU, page_size=4)
    pages = cache.allocate(8)
    with pytest.raises(OutOfPagesError, match=r"9 tokens needs 3 pages of 4 tokens, but 1 are"):
        cache.allocate(9)
    cache.release(pages)
    assert len(cache.allocate(9)) == 3


def test_bytes_are_those_of_the_tensors():
    model = tiny_model()
    cache = PagedKvCache(model, num_pages=7, device=CPU, page_size=16, tp_degree=2)
    assert cache.num_bytes == cache_bytes(model, 2, 8, 16, "float32")
    assert cache.num_bytes == 8 * 16 * model.kv_bytes_per_token // 2


def test_ranks_hold_slices_of_the_same_contents():
    model = tiny_model()
    whole = PagedKvCache(model, num_pages=5, device=CPU)
    whole.fill_random(3)
    for rank in range(2):
        part = PagedKvCache(model, num_pages=5, device=CPU, tp_degree=2, rank=rank)
        part.fill_random(3)
        assert torch.equal(part.k_pages[1], whole.k_pages[1][:, 2 * rank : 2 * rank + 2])
