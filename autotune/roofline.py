"""Time of one op if nothing but the datasheet limited it, on a share of the SMs.

Used where nothing was measured, and to carry a measured utilisation from one shape to another.
Assumptions, all of them optimistic or plain:

    compute  scales with the share of the SMs
    memory   half of the SMs can draw the whole bandwidth (on an H200, 64 of 132 SMs reach 3.8 of
             4.4 TB/s), fewer a proportional part
    network  16 SMs can fill the link (NCCL on two H200s: 16 blocks within 11 % of the default)
"""

from __future__ import annotations

from math import log

from ..runtime.op_graph import Op, OpKind, Resource, RowMix
from ..search_spaces.schema import HardwareSpec

MEMORY_SATURATION = 2.0
"""Share of the bandwidth per share of the SMs, until it is all taken."""
LINK_SATURATION_SMS = 16

RESOURCE_OF_KIND: dict[OpKind, Resource] = {
    "embedding": "memory",
    "norm": "memory",
    "gemm": "compute",
    "rope_append": "memory",
    "decode_attention": "memory",
    "prefill_attention": "compute",
    "silu_mul": "memory",
    "all_reduce": "network",
    "sampling": "memory",
}


def memory_share(num_sms: int, hardware: HardwareSpec) -> float:
    """Part of the memory bandwidth that a share of the SMs can draw."""
    return min(1.0, MEMORY_SATURATION * num_sms / hardware.num_sms)


def roofline_us(op: Op, mix: RowMix, num_sms: int, hardware: HardwareSpec, dtype: str) -> float:
    """Time at the datasheet's peaks on `num_sms` SMs, in us."""
    compute_s = op.flops(mix) / (hardware.peak(dtype) * num_sms / hardware.num_sms)
    memory_s = op.memory_bytes(mix) / (
        hardware.memory_bytes_per_s * memory_share(num_sms, hardware)
    )
    link_bytes = op.link_bytes(mix)
    if link_bytes == 0:
        return 1e6 * max(compute_s, memory_s)
    link_share = min(1.0, num_sms / LINK_SATURATION_SMS)
    link_s = link_bytes / (hardware.link_bytes_per_s * link_share)
    return 1e6 * max(memory_s, link_s)


def shape_numbers(shape: str) -> tuple[int, ...]:
    """The numbers of a shape key: `q32_kv8_d128` gives (32, 8, 128)."""
    return tuple(int(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in shape.split("_"))


def shape_distance(a: str, b: str) -> float:
    """How different two shapes of one kind are: sum of |log ratio| of their numbers."""
    pairs = zip(shape_numbers(a), shape_numbers(b), strict=True)
    return sum(abs(log(x / y)) for x, y in pairs)


def op_of_shape(kind: OpKind, shape: str, dtype_bytes: int) -> Op:
    """The op that a profile row with this kind and shape is about."""
    numbers = shape_numbers(shape)
    row_elements, weight_elements, kv_elements, flops_per_key, link_elements = 0, 0, 0, 0, 0.0
    if kind == "gemm":
        n, k = numbers
        row_elements, weight_elements = n + k, n * k
    elif kind in ("decode_attention", "prefill_attention", "rope_append"):
        qo, kv, head_dim = numbers
        row_elements = 2 * (qo + 2 * kv) * head_dim
        if kind != "rope_append":
            row_elements = 2 * qo * head_dim
            kv_elements, flops_per_key = 2 * kv * head_dim, 4 * qo * head_dim
    elif kind == "all_reduce":
        hidden, ranks = numbers
        row_elements, link_elements = 2 * hidden, 2 * (ranks - 1) / ranks * hidden
    else:
        row_elements = {"norm": 4, "silu_mul": 3, "embedding": 2, "sampling": 1}[kind] * numbers[0]
    return Op(
        name=kind,
        kind=kind,
        resource=RESOURCE_OF_KIND[kind],
        shape=shape,
        row_elements=row_elements,
        weight_elements=weight_elements,
        kv_elements_per_key=kv_elements,
        flops_per_key=flops_per_key,
        link_elements_per_row=link_elements,
        dtype_bytes=dtype_bytes,
    )
