"""Operations of one serving iteration, their cost in FLOPs and bytes, and who waits for whom.

The graph is per tensor-parallel rank: shapes are shards. One layer repeats `num_layers` times
between a prologue (embedding) and an epilogue (final norm, LM head, sampling).

Notation (paper arXiv 2408.12757 section 3.1 -> here)
    B_dense     rows of the dense batch: every decoding request gives one row, every prefilling
                request as many rows as it has prompt tokens in this iteration
    D_model     hidden_size;  L  num_layers;  S_type  dtype_bytes;  N_GPU  tp_degree
    KQV, O, UG, D        kqv, o_proj, up_gate (with its SiLU), down
    DecAttn, PfAttn      decode_attention, prefill_attention
    Attn.AR, UGD.AR      attn_all_reduce, ffn_all_reduce (the 2 x AR form)

With experts, UG and D are grouped GEMMs over rows that `router` has sorted by expert, each row as
often as it is routed, and `combine` adds up a row's results. Every rank holds a slice of every
expert, and the all-reduce follows the combine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..search_spaces.schema import ModelSpec

Resource = Literal["compute", "memory", "network"]
OpKind = Literal[
    "embedding",
    "norm",
    "gemm",
    "gemm_silu",
    "grouped_gemm",
    "grouped_gemm_silu",
    "moe_router",
    "moe_combine",
    "rope_append",
    "decode_attention",
    "prefill_attention",
    "silu_mul",
    "all_reduce",
    "all_gather",
    "sampling",
]
"""`silu_mul` is the kind of rows in profiles from before `gemm_silu`; no op of a graph has it,
nor `all_gather` yet."""
GEMM_KINDS: tuple[OpKind, ...] = ("gemm", "gemm_silu", "grouped_gemm", "grouped_gemm_silu")
"""Kinds that multiply rows by weights, large enough to be bound by it."""
DENSE_GEMM_KINDS: tuple[OpKind, ...] = ("gemm", "gemm_silu")
"""Those among them in which every row meets all weights."""
Reach = Literal["range", "prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMix:
    """What a range of dense-batch rows holds; fractional counts describe an average batch."""

    decode_tokens: float
    prefill_tokens: float
    decode_context_tokens: float
    """Mean KV length that one decode row reads."""
    prefill_context_tokens: float
    """Mean number of keys that one prefill row attends to (causal: half the prompt)."""

    @property
    def tokens(self) -> float:
        """Rows in all."""
        return self.decode_tokens + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class Dependency:
    """An op waits for the nano-ops of `op`, `layer_distance` layers back.

    `range`: those whose token ranges intersect its own. `prefix`: also those of all earlier rows,
    because a prefill that straddles nano-batches reads the keys its own earlier rows appended.
    """

    op: str
    layer_distance: int = 0
    reach: Reach = "range"


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation on one rank. `rows_in`/`rows_out` widths are elements per row."""

    name: str
    kind: OpKind
    resource: Resource
    """The resource that bounds it at large batches."""
    shape: str
    """Key of its profile rows: equal shapes of different models share measurements."""
    dependencies: tuple[Dependency, ...] = ()
    row_elements: int = 0
    """Activation elements read and written per row."""
    weight_elements: int = 0
    routed_share: float = 1.0
    """Part of the weights that one row meets: experts per token of all experts (grouped GEMM)."""
    kv_elements_per_key: int = 0
    """K and V elements that one row reads per key attended (attention)."""
    flops_per_key: int = 0
    """FLOPs of one row per key attended (attention)."""
    link_elements_per_row: float = 0.0
    """Elements sent per row over the interconnect, one way (collectives)."""
    dtype_bytes: int = 2

    def rows(self, mix: RowMix) -> float:
        """Rows of the mix that this op works on."""
        if self.kind == "decode_attention":
            return mix.decode_tokens
        if self.kind == "prefill_attention":
            return mix.prefill_tokens
        return mix.tokens

    def context(self, mix: RowMix) -> float:
        """Mean keys per row for attention, 0 for everything else."""
        if self.kind == "decode_attention":
            return mix.decode_context_tokens
        if self.kind == "prefill_attention":
            return mix.prefill_context_tokens
        return 0.0

    def flops(self, mix: RowMix) -> float:
        """Floating-point operations: 2 per weight a row meets, 4 x heads x head_dim per key."""
        rows = self.rows(mix)
        multiplies = self.kind in (*GEMM_KINDS, "moe_router")
        gemm = 2.0 * self.weight_elements * self.routed_share * rows if multiplies else 0.0
        # A ring all-reduce adds each element that it receives in its first half.
        adds = self.link_elements_per_row * rows / 2 if self.kind == "all_reduce" else 0.0
        return gemm + self.flops_per_key * rows * self.context(mix) + adds

    def memory_bytes(self, mix: RowMix) -> float:
        """Bytes through device memory: each operand read once, each result written once.

        What an unfused variant moves in all is `op_shapes.moved_bytes`.
        A chunk of prefill rows shares one pass over its keys, so its keys are counted once per
        128 rows; a decode row reads its own.
        """
        rows = self.rows(mix)
        if rows == 0:
            return 0.0
        readers = rows / 128 if self.kind == "prefill_attention" else rows
        keys = self.kv_elements_per_key * readers * self.context(mix)
        return self.dtype_bytes * (self.weight_elements + self.row_elements * rows + keys)

    def link_bytes(self, mix: RowMix) -> float:
        """Bytes this rank sends, one way.

        Of the data that every rank holds afterwards, a ring all-reduce sends 2 (N-1)/N and an
        all-gather (N-1)/N: each rank's 1/N to N - 1 peers.
        """
        return self.dtype_bytes * self.link_elements_per_row * self.rows(mix)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGraph:
    """All operations of one iteration on one tensor-parallel rank."""

    model: ModelSpec
    tp_degree: int
    prologue: tuple[Op, ...]
    layer: tuple[Op, ...]
    epilogue: tuple[Op, ...]

    @classmethod
    def build(cls, model: ModelSpec, tp_degree: int = 1) -> OpGraph:
        """The graph with two all-reduces a layer when `tp_degree` > 1.

        Raises:
            ValueError: heads, FFN or vocabulary do not divide by `tp_degree`.
        """
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(model, name) % tp_degree:
                raise ValueError(
                    f"`{name}` must be a multiple of the tensor-parallel degree, but got "
                    f"{name}={getattr(model, name)}, tp_degree={tp_degree} for {model.name}"
                )
        return cls(
            model=model,
            tp_degree=tp_degree,
            prologue=(_row_op("embedding", "embedding", model, 2 * model.hidden_size),),
            layer=_layer_ops(model, tp_degree),
            epilogue=_epilogue_ops(model, tp_degree),
        )

    @property
    def num_layers(self) -> int:
        """How often the layer repeats."""
        return self.model.num_hidden_layers

    def op(self, name: str) -> Op:
        """The layer op of this name.

        Raises:
            KeyError: no such op; the message lists the known ones.
        """
        for op in self.layer:
            if op.name == name:
                return op
        raise KeyError(f"unknown op {name!r}; this graph has {', '.join(self.op_names)}")

    @property
    def op_names(self) -> tuple[str, ...]:
        """Names of the layer's ops, in sequential order."""
        return tuple(op.name for op in self.layer)


