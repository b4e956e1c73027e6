"""Weights of one tensor-parallel rank: random ones by seed, or those of a checkpoint.

All come through one door, a `Source` that gives this rank's part of a matrix by its Hugging Face
name; so random weights of two ranks are slices of the same full model.

Shape legend: D hidden, C = (qo + 2 kv) x head dim, Q = qo heads x head dim, F ffn width, V rows of
the vocabulary, H head dim, L positions, E experts; C, Q, F and V are this rank's share. W hidden
columns of this rank, A the heads of all ranks x head dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..search_spaces.schema import Dtype, ModelSpec
from .kernels.registry import HeadShape
from .rotary import rotary_table

_TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The torch type of a spec's dtype name."""
    return _TORCH_DTYPES[dtype]


def seeded_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator that depends on nothing but the seed, the name and the device type."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer's share of one rank."""

    attn_norm_D: Tensor
    kqv_CD: Tensor
    """Queries, keys, values, in this order."""
    kqv_bias_C: Tensor | None
    o_proj_DQ: Tensor
    """Split by rows: what this rank's heads add to every hidden column."""
    ffn_norm_D: Tensor
    up_gate_2FD: Tensor
    """Up rows, then gate rows; with experts one such matrix each, [E, 2F, D]."""
    down_DF: Tensor
    """With experts one such matrix each, [E, D, F]."""
    router_ED: Tensor | None = None
    """With experts; the same on every rank."""
    o_columns_WA: Tensor | None = None
    """The same output projection split by columns, for plans that gather (`o_proj_columns`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All weights of one rank."""

    model: ModelSpec
    rank: int
    tp_degree: int
    layers: tuple[LayerWeights, ...]
    embedding_VD: Tensor
    """The whole vocabulary, on every rank."""
    final_norm_D: Tensor
    lm_head_VD: Tensor
    """Rows `vocab_start` and on of the vocabulary; a view of the embedding where they are tied."""
    cos_sin_LH: Tensor
    """fp32: H / 2 cosines, then H / 2 sines of each position."""

    @property
    def heads(self) -> HeadShape:
        """Heads of this rank."""
        return HeadShape(
            num_qo_heads=self.model.num_attention_heads // self.tp_degree,
            num_kv_heads=self.model.num_key_value_heads // self.tp_degree,
            head_dim=self.model.head_dim,
        )

    @property
    def vocab_start(self) -> int:
        """First vocabulary entry of this rank's LM head."""
        return vocab_range(self.model, self.rank, self.tp_degree)[0]

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embedding_VD.device


class Source(Protocol):
    """Gives this rank's part `[start, end)` along `dim` of the matrix called `name`."""

    def __call__(
        self, name: str, shape: tuple[int, ...], dim: int, part: tuple[int, int]
    ) -> Tensor:
        """This rank's part of one matrix."""
        ...


