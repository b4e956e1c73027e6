from __future__ import annotations

import pytest
import torch
from builders import ping_pong, sequential, tiny_model
from served import Served

from nanoflow_tune.runtime.batching import Request
from nanoflow_tune.runtime.kv_cache import PagedKvCache
from nanoflow_tune.runtime.model import reference_forward
from nanoflow_tune.runtime.weights import load_hf_state_dict, random_weights, vocab_range

CPU = torch.device("cpu")
PAGE = 4


def _hf_model(model):
    import transformers

    names = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_class, model_class = names[model.architecture]
    torch.manual_seed(0)
    config = config_class(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_theta=model.rope_theta,
        tie_word_embeddings=model.tie_word_embeddings,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    hf = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # transformers starts biases at zero
    return hf


def _split(graph, rows, decodes):
    cut = rows // 2
    first = max(decodes - (rows - cut), min(decodes, cut // 2))
    return ping_pong(graph, cut, rows, (first, decodes - first))


@pytest.mark.parametrize("make_schedule", [sequential, _split])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("llama", {}), ("qwen2", {}), ("llama", {"tie_word_embeddings": True, "rope_theta": 5e5})],
)
def test_greedy_tokens_and_logits_equal_transformers(architecture, overrides, make_schedule):
    model = tiny_model(architecture, num_layers=3, **overrides)
    hf = _hf_model(model)
    weights = load_hf_state_dict(model, hf.state_dict(), device=CPU)
    prompts = [[5, 9, 1, 33, 7, 2, 60], [8, 8, 30], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
    served = Served(model, weights, prompts, page_size=PAGE)
    served.step([(0, 0, 7), (1, 0, 3), (2, 0, 4)], make_schedule)  # the third is chunked
    served.step([(0, 7, 8), (1, 3, 4), (2, 4, 9)], make_schedule)
    for _ in range(5):
        lengths = [len(text) for text in served.texts]
        served.step([(i, n - 1, n) for i, n in enumerate(lengths)], make_schedule)
    for prompt, text, logits in zip(prompts, served.texts, served.logits, strict=True):
        with torch.no_grad():
            expected = hf(torch.tensor([text[:-1]])).logits[0, len(prompt) - 1 :]
        got = torch.stack(logits)
        assert float((got - expected).abs().max()) < 2e-4
        assert text[len(prompt) :] == expected.argmax(dim=-1).tolist()


def test_the_plain_reference_equals_transformers():
    model = tiny_model("qwen2", num_layers=2)
    hf = _hf_model(model)
    weights = load_hf_state_dict(model, hf.state_dict(), device=CPU)
    cache = PagedKvCache(model, num_pages=9, device=CPU, page_size=PAGE)
    tokens = (3, 1, 4, 1, 5, 9, 2)
    request = Request(token_ids=tokens, first_position=0, pages=cache.allocate(7), is_decode=False)
    with torch.no_grad():
        expected = hf(torch.tensor([tokens]), output_hidden_states=True)
    output = reference_forward(weights, cache, [request])
    torch.testing.assert_close(
        output.layer_outputs_TD[0].float(), expected.hidden_states[1][0], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        output.logits_RV[0].float(), expected.logits[0, -1], rtol=1e-4, atol=1e-4
    )


def test_ranks_hold_slices_of_one_model():
    model = tiny_model("qwen2")
    whole = random_weights(model, device=CPU, seed=4)
    parts = [random_weights(model, rank=rank, tp_degree=2, device=CPU, seed=4) for rank in range(2)]
    columns = torch.cat([part.layers[1].down_DF for part in parts], dim=1)
    assert torch.equal(columns, whole.layers[1].down_DF)
    assert torch.equal(torch.cat([part.lm_head_VD for part in parts]), whole.lm_head_VD)
    queries = torch.cat([part.layers[0].kqv_bias_C[:32] for part in parts])
    assert torch.equal(queries, whole.layers[0].kqv_bias_C[:64])


def test_direct_shards_have_the_same_shapes_but_their_own_values():
    model = tiny_model()
    exact, direct = (
        random_weights(model, rank=1, tp_degree=2, device=CPU, sharded_exactly=exact)
        for exact in (True, False)
    )
    assert exact.layers[0].kqv_CD.shape == direct.layers[0].kqv_CD.shape
    assert not torch.equal(exact.layers[0].kqv_CD, direct.layers[0].kqv_CD)
    assert torch.equal(exact.embedding_VD, direct.embedding_VD)


def test_a_vocabulary_smaller_than_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=2, tp_degree=4"):
        vocab_range(tiny_model(vocab_size=2), 3, 4)


def test_a_checkpoint_with_another_shape_is_refused():
    model = tiny_model()
    state_dict = _hf_model(model).state_dict()
    with pytest.raises(ValueError, match=r"k_proj.weight' must have shape \(64, 32\)"):
        load_hf_state_dict(tiny_model(num_key_value_heads=8), state_dict, device=CPU)
    with pytest.raises(ValueError, match=r"no 'model.layers.0.self_attn.q_proj.bias'"):
        load_hf_state_dict(tiny_model("qwen2"), state_dict, device=CPU)
