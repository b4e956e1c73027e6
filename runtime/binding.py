"""Binds a nano-op of one layer to a launch without arguments.

A launch holds the kernel of the variant, views of the buffers' rows and the layer's weights; so
the executor's loop neither slices nor looks anything up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from . import kernels
from .batching import DenseBatch
from .buffers import GUARD_ROWS, Buffers
from .kernels import registry
from .kernels.registry import DecodeRows, PrefillRows, Received
from .kv_cache import PagedKvCache
from .op_graph import Op, OpGraph
from .plan import NanoOp
from .schedule import intersects
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
    "attn_all_gather": ("heads_TA",),
    "o_proj_columns": ("o_columns_TW",),
    "o_all_gather": ("o_TD",),
    "ffn_norm": ("residual_TD", "normed_TD"),
    "up_gate": ("act_TF",),
    "down": ("ffn_TD",),
    "router": ("routed_TD", "places_TJ", "gates_TJ", "offsets_TE"),
    "combine": ("ffn_TD",),
    "ffn_all_reduce": ("ffn_TD",),
}
"""Buffers that each op writes, in its own rows alone."""

FIRST_ROW_ONLY = ("offsets_TE",)
"""Buffers of which an op writes the first of its rows only."""

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

_EXPERT_DOWN = "expert_out_TD"
"""What `down` writes instead of ffn_TD where a combine follows."""

_ALL_SMS = 132
"""More blocks than the final sum needs; it runs outside of partitions."""

_GEMMS: dict[str, tuple[str, str, str]] = {
    "kqv": ("normed_TD", "kqv_CD", "qkv_TC"),
    "o_proj": ("attn_TQ", "o_proj_DQ", "o_TD"),
    "o_proj_columns": ("heads_TA", "o_columns_WA", "o_columns_TW"),
    "down": ("act_TF", "down_DF", "ffn_TD"),
}
"""Op -> input buffer, weight, output buffer."""
_GATHERS: dict[str, tuple[str, str]] = {
    "attn_all_gather": ("attn_TQ", "heads_TA"),
    "o_all_gather": ("o_columns_TW", "o_TD"),
}
"""Op -> this rank's columns, all ranks' columns."""


def outputs(op: Op) -> tuple[str, ...]:
    """Buffers that an op of this graph writes, in its own rows alone."""
    return (_EXPERT_DOWN,) if (op.name, op.kind) == ("down", "grouped_gemm") else OUTPUTS[op.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binder:
    """Everything that a launch may hold."""

    graph: OpGraph
    weights: Weights
    cache: PagedKvCache
    batch: DenseBatch
    buffers: Buffers
    groups: Mapping[str, Any] | None
    nano_ops: Sequence[NanoOp]
    """Of the schedule: a norm looks up how the rows it adds were reduced."""
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
                return self._all_reduce(kernel, nano_op)
            case "all_gather":
                return self._all_gather(kernel, nano_op)
            case "moe_router" | "grouped_gemm_silu" | "grouped_gemm" | "moe_combine":
                return self._experts(kernel, nano_op, layer)
            case _:
                raise ValueError(f"{nano_op.op} is not an op of a layer")

    def _rows(self, nano_op: NanoOp) -> dict[str, Tensor]:
        start, end = nano_op.tokens
        return {name: buffer[start:end] for name, buffer in self.buffers.named().items()}

    def _all_reduce(self, kernel: registry.Kernel, nano_op: NanoOp) -> Launch:
        (name,) = OUTPUTS[nano_op.op]
        group = self._group(nano_op)
        if self.leaves_sum(nano_op):
            group = {**group, nano_op.variant: self._inbox(nano_op)}
        x_TD, first_row = self._rows(nano_op)[name], nano_op.tokens[0]
        return partial(kernel, x_TD, group, nano_op.num_sms, first_row)

    def _all_gather(self, kernel: registry.Kernel, nano_op: NanoOp) -> Launch:
        """Rows of memory that peers write are counted with the guard rows before them."""
        columns, gathered = _GATHERS[nano_op.op]
        rows, place = self._rows(nano_op), GUARD_ROWS + nano_op.tokens[0]
        group = self._group(nano_op)
        return partial(kernel, rows[columns], rows[gathered], group, nano_op.num_sms, place)

    def leaves_sum(self, nano_op: NanoOp) -> bool:
        """Whether an all-reduce only fetches the peers' rows, for their reader to sum."""
        is_cuda = self.weights.device.type == "cuda" and self.groups is not None
        is_all_reduce = self.graph.op(nano_op.op).kind == "all_reduce"
        return is_cuda and is_all_reduce and nano_op.variant in registry.LEAVES_SUM

    def _inbox(self, nano_op: NanoOp) -> Any:  # noqa: ANN401 - CUDA only, not imported on a CPU
        from .kernels.copy_engine import inbox_of

        o_TD = self.buffers.o_TD
        return inbox_of(self._group(nano_op), o_TD.shape[0], o_TD.shape[1], o_TD.dtype)

    def _received(self, op: str, tokens: tuple[int, int]) -> Received | None:
        """What the peers sent for rows whose all-reduce `op` leaves the sum to their reader."""
        ends = {op, *(c.ops[-1].name for c in self.graph.alternatives if c.replaces[-1] == op)}
        producers = [n for n in self.nano_ops if n.op in ends and intersects(n.tokens, tokens)]
        leaving = [n for n in producers if self.leaves_sum(n)]
        if not leaving:
            return None
        if len(leaving) < len(producers):
            names = ", ".join(sorted({f"{n.variant} of {n.op}" for n in producers}))
            raise ValueError(
                f"the norm of rows [{tokens[0]}, {tokens[1]}) sums what {op} fetched, so all rows "
                f"there must come from {op} by one of {', '.join(registry.LEAVES_SUM)} or none, "
                f"but they come by {names}: choose one, or cut the norm at the same rows"
            )
        return self._inbox(leaving[0]).received(*tokens)

    def received_buffers(self) -> dict[str, Tensor]:
        """Inboxes of this schedule by name, with rows of the dense batch; the peers write them."""
        leaving = [nano_op for nano_op in self.nano_ops if self.leaves_sum(nano_op)]
        return self._inbox(leaving[0]).named() if leaving else {}

    def final_sums(self) -> list[Launch]:
        """What sums the last layer's rows in ffn_TD, as no norm of a layer reads them."""
        launches: list[Launch] = []
        for nano_op in self.nano_ops:
            if nano_op.op == "ffn_all_reduce" and self.leaves_sum(nano_op):
                from .kernels.symmetric_all_reduce import add_received

                rows = self.buffers.ffn_TD[slice(*nano_op.tokens)]
                received = self._inbox(nano_op).received(*nano_op.tokens)
                launches.append(partial(add_received, rows, received, _ALL_SMS))
        return launches

    def _norm(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch:
        rows, weights = self._rows(nano_op), self.weights.layers[layer]
        if nano_op.op == "attn_norm":
            # The embedding wrote the residual: layer 0 has nothing to add.
            delta_TD = rows["ffn_TD"] if layer > 0 else None
            reduction, weight_D = "ffn_all_reduce", weights.attn_norm_D
        else:
            delta_TD, reduction, weight_D = rows["o_TD"], "attn_all_reduce", weights.ffn_norm_D
        return partial(
            kernel,
            rows["residual_TD"],
            delta_TD,
            weight_D,
            rows["normed_TD"],
            self.graph.model.rms_norm_eps,
            nano_op.num_sms,
            self._received(reduction, nano_op.tokens),
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

    def _experts(self, kernel: registry.Kernel, nano_op: NanoOp, layer: int) -> Launch:
        rows, weights = self._rows(nano_op), self.weights.layers[layer]
        model, offsets_E = self.graph.model, rows["offsets_TE"][0]
        assert weights.router_ED is not None, "a model with experts has a router"
        routed_RD, act_RF, out_RD = (
            rows[name].view(-1, rows[name].shape[1] // (model.num_experts_per_tok or 1))
            for name in ("routed_TD", "act_TF", _EXPERT_DOWN)
        )
        places_TJ, gates_TJ = rows["places_TJ"], rows["gates_TJ"]
        arguments: tuple[Any, ...]
        match nano_op.op:
            case "router":
                arguments = (rows["normed_TD"], weights.router_ED, routed_RD, offsets_E)
                arguments = (*arguments, places_TJ, gates_TJ)
            case "up_gate":
                scratch_R2F = rows["up_gate_T2F"].view(-1, 2 * act_RF.shape[1])
                arguments = (routed_RD, weights.up_gate_2FD, offsets_E, scratch_R2F, act_RF)
            case "down":
                arguments = (act_RF, weights.down_DF, offsets_E, out_RD)
            case _:
                arguments = (out_RD, places_TJ, gates_TJ, rows["ffn_TD"])
        return partial(kernel, *arguments, nano_op.num_sms)

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
        is_decode = nano_op.op == "decode_attention"
        select = self.batch.decode_rows if is_decode else self.batch.prefill_rows
        if self.batch.has_live_rows:
            return self._live_attention(kernel, partial(select, nano_op.tokens), nano_op, layer)
        if key not in self.attention_rows:
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

    def _live_attention(
        self,
        kernel: registry.Kernel,
        find_rows: Callable[[], DecodeRows | PrefillRows | None],
        nano_op: NanoOp,
        layer: int,
    ) -> Launch:
        k_pages_PGBH, v_pages_PGBH = self.cache.k_pages[layer], self.cache.v_pages[layer]
        qkv_TC, attn_TQ, heads = self.buffers.qkv_TC, self.buffers.attn_TQ, self.weights.heads

        def launch() -> None:
            rows = find_rows()
            if rows is not None:
                kernel(qkv_TC, k_pages_PGBH, v_pages_PGBH, rows, attn_TQ, heads, nano_op.num_sms)

        return launch

    def _group(self, nano_op: NanoOp) -> Any:  # noqa: ANN401
        if self.groups is None:
            return None
        if nano_op.lane not in self.groups:
            raise ValueError(
                f"{nano_op.op} runs on lane {nano_op.lane!r}, which has no process group; known: "
                f"{', '.join(self.groups)}"
            )
        return self.groups[nano_op.lane]
