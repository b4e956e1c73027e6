"""Binds a nano-op of one layer to a launch without arguments.

A launch holds the kernel of the variant, views of the buffers' rows and the layer's weights; so
the executor's loop neither slices nor looks anything up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from . import kernels
from .batching import DenseBatch
from .buffers import Buffers
from .kernels import registry
from .kernels.registry import DecodeRows, PrefillRows
from .kv_cache import PagedKvCache
from .op_graph import OpGraph
from .plan import NanoOp
from .weights import Weights

Launch = Callable[[], None]

OUTPUTS: dict[str, tuple[str, ...]] = {
    "attn_norm": ("residual_TD", "normed_TD"),
    "kqv": ("qkv_TC",),
    "rope_append": ("qkv_TC",),
    "decode_attention": ("attn_TQ",),
    "prefill_attention": ("attn_TQ",),
    "o_proj": ("o_TD",),
    "attn_all_reduce": ("o_TD",),
    "ffn_norm": ("residual_TD", "normed_TD"),
    "up_gate": ("act_TF",),
    "down": ("ffn_TD",),
    "ffn_all_reduce": ("ffn_TD",),
}
"""Buffers that each op writes, in its own rows alone."""

IN_PLACE: dict[str, tuple[str, ...]] = {
    "attn_norm": ("residual_TD",),
    "rope_append": ("qkv_TC",),
    "attn_all_reduce": ("o_TD",),
    "ffn_norm": ("residual_TD",),
    "ffn_all_reduce": ("ffn_TD",),
}
"""Buffers among them that the op also reads."""

SCRATCH: dict[str, tuple[str, ...]] = {"up_gate": ("up_gate_T2F",)}
"""Buffers that the op may write in its own rows and that no other op reads."""

_GEMMS: dict[str, tuple[str, str, str]] = {
    "kqv": ("normed_TD", "kqv_CD", "qkv_TC"),
    "o_proj": ("attn_TQ", "o_proj_DQ", "o_TD"),
    "down": ("act_TF", "down_DF", "ffn_TD"),
}
"""Op -> input buffer, weight, output buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binder:
    """Everything that a launch may hold."""

    graph: OpGraph
    weights: Weights
    cache: PagedKvCache
    batch: DenseBatch
    buffers: Buffers
    groups: Mapping[str, Any] | None
    attention_rows: dict[tuple[str, tuple[int, int]], DecodeRows | PrefillRows | None] = field(
        default_factory=dict[tuple[str, tuple[int, int]], "DecodeRows | PrefillRows | None"]
    )
    """Row metadata by op and range: all layers share it."""

    def __post_init__(self) -> None:
        kernels.load(self.weights.device.type)

    def bind(self, nano_op: NanoOp, layer: int) -> Launch | None:
        """The launch of a nano-op, or None when its range has no rows of its kind.

        Raises:
            ValueError: the device has no such variant, or the lane no group.
        """
        kind = self.graph.op(nano_op.op).kind
        kernel = registry.kernel(kind, nano_op.variant, self.weights.device.type)
        match kind:
            case "norm":
                return self._norm(kernel, nano_op, layer)
            case "gemm":
                return self._gemm(kernel, nano_op, layer)
            case "gemm_silu":
                return self._gemm_silu(kernel, nano_op, layer)
            case "rope_append":
                return self._rope_append(kernel, nano_op, layer)
            case "decode_attention" | "prefill_attention":
                return self._attention(kernel, nano_op, layer)
            case "all_reduce":
                (name,) = OUTPUTS[nano_op.op]
                return partial(
                    kernel, self._rows(nano_op)[name], self._group(nano_op), nano_op.num_sms
                )
            case _:
                raise ValueError(f"{nano_op.op} is not an op of a layer")

    def _rows(self, nano_op: NanoOp) -> dict[str, Tensor]:
        start, end = nano_op.tokens
        return {name: buffer[start:end] for name, buffer in self.buffers.named().items()}

    def _norm(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch:
        rows, weights = self._rows(nano_op), self.weights.layers[layer]
        if nano_op.op == "attn_norm":
            # The embedding wrote the residual: layer 0 has nothing to add.
            delta_TD = rows["ffn_TD"] if layer > 0 else None
            weight_D = weights.attn_norm_D
        else:
            delta_TD, weight_D = rows["o_TD"], weights.ffn_norm_D
        return partial(
            kernel,
            rows["residual_TD"],
            delta_TD,
            weight_D,
            rows["normed_TD"],
            self.graph.model.rms_norm_eps,
            nano_op.num_sms,
        )

    def _gemm(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch:
        rows, weights = self._rows(nano_op), self.weights.layers[layer]
        x, weight, out = _GEMMS[nano_op.op]
        bias_C = weights.kqv_bias_C if nano_op.op == "kqv" else None
        return partial(
            kernel, rows[x], getattr(weights, weight), bias_C, rows[out], nano_op.num_sms
        )

    def _gemm_silu(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch:
        rows = self._rows(nano_op)
        weight_2FD = self.weights.layers[layer].up_gate_2FD
        scratch_T2F, act_TF = rows["up_gate_T2F"], rows["act_TF"]
        return partial(kernel, rows["normed_TD"], weight_2FD, scratch_T2F, act_TF, nano_op.num_sms)

    def _rope_append(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch:
        start, end = nano_op.tokens
        return partial(
            kernel,
            self.buffers.qkv_TC[start:end],
            self.batch.positions_T[start:end],
            self.batch.slots_T[start:end],
            self.weights.cos_sin_LH,
            self.cache.k_pages[layer],
            self.cache.v_pages[layer],
            self.weights.heads,
            nano_op.num_sms,
        )

    def _attention(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch | None:
        key = (nano_op.op, nano_op.tokens)
        if key not in self.attention_rows:
            is_decode = nano_op.op == "decode_attention"
            select = self.batch.decode_rows if is_decode else self.batch.prefill_rows
            self.attention_rows[key] = select(nano_op.tokens)
        rows = self.attention_rows[key]
        if rows is None:
            return None
        return partial(
            kernel,
            self.buffers.qkv_TC,
            self.cache.k_pages[layer],
            self.cache.v_pages[layer],
            rows,
            self.buffers.attn_TQ,
            self.weights.heads,
            nano_op.num_sms,
        )

    def _group(self, nano_op: NanoOp) -> Any:  # noqa: ANN401
        if self.groups is None:
            return None
        if nano_op.lane not in self.groups:
            raise ValueError(
                f"{nano_op.op} runs on lane {nano_op.lane!r}, which has no process group; known: "
                f"{', '.join(self.groups)}"
            )
        return self.groups[nano_op.lane]
