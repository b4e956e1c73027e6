"""The rotary table against what transformers computes from the same configuration."""

from __future__ import annotations

import json

import pytest
import torch

from nanoflow_tune.runtime.rotary import rotary_table
from nanoflow_tune.search_spaces.loader import content_hash, from_mapping, load_model, to_mapping
from nanoflow_tune.search_spaces.schema import ModelSpec

LENGTH = 4096
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
CASES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    LLAMA3,
    YARN,
    YARN | {"attention_factor": 0.9},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 24.0, "beta_slow": 2.0},
]


def _config(rope, theta=5e5):
    import transformers

    return transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rope_parameters=rope | {"rope_theta": theta},
    )


@pytest.mark.parametrize("rope", CASES)
@pytest.mark.parametrize("theta", [5e5, 1e4])
def test_the_table_equals_that_of_transformers(tmp_path, rope, theta):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _config(rope, theta)
    config.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    cos_sin_LH = rotary_table(model, torch.device("cpu"))
    positions = torch.arange(LENGTH)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1), positions)
    half = model.head_dim // 2
    # Frequencies may differ in their last bit, and angles are up to LENGTH times as large.
    torch.testing.assert_close(cos_sin_LH[:, :half], cos[0, :, :half], rtol=0, atol=6e-4)
    torch.testing.assert_close(cos_sin_LH[:, half:], sin[0, :, :half], rtol=0, atol=6e-4)


def test_the_older_keys_give_the_same_model(tmp_path):
    config = _config(LLAMA3).to_dict()
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    new, old = tmp_path / "new" / "m", tmp_path / "old" / "m"
    for folder in (new, old):
        folder.mkdir(parents=True)
    old_rope = {**rope, "type": rope["rope_type"]}
    del old_rope["rope_type"]
    old_config = config | {"rope_scaling": old_rope, "rope_theta": theta}
    (old / "config.json").write_text(json.dumps(old_config, default=str))
    _config(LLAMA3).save_pretrained(new)
    assert load_model(new).rope_scaling == load_model(old).rope_scaling
    assert load_model(old).rope_theta == theta


def test_scaling_survives_a_file_and_counts_in_the_hash(tmp_path):
    _config(LLAMA3).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert from_mapping(ModelSpec, to_mapping(model), "x") == model
    _config({"rope_type": "default"}).save_pretrained(tmp_path)
    assert content_hash(load_model(tmp_path)) != content_hash(model)
