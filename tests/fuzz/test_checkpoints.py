"""Checkpoints and traces, damaged: `load_checkpoint` and the trace reader refuse in words."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_line import empty_folder
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_document, tries
from safetensors.torch import save

from nanoflow_tune.autotune.ablation import trace_lengths
from nanoflow_tune.runtime.checkpoint import load_checkpoint

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (10, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (10, 16),
    f"{LAYER}input_layernorm.weight": (16,),
    f"{LAYER}post_attention_layernorm.weight": (16,),
    f"{LAYER}self_attn.q_proj.weight": (16, 16),
    f"{LAYER}self_attn.k_proj.weight": (8, 16),
    f"{LAYER}self_attn.v_proj.weight": (8, 16),
    f"{LAYER}self_attn.o_proj.weight": (16, 16),
    f"{LAYER}mlp.gate_proj.weight": (16, 16),
    f"{LAYER}mlp.up_proj.weight": (16, 16),
    f"{LAYER}mlp.down_proj.weight": (16, 16),
}
SHARD = "model-00001-of-00001.safetensors"
TENSORS = save({name: torch.zeros(shape) for name, shape in SHAPES.items()})
INDEX = {"metadata": {"total_size": len(TENSORS)}, "weight_map": dict.fromkeys(SHAPES, SHARD)}


def load(config=None, index=None, tensors=TENSORS):
    """Load a checkpoint of these files in an empty folder."""
    with empty_folder() as folder:
        Path("config.json").write_bytes(config or json.dumps(SIZES).encode())
        Path("model.safetensors.index.json").write_bytes(index or json.dumps(INDEX).encode())
        Path(SHARD).write_bytes(tensors)
        return load_checkpoint(folder, device=torch.device("cpu"))


def test_the_undamaged_checkpoint_is_read():
    assert load()[0].hidden_size == 16


def test_a_file_name_that_no_file_can_have_is_refused():
    index = {"weight_map": dict.fromkeys(SHAPES, "a" * 5000 + ".safetensors")}
    with pytest.raises(ValueError, match="names files that cannot be"):
        load(index=json.dumps(index).encode())


@tries(60, 3000)
@given(
    st.none() | damaged_bytes(json.dumps(SIZES).encode()) | damaged_document(SIZES),
    st.none() | damaged_bytes(json.dumps(INDEX).encode()) | damaged_document(INDEX),
    st.just(TENSORS) | damaged_bytes(TENSORS),
)
def test_checkpoints(config, index, tensors):
    with suppress(ValueError):
        load(config, index, tensors)


TRACE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"".join(
    f"2023-11-16 18:15:{n:02d},{100 + n},{10 + n}\n".encode() for n in range(20)
)


@tries(150, 6000)
@given(damaged_bytes(TRACE))
def test_traces(content):
    with empty_folder():
        Path("trace.csv").write_bytes(content)
        try:
            lengths = trace_lengths(Path("trace.csv"), 4096, 10)
        except ValueError as err:
            message = str(err)
        else:
            assert 0 < len(lengths) <= 10
            return
    assert "trace.csv" in message
