"""The ops of a model on one tensor-parallel rank: shapes are shards.

Notation (paper arXiv 2408.12757 -> here)
    D_model     hidden_size;  N_GPU  tp_degree
    KQV, O, UG, D        kqv, o_proj or o_proj_columns, up_gate (with its SiLU), down
    DecAttn, PfAttn      decode_attention, prefill_attention
    Attn.AR, UGD.AR      attn_all_reduce, ffn_all_reduce
    Attn.AG, O.AG        attn_all_gather, o_all_gather

With experts, UG and D are grouped GEMMs over rows that `router` has sorted by expert, each row as
often as it is routed, and `combine` adds up a row's results. Every rank holds a slice of every
expert, and the all-reduce follows the combine.
"""

from __future__ import annotations

from dataclasses import replace

from ..search_spaces.schema import ModelSpec
from .op import Dependency, Op, OpKind, Resource


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


def _all_gather(
    name: str, width: int, model: ModelSpec, tp_degree: int, *dependencies: Dependency
) -> Op:
    """Every rank's `width` / N columns of a row, next to each other on all of them."""
    return Op(
        name=name,
        kind="all_gather",
        resource="network",
        shape=f"d{width}_r{tp_degree}",
        dependencies=dependencies,
        row_elements=width // tp_degree + width,
        link_elements_per_row=(tp_degree - 1) / tp_degree * width,
        dtype_bytes=model.dtype_bytes,
    )


def prologue_ops(model: ModelSpec) -> tuple[Op, ...]:
    """What an iteration does before its layers."""
    return (_row_op("embedding", "embedding", model, 2 * model.hidden_size),)


def layer_ops(model: ModelSpec, tp_degree: int) -> tuple[Op, ...]:
    """A layer in sequential order, with two all-reduces where there are several ranks."""
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


def gather_ops(model: ModelSpec, tp_degree: int) -> tuple[Op, ...]:
    """The output projection split by columns: heads of all ranks in, hidden / N columns out.

    Stands for `o_proj`, which is split by rows (its own heads in, partial sums of all columns
    out), and the all-reduce behind it: as many FLOPs and weights. All-gathers send what they give
    once where an all-reduce sends it twice, and there are two of them.
    """
    hidden, qo, on = model.hidden_size, model.qo_size, Dependency
    return (
        _all_gather(
            "attn_all_gather",
            qo,
            model,
            tp_degree,
            on("decode_attention"),
            on("prefill_attention"),
        ),
        _gemm("o_proj_columns", hidden // tp_degree, qo, model, on("attn_all_gather")),
        _all_gather("o_all_gather", hidden, model, tp_degree, on("o_proj_columns")),
    )


def epilogue_ops(model: ModelSpec, tp_degree: int) -> tuple[Op, ...]:
    """What an iteration does behind its layers."""
    vocab = -(-model.vocab_size // tp_degree)
    return (
        _row_op("final_norm", "norm", model, 4 * model.hidden_size),
        _gemm("lm_head", vocab, model.hidden_size, model, Dependency("final_norm")),
        _row_op("sampling", "sampling", model, vocab, (Dependency("lm_head"),), f"v{vocab}"),
    )
