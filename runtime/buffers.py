"""Activation buffers of one dense batch, between guard rows that nothing may touch.

Shape legend: T rows of the dense batch, D hidden, C = (qo + 2 kv) x head dim, Q = qo heads x head
dim, F ffn width; all of one tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .weights import Weights, torch_dtype

GUARD_ROWS = 16
"""Rows before and after each buffer; 16 keep every buffer's start aligned for wide loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """One buffer per kind of activation, reused by every layer."""

    residual_TD: Tensor
    normed_TD: Tensor
    qkv_TC: Tensor
    attn_TQ: Tensor
    o_TD: Tensor
    """Output projection, then its sum over the ranks."""
    up_gate_T2F: Tensor
    """Scratch of the `up_gate` variants that are not fused."""
    act_TF: Tensor
    ffn_TD: Tensor
    """Down projection, then its sum over the ranks."""

    @classmethod
    def allocate(cls, weights: Weights, num_rows: int) -> Buffers:
        """Poisoned buffers for `num_rows` rows."""
        model, tp_degree = weights.model, weights.tp_degree
        hidden, ffn = model.hidden_size, model.intermediate_size // tp_degree
        qo, kv = weights.heads.qo_size, weights.heads.kv_size
        dtype, device = torch_dtype(model.torch_dtype), weights.device

        def rows(width: int) -> Tensor:
            shape = (num_rows + 2 * GUARD_ROWS, width)
            guarded = torch.full(shape, float("nan"), dtype=dtype, device=device)
            return guarded[GUARD_ROWS : GUARD_ROWS + num_rows]

        return cls(
            residual_TD=rows(hidden),
            normed_TD=rows(hidden),
            qkv_TC=rows(qo + 2 * kv),
            attn_TQ=rows(qo),
            o_TD=rows(hidden),
            up_gate_T2F=rows(2 * ffn),
            act_TF=rows(ffn),
            ffn_TD=rows(hidden),
        )

    def named(self) -> dict[str, Tensor]:
        """Buffers by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def guarded(self) -> dict[str, Tensor]:
        """Buffers by name, each with the guard rows before and after it."""
        return {name: _guarded(buffer) for name, buffer in self.named().items()}

    def poison(self) -> None:
        """Fill all rows with NaN, guard rows included."""
        for guarded in self.guarded().values():
            guarded.fill_(float("nan"))

    def broken_guards(self) -> tuple[str, ...]:
        """Names of buffers whose guard rows no longer hold the poison."""
        return tuple(
            name
            for name, guarded in self.guarded().items()
            if not guarded[:GUARD_ROWS].isnan().all() or not guarded[-GUARD_ROWS:].isnan().all()
        )


def _guarded(buffer: Tensor) -> Tensor:
    assert buffer._base is not None, "buffers are views of their guarded storage"
    return buffer._base
