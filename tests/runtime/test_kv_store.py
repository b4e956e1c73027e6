from __future__ import annotations

import random

import pytest
import torch
from builders import tiny_model

from nanoflow_tune.runtime import kv_store
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.kv_store import KvStore
from nanoflow_tune.runtime.prefix_index import PrefixIndex, page_digests
from nanoflow_tune.runtime.step import CacheOp


@pytest.fixture
def cache():
    cache = PagedKvCache(tiny_model(), num_pages=12, device=torch.device("cpu"))
    cache.fill_random(0)
    return cache


def op(kind, key, *pages):
    return CacheOp(kind=kind, key=key, pages=pages)


@pytest.mark.parametrize("is_demoted", [False, True])
def test_pages_come_back_as_they_were_from_memory_and_from_disk(cache, tmp_path, is_demoted):
    store = KvStore(cache, tmp_path)
    before = cache.pool_LZPGBH[:, :, [3, 1, 7]].clone()
    store.run([op("save", 0, 3, 1, 7)])
    num_bytes = before.nbytes
    assert (store.host_bytes, store.disk_bytes) == (num_bytes, 0)
    if is_demoted:
        store.run([op("demote", 0)])
        assert (store.host_bytes, store.disk_bytes) == (0, num_bytes)
        assert len(list(tmp_path.glob("*/*.pages"))) == 1
    cache.fill_random(1)
    store.run([op("load", 0, 5, 2)])
    assert torch.equal(cache.pool_LZPGBH[:, :, [5, 2]], before[:, :, :2])
    assert torch.equal(cache.k_pages[1][5], before[1, 0, 0])
    store.run([op("drop", 0)])
    assert (store.host_bytes, store.disk_bytes) == (0, 0)
    assert list(tmp_path.glob("*/*.pages")) == []


def test_kept_host_memory_is_shared_out_in_places_and_never_twice(cache, monkeypatch):
    page_bytes = cache.pool_LZPGBH[:, :, 0].nbytes
    monkeypatch.setattr(kv_store, "_BLOCK_BYTES", 4 * page_bytes)
    store = KvStore(cache, host_pages=7)  # blocks of 4 and 3
    rng, held = random.Random(0), {}
    for key in range(60):
        cache.pool_LZPGBH.normal_()
        pages = rng.sample(range(1, 13), rng.randint(1, 4))
        held[key] = cache.pool_LZPGBH[:, :, pages].clone()
        store.run([op("save", key, *pages)])
        while sum(saved.shape[2] for saved in held.values()) > 9:  # more than there are places
            dropped = rng.choice(list(held))
            del held[dropped]
            store.run([op("drop", dropped)])
        assert store.host_bytes == sum(saved.nbytes for saved in held.values())
        for other, saved in held.items():
            count = rng.randint(1, saved.shape[2])
            pages = rng.sample(range(1, 13), count)
            store.run([op("load", other, *pages)])
            assert torch.equal(cache.pool_LZPGBH[:, :, pages], saved[:, :, :count])


def test_close_removes_the_files(cache, tmp_path):
    store = KvStore(cache, tmp_path)
    store.run([op("save", 0, 3), op("demote", 0)])
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_entry_moves_down():
    index = PrefixIndex(host_pages=4, disk_pages=2, page_size=2)
    texts = [[10 * i + j for j in range(4)] for i in range(4)]
    kinds = [[o.kind for o in index.save(text, [1, 2])] for text in texts[:2]]
    assert kinds == [["save"], ["save"]]
    index.load(index.match([*texts[0], 9])[0], (1, 2))  # the first is the most recent now
    assert [(o.kind, o.key) for o in index.save(texts[2], [1, 2])] == [("demote", 1), ("save", 2)]
    ops = [(o.kind, o.key) for o in index.save(texts[3], [1, 2])]
    assert ops == [("drop", 1), ("demote", 0), ("save", 3)]
    assert index.match([*texts[0], 9]) == (0, 2)
    assert index.match([*texts[1], 9]) == (-1, 0)
    assert (index.host_used, index.disk_used) == (4, 2)


def test_a_longer_round_replaces_the_shorter_one():
    index = PrefixIndex(host_pages=10, disk_pages=0, page_size=2)
    index.save([1, 2, 3, 4], [5, 6])
    ops = [(o.kind, o.key, o.pages) for o in index.save([1, 2, 3, 4, 5, 6, 7], [5, 6, 7, 8])]
    assert ops == [("drop", 0, ()), ("save", 1, (5, 6, 7))]
    assert index.match([1, 2, 3, 4]) == (1, 1)  # its last token must be computed
    assert index.save([1, 2, 3, 4], [9, 9]) == []
    assert index.save(list(range(100)), list(range(50))) == []  # larger than the whole store


def test_digests_depend_on_everything_before():
    assert page_digests([1, 2, 3, 4, 5], 2) == page_digests([1, 2, 3, 4], 2)
    assert page_digests([1, 2, 3, 4], 2)[1] != page_digests([0, 2, 3, 4], 2)[1]