def _row_op(
    name: str,
    kind: OpKind,
    model: ModelSpec,
    row_elements: int,
    dependencies: tuple[Dependency, ...] = (),
    shape: str = "",
) -> Op:
    return Op(
        name=name,
        kind=kind,
        resource="memory",
        shape=shape or f"d{model.hidden_size}",
        dependencies=dependencies,
        row_elements=row_elements,
        dtype_bytes=model.dtype_bytes,
    )


def _gemm(name: str, n: int, k: int, model: ModelSpec, *dependencies: Dependency) -> Op:
    return Op(
        name=name,
        kind="gemm",
        resource="compute",
        shape=f"n{n}_k{k}",
        dependencies=dependencies,
        row_elements=n + k,
        weight_elements=n * k,
        dtype_bytes=model.dtype_bytes,
    )


def _gemm_silu(name: str, ffn: int, k: int, model: ModelSpec, *dependencies: Dependency) -> Op:
    """silu(x W_gate^T) * (x W_up^T): both products, of which only `ffn` elements a row leave."""
    return Op(
        name=name,
        kind="gemm_silu",
        resource="compute",
        shape=f"n{2 * ffn}_k{k}",
        dependencies=dependencies,
        row_elements=k + ffn,
        weight_elements=2 * ffn * k,
        dtype_bytes=model.dtype_bytes,
    )


def _routed(
    name: str, kind: OpKind, n: int, k: int, out: int, model: ModelSpec, dependency: Dependency
) -> Op:
    """Each row by the [n, k] weights of those experts that it goes to; `out` elements leave."""
    experts, per_token = model.num_local_experts or 1, model.num_experts_per_tok or 1
    return Op(
        name=name,
        kind=kind,
        resource="compute",
        shape=f"e{experts}_t{per_token}_n{n}_k{k}",
        dependencies=(dependency,),
        row_elements=per_token * (k + out),
        weight_elements=experts * n * k,
        routed_share=per_token / experts,
        dtype_bytes=model.dtype_bytes,
    )


