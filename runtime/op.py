"""One operation on one rank: its cost in FLOPs and bytes as a function of the rows it works on.

The ops of a model are built in `layer_ops.py`; `op_graph.py` puts them in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    "all_reduce",
    "all_gather",
    "sampling",
]
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
