"""Shape keys: what the numbers of a profile row's `shape` mean, and the op they describe.

Keys by kind: gemm `n{N}_k{K}`; gemm_silu the same, N counting both halves; attention and rotary
`q{heads}_kv{heads}_d{head dim}`; all-reduce and all-gather `d{full width}_r{ranks}`; norm and
embedding `d{hidden}`; grouped_gemm and grouped_gemm_silu
`e{experts}_t{experts per token}_n{N}_k{K}`, moe_router `e{experts}_t{experts per token}_d{hidden}`,
moe_combine `t{experts per token}_d{hidden}`, their rows' `tokens` counted before routing; SiLU
(rows of old profiles) `f{ffn}`; sampling `v{vocabulary}`.
"""

from __future__ import annotations

from .op_graph import Op, OpKind, Resource, RowMix

RESOURCE_OF_KIND: dict[OpKind, Resource] = {
    "embedding": "memory",
    "norm": "memory",
    "gemm": "compute",
    "gemm_silu": "compute",
    "grouped_gemm": "compute",
    "grouped_gemm_silu": "compute",
    "moe_router": "memory",
    "moe_combine": "memory",
    "rope_append": "memory",
    "decode_attention": "memory",
    "prefill_attention": "compute",
    "all_reduce": "network",
    "all_gather": "network",
    "sampling": "memory",
}
UNFUSED_PREFIXES = ("cublas", "torch", "triton")
"""Starts of the names of those variants with a SiLU that pass both products through a scratch
buffer; kernels that do the SiLU in their epilogue are of other families."""


def shape_numbers(shape: str) -> tuple[int, ...]:
    """The numbers of a shape key: `q32_kv8_d128` gives (32, 8, 128)."""
    return tuple(int(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in shape.split("_"))


def op_of_shape(kind: OpKind, shape: str, dtype_bytes: int) -> Op:
    """The op that a profile row with this kind and shape is about."""
    numbers = shape_numbers(shape)
    row_elements, weight_elements, kv_elements, flops_per_key, link_elements = 0, 0, 0, 0, 0.0
    routed_share = 1.0
    if kind == "gemm":
        n, k = numbers
        row_elements, weight_elements = n + k, n * k
    elif kind == "gemm_silu":
        n, k = numbers
        row_elements, weight_elements = n // 2 + k, n * k
    elif kind in ("grouped_gemm", "grouped_gemm_silu"):
        experts, per_token, n, k = numbers
        out = n // 2 if kind == "grouped_gemm_silu" else n
        row_elements, weight_elements = per_token * (out + k), experts * n * k
        routed_share = per_token / experts
    elif kind == "moe_router":
        experts, per_token, hidden = numbers
        row_elements, weight_elements = (1 + per_token) * hidden, experts * hidden
    elif kind == "moe_combine":
        per_token, hidden = numbers
        row_elements = (1 + per_token) * hidden
    elif kind in ("decode_attention", "prefill_attention", "rope_append"):
        qo, kv, head_dim = numbers
        row_elements = 2 * (qo + 2 * kv) * head_dim
        if kind != "rope_append":
            row_elements = 2 * qo * head_dim
            kv_elements, flops_per_key = 2 * kv * head_dim, 4 * qo * head_dim
    elif kind == "all_reduce":
        hidden, ranks = numbers
        row_elements, link_elements = 2 * hidden, 2 * (ranks - 1) / ranks * hidden
    elif kind == "all_gather":
        width, ranks = numbers
        row_elements, link_elements = width // ranks + width, (ranks - 1) / ranks * width
    else:
        row_elements = {"norm": 4, "embedding": 2, "sampling": 1}[kind] * numbers[0]
    return Op(
        name=kind,
        kind=kind,
        resource=RESOURCE_OF_KIND[kind],
        shape=shape,
        row_elements=row_elements,
        weight_elements=weight_elements,
        routed_share=routed_share,
        kv_elements_per_key=kv_elements,
        flops_per_key=flops_per_key,
        link_elements_per_row=link_elements,
        dtype_bytes=dtype_bytes,
    )


def moved_bytes(op: Op, mix: RowMix, variant: str) -> float:
    """Bytes that a variant moves through device memory: the op's, and what it adds to them.

    An unfused SiLU behind a GEMM writes both products to its scratch buffer and reads them again.
    """
    is_silu = op.kind in ("gemm_silu", "grouped_gemm_silu")
    if not is_silu or not variant.startswith(UNFUSED_PREFIXES):
        return op.memory_bytes(mix)
    *routed, n, _ = shape_numbers(op.shape)
    per_token = routed[1] if routed else 1
    return op.memory_bytes(mix) + 2 * op.dtype_bytes * per_token * n * op.rows(mix)
