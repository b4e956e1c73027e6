"""Requests that go through the executor and the paged cache step by step, as an engine's would."""

from __future__ import annotations

import torch

from nanoflow_tune.runtime.batching import DenseBatch, Request
from nanoflow_tune.runtime.executor import Executor
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.sampling import GreedySampler

CPU = torch.device("cpu")


class Served:
    """Prompts, and what was generated behind them so far."""

    def __init__(
        self, model, weights, prompts, *, page_size=4, resources=None, make_sampler=GreedySampler
    ):
        self.graph, self.weights = OpGraph.build(model, weights.tp_degree), weights
        self.resources, self.make_sampler = resources, make_sampler
        self.cache = PagedKvCache(
            model,
            num_pages=120,
            device=CPU,
            tp_degree=weights.tp_degree,
            rank=weights.rank,
            page_size=page_size,
            seed=3,
        )
        self.texts = [list(prompt) for prompt in prompts]
        self.pages = [self.cache.allocate(len(prompt) + 12) for prompt in prompts]
        self.logits = [[] for _ in prompts]

    def step(self, work, make_schedule):
        """Feed tokens [start, end) of some requests; keep what they predict."""
        requests = [
            Request(
                token_ids=tuple(self.texts[index][start:end]),
                first_position=start,
                pages=self.pages[index],
                is_decode=end - start == 1,
                is_complete=end == len(self.texts[index]),
            )
            for index, start, end in work
        ]
        decodes = sum(request.is_decode for request in requests)
        rows = sum(request.num_rows for request in requests)
        schedule = make_schedule(self.graph, rows, decodes)
        batch = DenseBatch.build(
            schedule.nano_batches, requests, page_size=self.cache.page_size, device=CPU
        )
        executor = Executor(
            self.graph,
            self.weights,
            self.cache,
            batch,
            schedule,
            self.resources,
            self.make_sampler,
        ).prepare()
        executor.run()
        for place, request in enumerate(batch.logit_requests):
            index = work[request][0]
            self.logits[index].append(executor.logits_RV[place].clone())
            self.texts[index].append(int(executor.next_token_ids_R[place]))
        return executor

    def generate(self, num_tokens, make_schedule):
        """Prompts whole in one batch, then one token of each in every further one."""
        self.step([(i, 0, len(text)) for i, text in enumerate(self.texts)], make_schedule)
        for _ in range(num_tokens - 1):
            lengths = [len(text) for text in self.texts]
            self.step([(i, n - 1, n) for i, n in enumerate(lengths)], make_schedule)
