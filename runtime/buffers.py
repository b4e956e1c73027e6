"""Activation buffers of one dense batch, between guard rows that nothing may touch.

With experts, a row of the dense batch is routed J times: what lies between router and combine has J
places for each of its rows, next to each other. Rows [a, b) so own J (b - a) routed rows, in which
the router sorts them by expert.

Where rows take the all-gather form, peers write `heads_TA` and `o_TD`: both are then rows of the
memory that the collectives of the executor's lanes ask for (`gather_buffer.output_rows`).

Shape legend: T rows of the dense batch, D hidden, C = (qo + 2 kv) x head dim, Q = qo heads x head
dim, F ffn width, E experts, J experts of a row (1 without), W hidden columns; all of one
tensor-parallel rank. A the heads of all ranks x head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .weights import Weights, torch_dtype

GUARD_ROWS = 16
"""Rows before and after each buffer; 16 keep every buffer's start aligned for wide loads."""


NewRows = Callable[[str, int, int], Tensor]
"""(name, rows, width) -> memory for rows that an all-gather gives; on all ranks at once."""


def poison(dtype: torch.dtype) -> float:
    """What no kernel writes: NaN, and -1 where integers are kept (places, ends of experts)."""
    return float("nan") if dtype.is_floating_point else -1


def is_poison(x: Tensor) -> Tensor:
    """Where a tensor holds its poison."""
    return x.isnan() if x.is_floating_point() else x == -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """One buffer per kind of activation, reused by every layer."""

    residual_TD: Tensor
    normed_TD: Tensor
    qkv_TC: Tensor
    attn_TQ: Tensor
    o_TD: Tensor
    """Output projection, then its sum over the ranks; or what all of them have gathered."""
    up_gate_T2F: Tensor
    """Scratch of the `up_gate` variants that are not fused, J rows each."""
    act_TF: Tensor
    """J rows each."""
    ffn_TD: Tensor
    """Down projection, with experts the combined one; then its sum over the ranks."""
    routed_TD: Tensor | None = None
    """With experts: what the router sends to them, J rows each."""
    expert_out_TD: Tensor | None = None
    """With experts: down projection before the combine, J rows each."""
    places_TJ: Tensor | None = None
    """With experts, int32: where the row went among the routed rows of its nano-op."""
    gates_TJ: Tensor | None = None
    """With experts, fp32: weight of each of its experts."""
    offsets_TE: Tensor | None = None
    """With experts, int32: where each expert's rows end, in the first row of each nano-op."""
    heads_TA: Tensor | None = None
    """All-gather form: attention output of all ranks."""
    o_columns_TW: Tensor | None = None
    """All-gather form: this rank's columns of the output projection."""

    @classmethod
    def allocate(cls, weights: Weights, num_rows: int) -> Buffers:
        """Poisoned buffers for `num_rows` rows."""
        model, tp_degree = weights.model, weights.tp_degree
        hidden, ffn = model.hidden_size, model.intermediate_size // tp_degree
        qo, kv = weights.heads.qo_size, weights.heads.kv_size
        dtype, device = torch_dtype(model.torch_dtype), weights.device
        experts, times = model.num_local_experts, model.num_experts_per_tok or 1

        def rows(width: int, dtype: torch.dtype = dtype) -> Tensor:
            shape = (num_rows + 2 * GUARD_ROWS, width)
            guarded = torch.full(shape, poison(dtype), dtype=dtype, device=device)
            return guarded[GUARD_ROWS : GUARD_ROWS + num_rows]

        return cls(
            residual_TD=rows(hidden),
            normed_TD=rows(hidden),
            qkv_TC=rows(qo + 2 * kv),
            attn_TQ=rows(qo),
            o_TD=rows(hidden),
            up_gate_T2F=rows(times * 2 * ffn),
            act_TF=rows(times * ffn),
            ffn_TD=rows(hidden),
            routed_TD=rows(times * hidden) if experts else None,
            expert_out_TD=rows(times * hidden) if experts else None,
            places_TJ=rows(times, torch.int32) if experts else None,
            gates_TJ=rows(times, torch.float32) if experts else None,
            offsets_TE=rows(experts, torch.int32) if experts else None,
        )

    def with_gathered(self, weights: Weights, new_rows: NewRows) -> Buffers:
        """These with what the all-gather form needs; collective, and poisoned."""
        model, num_rows = weights.model, self.residual_TD.shape[0]
        dtype = self.residual_TD.dtype

        def rows(name: str, width: int) -> Tensor:
            guarded = new_rows(name, num_rows + 2 * GUARD_ROWS, width)
            return guarded.fill_(poison(dtype))[GUARD_ROWS : GUARD_ROWS + num_rows]

        columns = model.hidden_size // weights.tp_degree
        shape = (num_rows + 2 * GUARD_ROWS, columns)
        own = torch.full(shape, poison(dtype), dtype=dtype, device=weights.device)
        return replace(
            self,
            heads_TA=rows("heads_TA", model.qo_size),
            o_columns_TW=own[GUARD_ROWS : GUARD_ROWS + num_rows],
            o_TD=rows("o_TD", model.hidden_size),
        )

    def named(self) -> dict[str, Tensor]:
        """Buffers by name, those that the model has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: buffer for name, buffer in values.items() if buffer is not None}

    def guarded(self) -> dict[str, Tensor]:
        """Buffers by name, each with the guard rows before and after it."""
        return {name: _guarded(buffer) for name, buffer in self.named().items()}

    def poison(self) -> None:
        """Poison all rows, guard rows included."""
        for guarded in self.guarded().values():
            guarded.fill_(poison(guarded.dtype))

    def broken_guards(self) -> tuple[str, ...]:
        """Names of buffers whose guard rows no longer hold the poison."""
        return tuple(
            name
            for name, guarded in self.guarded().items()
            if not is_poison(guarded[:GUARD_ROWS]).all()
            or not is_poison(guarded[-GUARD_ROWS:]).all()
        )


def _guarded(buffer: Tensor) -> Tensor:
    num_rows, width = buffer.shape
    first = buffer.storage_offset() - GUARD_ROWS * width
    assert first >= 0, "buffers are views of their guarded storage"
    return buffer.as_strided((num_rows + 2 * GUARD_ROWS, width), (width, 1), first)