def vocab_range(model: ModelSpec, rank: int, tp_degree: int) -> tuple[int, int]:
    """Vocabulary entries of a rank's LM head; the last rank may have fewer.

    Raises:
        ValueError: the vocabulary is so small that a rank would have none.
    """
    share = -(-model.vocab_size // tp_degree)
    start, end = rank * share, min((rank + 1) * share, model.vocab_size)
    if start >= end:
        raise ValueError(
            "`vocab_size` must leave each tensor-parallel rank at least one entry, but got "
            f"vocab_size={model.vocab_size}, tp_degree={tp_degree}"
        )
    return start, end


def build_weights(
    model: ModelSpec,
    source: Source,
    *,
    rank: int,
    tp_degree: int,
    device: torch.device,
    num_layers: int | None = None,
    with_o_columns: bool = False,
) -> Weights:
    """Assemble the fused matrices of one rank from a source of named ones.

    `with_o_columns` adds the output projection split by columns (`has_o_columns` of the schedules).
    """
    layers = model.num_hidden_layers if num_layers is None else num_layers
    hidden, vocab = model.hidden_size, model.vocab_size
    table, head_rows = (vocab, hidden), vocab_range(model, rank, tp_degree)
    embedding_VD = source("model.embed_tokens.weight", table, 0, (0, vocab))
    if model.tie_word_embeddings:
        lm_head_VD = embedding_VD[slice(*head_rows)]
    else:
        lm_head_VD = source("lm_head.weight", table, 0, head_rows)
    return Weights(
        model=model,
        rank=rank,
        tp_degree=tp_degree,
        layers=tuple(
            _layer(model, source, layer, rank, tp_degree, with_o_columns) for layer in range(layers)
        ),
        embedding_VD=embedding_VD,
        final_norm_D=source("model.norm.weight", (hidden,), 0, (0, hidden)),
        lm_head_VD=lm_head_VD,
        cos_sin_LH=rotary_table(model, device),
    )


def _layer(
    model: ModelSpec,
    source: Source,
    layer: int,
    rank: int,
    tp_degree: int,
    with_o_columns: bool,
) -> LayerWeights:
    hidden, ffn = model.hidden_size, model.intermediate_size
    prefix = f"model.layers.{layer}."

    def part(size: int) -> tuple[int, int]:
        return rank * size // tp_degree, (rank + 1) * size // tp_degree

    def rows(name: str, size: int) -> Tensor:
        return source(f"{prefix}{name}.weight", (size, hidden), 0, part(size))

    def columns(name: str, size: int) -> Tensor:
        return source(f"{prefix}{name}.weight", (hidden, size), 1, part(size))

    def bias(name: str, size: int) -> Tensor:
        return source(f"{prefix}{name}.bias", (size,), 0, part(size))

    def whole(name: str) -> Tensor:
        return source(f"{prefix}{name}.weight", (hidden,), 0, (0, hidden))

    def expert(index: int) -> tuple[Tensor, Tensor]:
        name = f"block_sparse_moe.experts.{index}"
        up_gate_2FD = torch.cat([rows(f"{name}.w3", ffn), rows(f"{name}.w1", ffn)])
        return up_gate_2FD, columns(f"{name}.w2", ffn)

    router_ED = None
    if model.num_local_experts:
        shape = (model.num_local_experts, hidden)
        router_ED = source(f"{prefix}block_sparse_moe.gate.weight", shape, 0, (0, shape[0]))
        made = zip(*(expert(index) for index in range(shape[0])), strict=True)
        up_gate_2FD, down_DF = (torch.stack(matrices) for matrices in made)
    else:
        up_gate_2FD = torch.cat([rows("mlp.up_proj", ffn), rows("mlp.gate_proj", ffn)])
        down_DF = columns("mlp.down_proj", ffn)
    kqv = (
        ("self_attn.q_proj", model.qo_size),
        ("self_attn.k_proj", model.kv_size),
        ("self_attn.v_proj", model.kv_size),
    )
    return LayerWeights(
        attn_norm_D=whole("input_layernorm"),
        kqv_CD=torch.cat([rows(name, size) for name, size in kqv]),
        kqv_bias_C=torch.cat([bias(*item) for item in kqv]) if model.has_qkv_bias else None,
        o_proj_DQ=columns("self_attn.o_proj", model.qo_size),
        ffn_norm_D=whole("post_attention_layernorm"),
        up_gate_2FD=up_gate_2FD,
        down_DF=down_DF,
        router_ED=router_ED,
        o_columns_WA=(
            _o_columns(model, source, layer, rank, tp_degree) if with_o_columns else None
        ),
    )


def _o_columns(model: ModelSpec, source: Source, layer: int, rank: int, tp_degree: int) -> Tensor:
    hidden = model.hidden_size
    part = rank * hidden // tp_degree, (rank + 1) * hidden // tp_degree
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    return source(name, (hidden, model.qo_size), 0, part)


def random_weights(
    model: ModelSpec,
    *,
    rank: int = 0,
    tp_degree: int = 1,
    device: torch.device,
    seed: int = 0,
    num_layers: int | None = None,
    sharded_exactly: bool = True,
    with_o_columns: bool = False,
) -> Weights:
    """Normal weights of standard deviation 1 / sqrt(fan in), so that activations stay near 1.

    Args:
        model: its dtype is that of the weights.
        rank: this tensor-parallel rank.
        tp_degree: ranks in all.
        device: where they are made, and stay.
        seed: the same seed gives the same full model on every rank.
        num_layers: fewer layers than the model has, for verification.
        sharded_exactly: make each full matrix and keep this rank's slice. False makes the slice
            alone: fast and small for timing, but ranks are then not parts of one model.
        with_o_columns: the output projection split by columns as well, of the same matrix.
    """
    return build_weights(
        model,
        random_source(model, rank=rank, device=device, seed=seed, sharded_exactly=sharded_exactly),
        rank=rank,
        tp_degree=tp_degree,
        device=device,
        num_layers=num_layers,
        with_o_columns=with_o_columns,
    )


def random_source(
    model: ModelSpec, *, rank: int, device: torch.device, seed: int, sharded_exactly: bool
) -> Source:
    """What gives `random_weights` its matrices; the arguments are those."""
    dtype = torch_dtype(model.torch_dtype)

    def source(name: str, shape: tuple[int, ...], dim: int, part: tuple[int, int]) -> Tensor:
        made, key = list(shape), name
        if not sharded_exactly and part != (0, shape[dim]):
            made[dim], key = part[1] - part[0], f"{name}/{rank}"
            part = (0, made[dim])
        x = torch.empty(made, dtype=dtype, device=device)
        x.normal_(generator=seeded_generator(seed, key, device))
        x = x.narrow(dim, part[0], part[1] - part[0]).contiguous()
        if name.endswith(".bias"):
            return x.mul_(0.1)
        return x.mul_(0.1).add_(1.0) if len(shape) == 1 else x.mul_(shape[-1] ** -0.5)

    return source


def add_o_columns(weights: Weights, source: Source) -> Weights:
    """The weights with the output projection split by columns as well, from their own source."""
    model, rank, tp_degree = weights.model, weights.rank, weights.tp_degree
    return replace(
        weights,
        layers=tuple(
            replace(held, o_columns_WA=_o_columns(model, source, layer, rank, tp_degree))
            for layer, held in enumerate(weights.layers)
        ),
    )


def load_hf_state_dict(
    model: ModelSpec,
    state_dict: Mapping[str, Tensor],
    *,
    rank: int = 0,
    tp_degree: int = 1,
    device: torch.device,
    with_o_columns: bool = False,
) -> Weights:
    """Take one rank's share of a transformers Llama or Qwen2 `state_dict()`.

    Raises:
        ValueError: a matrix is missing or has another shape than the spec says.
    """
    dtype = torch_dtype(model.torch_dtype)

    def source(name: str, shape: tuple[int, ...], dim: int, part: tuple[int, int]) -> Tensor:
        if name not in state_dict:
            raise ValueError(f"the checkpoint has no {name!r}; is it a {model.architecture} model?")
        x = state_dict[name]
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name!r} must have shape {shape} by the spec of {model.name}, but the checkpoint "
                f"has {tuple(x.shape)}"
            )
        x = x.detach().narrow(dim, part[0], part[1] - part[0])
        return x.to(device=device, dtype=dtype).clone(memory_format=torch.contiguous_format)

    return build_weights(
        model,
        source,
        rank=rank,
        tp_degree=tp_degree,
        device=device,
        with_o_columns=with_o_columns,
    )
