"""Reads a ModelSpec from a Hugging Face `config.json`.

Only what the runtime computes exactly is accepted. A setting that would change the mathematics
(sliding windows, rotary scaling by the text's length, biases, quantised weights) is refused by
name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from .hf_rope import rope_parameters, rope_scaling
from .records import SpecError, from_mapping, read_bounded
from .schema import Architecture, ModelSpec

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "MixtralForCausalLM": "mixtral",
}
_MODEL_TYPES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_DEFAULT_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
"""What transformers takes for absent keys of a Mixtral configuration."""
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def load_hf_config(path: Path) -> ModelSpec:
    """The model that a Hugging Face folder or its `config.json` describes, named for the folder.

    Raises:
        SpecError: unreadable, an architecture or a setting that is not supported, a missing key.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _read(file)
    where = str(file)
    architecture = _architecture(config, where)
    _refuse_unsupported(config, architecture, where)
    return from_mapping(ModelSpec, _spec_values(config, architecture, file), where)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_bounded(file).decode("utf-8"))
    except OSError as err:
        raise SpecError(f"{file}: cannot be read ({err.strerror}); check the path") from err
    except (ValueError, RecursionError) as err:  # UnicodeDecodeError and JSONDecodeError too
        raise SpecError(f"{file}: must be valid JSON in UTF-8, but {err}") from err
    if not isinstance(value, dict):
        raise SpecError(f"{file}: must hold a JSON object, but holds a {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _architecture(config: Mapping[str, Any], where: str) -> Architecture:
    listed = config.get("architectures")
    if not listed:
        model_type = config.get("model_type")
        listed = [_MODEL_TYPES.get(str(model_type), f"model_type {model_type}")]
    name = str(cast("list[object]", listed)[0]) if isinstance(listed, list) else str(listed)
    if name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise SpecError(f"{where}: architecture {name} is not supported; supported are {supported}")
    return ARCHITECTURES[name]


def _refuse_unsupported(config: dict[str, Any], architecture: Architecture, where: str) -> None:
    rope = rope_parameters(config, where)
    layer_types = config.get("layer_types") or ["full_attention"]
    if not isinstance(layer_types, list):
        raise SpecError(f"{where}: `layer_types`: must be a list or null, but got {layer_types!r}")
    if architecture == "qwen2":
        has_sliding_window = bool(config.get("use_sliding_window", False))
    else:
        has_sliding_window = config.get("sliding_window") is not None
    unsupported = {
        "a sliding attention window": has_sliding_window
        or any(kind != "full_attention" for kind in cast("list[object]", layer_types)),
        "`attention_bias: true`": architecture != "qwen2" and bool(config.get("attention_bias")),
        "`mlp_bias: true`": bool(config.get("mlp_bias")),
        f"`hidden_act: {config.get('hidden_act')}`": config.get("hidden_act", "silu") != "silu",
        "`partial_rotary_factor` other than 1": (config | rope).get("partial_rotary_factor", 1)
        != 1,
        "quantised weights (`quantization_config`)": bool(config.get("quantization_config")),
    }
    for setting, is_used in unsupported.items():
        if is_used:
            raise SpecError(
                f"{where}: {setting} is not supported yet, and leaving it out would change the "
                "model's results; choose a checkpoint without it"
            )


def _spec_values(
    config: Mapping[str, Any], architecture: Architecture, file: Path
) -> dict[str, Any]:
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise SpecError(f"{file}: needs {', '.join(missing)}; add what is missing")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim")
    if head_dim is None:
        if not (isinstance(heads, int) and isinstance(hidden, int)) or heads < 1 or hidden % heads:
            raise SpecError(
                f"{file}: without `head_dim`, `hidden_size` must be a multiple of "
                f"`num_attention_heads`, but got hidden_size={hidden!r}, "
                f"num_attention_heads={heads!r}"
            )
        head_dim = hidden // heads
    kv_heads = config.get("num_key_value_heads")
    theta = rope_parameters(config, str(file)).get("rope_theta")
    dtype = config.get("torch_dtype") or config.get("dtype")
    experts = _DEFAULT_EXPERTS if architecture == "mixtral" else dict[str, int]()
    return {key: config[key] for key in _REQUIRED} | {
        "name": file.resolve().parent.name,
        "architecture": architecture,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "rope_theta": config.get("rope_theta", 10000.0) if theta is None else theta,
        "rope_scaling": rope_scaling(config, str(file)),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "torch_dtype": dtype or ModelSpec.__dataclass_fields__["torch_dtype"].default,
        **{key: config.get(key, default) for key, default in experts.items()},
    }
