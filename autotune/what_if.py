"""What would lift the limit that a plan runs into: its predicted period under changed conditions.

Each change is put into the model that predicts the plan (`simulator.py`, `power_model.py`); the
schedule stays as it is, so that a search anew could gain more. No kernel is predicted faster than
its measured burst, so that the gain of a higher cap is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..runtime.op_graph import GEMM_KINDS, Op, OpGraph, RowMix
from ..runtime.plan import Schedule
from .cost_model import CostModel
from .simulator import Simulator

FEWER_FLOPS = 0.9
MORE_WATTS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """One change and what it would give."""

    change: str
    period_us: float
    """Predicted, of the whole iteration."""
    gain: float
    """Period before / after - 1."""
    sm_clock_mhz: float

    def as_dict(self) -> dict[str, Any]:
        """As in `report.json`."""
        return {
            **asdict(self),
            "period_us": round(self.period_us, 1),
            "gain": round(self.gain, 4),
            "sm_clock_mhz": round(self.sm_clock_mhz),
        }


def what_ifs(
    schedule: Schedule, graph: OpGraph, cost_model: CostModel, mix: RowMix
) -> tuple[WhatIf, ...]:
    """Half the KV bytes, a tenth fewer FLOPs in GEMMs, a higher power cap.

    Nothing without a power model, and where times are from the datasheet.
    """
    power = cost_model.power
    if power is None or cost_model.profile is None:
        return ()

    def run(scale: Callable[[Op, RowMix], float], watts: float = 0.0) -> tuple[float, float]:
        simulator = Simulator(schedule, graph, cost_model, mix, scale=scale)
        model = replace(power, cap_w=power.cap_w + watts)
        clock, period_us = simulator.under_cap(model, simulator.timeline().period_us)
        return period_us, clock * power.max_clock_mhz

    before_us, _ = run(_same)
    changes = {
        "half the KV bytes (an 8-bit KV cache)": run(_half_kv),
        f"{1 - FEWER_FLOPS:.0%} fewer FLOPs in GEMMs": run(_fewer_flops),
        f"a cap {MORE_WATTS:.0f} W higher": run(_same, MORE_WATTS),
    }
    return tuple(
        WhatIf(change=name, period_us=us, gain=before_us / us - 1, sm_clock_mhz=clock_mhz)
        for name, (us, clock_mhz) in changes.items()
    )


def _same(op: Op, rows: RowMix) -> float:
    return 1.0


def _half_kv(op: Op, rows: RowMix) -> float:
    """Part of decode attention's bytes, and so of its time and joules, that is left."""
    if op.kind != "decode_attention" or not op.rows(rows):
        return 1.0
    keys = rows.decode_tokens * rows.decode_context_tokens
    kv_bytes = op.dtype_bytes * op.kv_elements_per_key * keys
    return 1 - kv_bytes / 2 / op.memory_bytes(rows)


def _fewer_flops(op: Op, rows: RowMix) -> float:
    return FEWER_FLOPS if op.kind in GEMM_KINDS else 1.0
