from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import ping_pong, sequential, tiny_model

from nanoflow_tune.runtime.batching import DenseBatch
from nanoflow_tune.runtime.executor import Executor
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.schedule import IllegalScheduleError, random_legal_order
from nanoflow_tune.runtime.steady_state import batch_mix, steady_requests
from nanoflow_tune.runtime.weights import random_weights

CPU = torch.device("cpu")
MODEL = tiny_model(num_layers=3)
GRAPH = OpGraph.build(MODEL)


def _executor(schedule, seed=0):
    cache = PagedKvCache(MODEL, num_pages=200, device=CPU, seed=seed)
    cache.fill_random(seed)
    mix = batch_mix(schedule.nano_batches, 20.0, 7.0)
    requests = steady_requests(mix, cache, vocab_size=61, seed=seed, mixed_lengths=True)
    batch = DenseBatch.build(schedule.nano_batches, requests, page_size=16, device=CPU)
    weights = random_weights(MODEL, device=CPU, seed=seed)
    return Executor(GRAPH, weights, cache, batch, schedule).prepare()


@pytest.mark.parametrize("decodes", [(20, 4), (24, 0), (0, 24), (32, 32)])
def test_a_split_batch_gives_what_the_unsplit_one_gives(decodes):
    total = 64
    split = _executor(ping_pong(GRAPH, 32, total, decodes))
    whole = _executor(sequential(GRAPH, total, sum(decodes)))
    split.run()
    whole.run()
    assert split.batch.logit_requests == whole.batch.logit_requests
    torch.testing.assert_close(split.logits_RV, whole.logits_RV, rtol=1e-5, atol=1e-5)
    assert torch.equal(split.next_token_ids_R, whole.next_token_ids_R)


def test_random_legal_orders_and_repeats_give_the_same_bits():
    executor = _executor(ping_pong(GRAPH, 32, 64, (20, 4)))
    executor.run()
    expected = executor.logits_RV.clone()
    for seed in range(5):
        executor.buffers.poison()
        executor.run_in_order(random_legal_order(executor.instances, seed))
        assert torch.equal(executor.logits_RV, expected)
    executor.run()
    assert torch.equal(executor.logits_RV, expected)


def test_an_order_that_breaks_a_dependency_reads_poison():
    executor = _executor(sequential(GRAPH, 32, 10))
    order = list(range(len(executor.instances)))
    executor.buffers.poison()
    executor.run_in_order([order[1], order[0], *order[2:]])
    assert executor.logits_RV.isnan().any()


def test_observers_see_every_instance_in_issue_order():
    executor = _executor(ping_pong(GRAPH, 32, 64, (20, 4)))
    seen = []
    executor.run(seen.append)
    assert seen == executor.instances
    assert len(seen) == 3 * len(executor.schedule.nano_ops)
    both = []
    executor.run(observe=both.append, before=lambda instance: both.append((instance,)))
    assert both == [held for instance in executor.instances for held in ((instance,), instance)]


def test_guard_rows_survive_a_run():
    executor = _executor(ping_pong(GRAPH, 32, 64, (20, 4)))
    executor.run()
    assert executor.buffers.broken_guards() == ()
    executor.buffers.guarded()["act_TF"][-1] = 0.0
    assert executor.buffers.broken_guards() == ("act_TF",)


def test_a_batch_of_another_size_is_refused():
    executor = _executor(sequential(GRAPH, 32, 10))
    with pytest.raises(ValueError, match="for 64 rows, but the batch has 32"):
        Executor(
            GRAPH,
            executor.weights,
            executor.cache,
            executor.batch,
            sequential(GRAPH, 64, 10),
        )


def test_an_illegal_order_is_refused_before_anything_runs():
    schedule = sequential(GRAPH, 32, 10)
    nano_ops = list(schedule.nano_ops)
    nano_ops[1], nano_ops[2] = nano_ops[2], nano_ops[1]
    with pytest.raises(IllegalScheduleError, match=r"rope_append.0 .* needs kqv.0"):
        _executor(replace(schedule, nano_ops=tuple(nano_ops)))


def test_ranks_without_groups_are_refused():
    executor = _executor(sequential(GRAPH, 32, 10))
    graph = OpGraph.build(MODEL, 2)
    with pytest.raises(ValueError, match=r"2 ranks need `Resources.groups`"):
        Executor(graph, executor.weights, executor.cache, executor.batch, sequential(graph, 32, 10))
