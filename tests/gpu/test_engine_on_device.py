"""The engine with CUDA graphs: every step replayed, pages swapped and reloaded, tokens plausible.

Each token must be among the likeliest after all before it by a plain forward pass in fp64; bf16
decides near ties either way.
"""

from __future__ import annotations

import random
import threading

import pytest

torch = pytest.importorskip("torch")

from nanoflow_tune.runtime.batching import Request  # noqa: E402
from nanoflow_tune.runtime.engine import Engine  # noqa: E402
from nanoflow_tune.runtime.engine_config import EngineConfig  # noqa: E402
from nanoflow_tune.runtime.kv_cache import PagedKvCache  # noqa: E402
from nanoflow_tune.runtime.kv_store import KvStore  # noqa: E402
from nanoflow_tune.runtime.model import reference_forward  # noqa: E402
from nanoflow_tune.runtime.model_runner import ModelRunner  # noqa: E402
from nanoflow_tune.runtime.op_graph import OpGraph  # noqa: E402
from nanoflow_tune.runtime.plan_choice import PlanBook  # noqa: E402
from nanoflow_tune.runtime.scheduler_records import SchedulerLimits  # noqa: E402
from nanoflow_tune.runtime.sequence import (  # noqa: E402
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from nanoflow_tune.runtime.weights import random_weights  # noqa: E402
from nanoflow_tune.search_spaces.schema import ModelSpec  # noqa: E402

pytestmark = pytest.mark.gpu

MODEL = ModelSpec(
    name="small",
    architecture="llama",
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=1024,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
VARIANTS = {
    "norm": "triton",
    "gemm": "cublas",
    "gemm_silu": "torch",
    "rope_append": "triton",
    "prefill_attention": "triton",
}
TIE = 0.2
"""Of logits with a standard deviation of about 1."""


def behind_the_best(weights, request, tokens):
    """How far each chosen token's logit is below the largest."""
    cache = PagedKvCache(MODEL, num_pages=1, device=weights.device)
    text = (*request.prompt_token_ids, *tokens[:-1])
    whole = Request(token_ids=text, first_position=0, pages=(), is_decode=False)
    x_TD = reference_forward(weights, cache, [whole]).layer_outputs_TD[-1][-len(tokens) :]
    scale_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + MODEL.rms_norm_eps)
    normed_TD = x_TD * scale_T1 * weights.final_norm_D.double()
    logits_TV = normed_TD @ weights.lm_head_VD.double().t()
    chosen_T = logits_TV.gather(1, torch.tensor(tokens, device=x_TD.device)[:, None])[:, 0]
    return logits_TV.amax(dim=1) - chosen_T


@pytest.mark.parametrize("decode", ["triton", "sm90"])
def test_replayed_steps_generate_what_each_request_gives_alone(decode):
    device = torch.device("cuda:0")
    graph, weights = OpGraph.build(MODEL), random_weights(MODEL, device=device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    book = PlanBook.without_plan(graph, 128, VARIANTS | {"decode_attention": decode}, num_sms)
    config = EngineConfig(
        model_name=MODEL.name,
        vocab_size=MODEL.vocab_size,
        limits=SchedulerLimits(
            max_model_len=512, max_running=64, expected_decode_tokens=8.0, admitted_fraction=2.0
        ),
        num_pages=150,
        page_size=16,
        offload_host_pages=60,
    )

    def make_runner():
        torch.cuda.set_device(device)
        cache = PagedKvCache(MODEL, num_pages=config.num_pages, device=device)
        store = KvStore(cache, host_pages=config.offload_host_pages)
        return ModelRunner(graph, weights, cache, book, config.runner_sizes, store=store)

    rng = random.Random(0)
    requests = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=tuple(rng.randrange(1024) for _ in range(rng.choice([1, 30, 200]))),
            sampling=SamplingParams(max_tokens=rng.choice([1, 20, 90]), temperature=0.0),
        )
        for index in range(60)
    ]
    events = {request.request_id: [] for request in requests}
    done = threading.Semaphore(0)

    def on_event(event):
        events[event.request_id].append(event)
        if isinstance(event, FinishEvent):
            done.release()

    engine = Engine(config, book, make_runner)
    engine.start()
    for request in requests:
        engine.submit(request, on_event)
    for _ in requests:
        assert done.acquire(timeout=120)
    engine.close()
    assert engine.stats.eager_steps_total == 0
    assert engine.stats.preemptions_total > 0
    assert engine.stats.kv_pages_used == 0
    for request in requests:
        *tokens, end = events[request.request_id]
        assert end.reason == "length", end.message
        assert all(isinstance(token, TokenEvent) for token in tokens)
        far = behind_the_best(weights, request, [token.token_id for token in tokens])
        assert float(far.max()) < TIE, f"request {request.request_id}"
