"""Hugging Face configurations: what is read, and what is refused instead of ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow_tune.search_spaces.loader import SpecError, load_model

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (MINIMAL | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "my-model"


def test_folder_and_file_give_the_same_model_named_for_the_folder(folder):
    model = load_model(write_config(folder))
    assert model == load_model(folder / "config.json") == load_model(str(folder))
    assert model.name == "my-model"


def test_absent_keys_take_the_values_that_transformers_takes(folder):
    model = load_model(write_config(folder))
    assert (model.head_dim, model.num_key_value_heads, model.rope_theta) == (32, 8, 10000.0)
    assert (model.tie_word_embeddings, model.torch_dtype) == (False, "bfloat16")


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_both_spellings_of_dtype_and_of_rope_theta(folder, key):
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    model = load_model(write_config(folder, **{key: "float16"}, rope_parameters=rope))
    assert (model.torch_dtype, model.rope_theta) == ("float16", 5e5)
    assert load_model(write_config(folder, rope_theta=1000000)).rope_theta == 1e6


def test_configurations_saved_by_transformers(folder):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "dtype": "float32",
    }
    for cls, architecture in (
        (transformers.LlamaConfig, "llama"),
        (transformers.Qwen2Config, "qwen2"),
        (transformers.MixtralConfig, "mixtral"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(cls(**sizes).to_dict(), default=str))
        model = load_model(folder)
        assert (model.architecture, model.num_key_value_heads) == (architecture, 2)
        assert (model.num_hidden_layers, model.head_dim) == (3, 16)
        experts = (8, 2) if architecture == "mixtral" else (None, None)
        assert (model.num_local_experts, model.num_experts_per_tok) == experts


def test_experts_are_read_and_a_dense_model_has_none(folder):
    config = {"model_type": "mixtral", "num_local_experts": 16, "num_experts_per_tok": 4}
    model = load_model(write_config(folder, architectures=None, **config, sliding_window=None))
    assert (model.num_local_experts, model.num_experts_per_tok) == (16, 4)
    assert load_model(write_config(folder)).num_local_experts is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["PhiForCausalLM"]},
            "architecture PhiForCausalLM is not supported; "
            "supported are LlamaForCausalLM, Qwen2ForCausalLM, MixtralForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "architecture model_type gpt2 is not"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling of type 'dynamic' is not"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "scaling of type 'longrope' is not"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "needs factor, low_freq_factor, high_freq"),
        ({"rope_scaling": {"type": "linear"}}, "type 'linear' needs factor; add what is missing"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            "'yarn' with `truncate: false` is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": -2.0}},
            r"`rope_scaling`: `rope_scaling.factor` must be positive, but got value=-2.0",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "`low_freq_factor` must be smaller than `high_freq_factor`",
        ),
        ({"rope_scaling": 8}, "`rope_scaling`: must be an object or null, but got 8"),
        ({"attention_bias": True}, "`attention_bias: true` is not supported yet"),
        ({"mlp_bias": True}, "`mlp_bias: true` is not supported yet"),
        ({"sliding_window": 4096}, "a sliding attention window is not supported yet"),
        ({"layer_types": ["sliding_attention"]}, "a sliding attention window is not supported"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
            "a sliding attention window is not supported yet",
        ),
        ({"layer_types": 3}, "`layer_types`: must be a list or null, but got 3"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` other than 1 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor` other than"),
        ({"hidden_act": "gelu"}, "`hidden_act: gelu` is not supported yet"),
        ({"quantization_config": {"bits": 4}}, "quantised weights .* is not supported yet"),
        ({"hidden_size": "absent", "vocab_size": None}, "needs hidden_size, vocab_size; add"),
        ({"hidden_size": 100}, "`hidden_size` must be a multiple of `num_attention_heads`"),
        ({"num_attention_heads": 0}, "must be a multiple .* num_attention_heads=0"),
        ({"hidden_size": "256"}, "hidden_size='256'"),
        ({"vocab_size": True}, "`vocab_size`: must be a whole number, but got True"),
        ({"torch_dtype": "int8"}, "`torch_dtype`: must be one of bfloat16, float16, float32"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 1}, "at most `num_local"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": None},
            r"belong to `architecture: mixtral`.*num_local_experts=None",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "attention_bias": True},
            "`attention_bias: true` is not supported yet",
        ),
        ({"num_key_value_heads": 3}, "must be a multiple of `num_key_value_heads`"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(folder, changes, message):
    with pytest.raises(SpecError, match=message) as caught:
        load_model(write_config(folder, **changes))
    assert str(folder / "config.json") in str(caught.value)


def test_qwen2_lists_a_window_that_it_does_not_use(folder):
    config = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    model = load_model(write_config(folder, **config, sliding_window=131072))
    assert model.has_qkv_bias


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "must be valid JSON in UTF-8"),
        (b"\xff\xfe", "must be valid JSON in UTF-8"),
        (b"[" * 100_000, "must be valid JSON in UTF-8"),
        (b"[]", "must hold a JSON object, but holds a list"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        load_model(path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"config\.json: cannot be read \(No such file"):
        load_model(tmp_path)