def _expert_ops(model: ModelSpec, ffn: int) -> list[Op]:
    """What stands in the place of up/gate and down; the rank has `ffn` columns of each expert.

    The combine reads the router's choice too, which the two GEMMs between them wait for.
    """
    hidden, per_token = model.hidden_size, model.num_experts_per_tok or 1
    moved, on = (1 + per_token) * hidden, Dependency
    key = f"t{per_token}_d{hidden}"
    router = _row_op(
        "router",
        "moe_router",
        model,
        moved,
        (on("ffn_norm"),),
        f"e{model.num_local_experts}_{key}",
    )
    return [
        replace(router, weight_elements=model.router_parameters),
        _routed("up_gate", "grouped_gemm_silu", 2 * ffn, hidden, ffn, model, on("router")),
        _routed("down", "grouped_gemm", hidden, ffn, hidden, model, on("up_gate")),
        _row_op("combine", "moe_combine", model, moved, (on("down"),), key),
    ]


def _attention(
    name: str,
    kind: OpKind,
    resource: Resource,
    model: ModelSpec,
    tp_degree: int,
    *dependencies: Dependency,
) -> Op:
    qo, kv = model.num_attention_heads // tp_degree, model.num_key_value_heads // tp_degree
    return Op(
        name=name,
        kind=kind,
        resource=resource,
        shape=f"q{qo}_kv{kv}_d{model.head_dim}",
        dependencies=dependencies,
        row_elements=2 * qo * model.head_dim,
        kv_elements_per_key=2 * kv * model.head_dim,
        flops_per_key=4 * qo * model.head_dim,
        dtype_bytes=model.dtype_bytes,
    )


def _all_reduce(name: str, model: ModelSpec, tp_degree: int, dependency: Dependency) -> Op:
    return Op(
        name=name,
        kind="all_reduce",
        resource="network",
        shape=f"d{model.hidden_size}_r{tp_degree}",
        dependencies=(dependency,),
        row_elements=2 * model.hidden_size,
        link_elements_per_row=2 * (tp_degree - 1) / tp_degree * model.hidden_size,
        dtype_bytes=model.dtype_bytes,
    )


def _layer_ops(model: ModelSpec, tp_degree: int) -> tuple[Op, ...]:
    hidden = model.hidden_size
    qo, kv = model.qo_size // tp_degree, model.kv_size // tp_degree
    ffn = model.intermediate_size // tp_degree
    attention_shape = (
        f"q{model.num_attention_heads // tp_degree}"
        f"_kv{model.num_key_value_heads // tp_degree}_d{model.head_dim}"
    )
    is_parallel = tp_degree > 1
    attention_output = "attn_all_reduce" if is_parallel else "o_proj"
    on = Dependency
    feed_forward = (
        _expert_ops(model, ffn)
        if model.num_local_experts
        else [
            _gemm_silu("up_gate", ffn, hidden, model, on("ffn_norm")),
            _gemm("down", hidden, ffn, model, on("up_gate")),
        ]
    )
    last = feed_forward[-1].name
    ffn_output = "ffn_all_reduce" if is_parallel else last
    ops = [
        _row_op("attn_norm", "norm", model, 4 * hidden, (on(ffn_output, layer_distance=1),)),
        _gemm("kqv", qo + 2 * kv, hidden, model, on("attn_norm")),
        _row_op(
            "rope_append", "rope_append", model, 2 * (qo + 2 * kv), (on("kqv"),), attention_shape
        ),
        _attention(
            "decode_attention", "decode_attention", "memory", model, tp_degree, on("rope_append")
        ),
        _attention(
            "prefill_attention",
            "prefill_attention",
            "compute",
            model,
            tp_degree,
            on("rope_append", reach="prefix"),
        ),
        _gemm("o_proj", hidden, qo, model, on("decode_attention"), on("prefill_attention")),
        _all_reduce("attn_all_reduce", model, tp_degree, on("o_proj")),
        _row_op("ffn_norm", "norm", model, 4 * hidden, (on(attention_output),)),
        *feed_forward,
        _all_reduce("ffn_all_reduce", model, tp_degree, on(last)),
    ]
    return tuple(op for op in ops if is_parallel or op.kind != "all_reduce")


def _epilogue_ops(model: ModelSpec, tp_degree: int) -> tuple[Op, ...]:
    vocab = -(-model.vocab_size // tp_degree)
    return (
        _row_op("final_norm", "norm", model, 4 * model.hidden_size),
        _gemm("lm_head", vocab, model.hidden_size, model, Dependency("final_norm")),
        _row_op("sampling", "sampling", model, vocab, (Dependency("lm_head"),), f"v{vocab}"),
    )
