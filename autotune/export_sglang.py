"""A plan for SGLang: the table of its PD multiplexing, and the line that starts it.

The table does not come from the plan's schedule, which SGLang cannot run, but from the profile: how
long decode steps and prefills of this model take on each share of the SMs (`pd_curves.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from ..profiler.profile import Profile
from ..runtime.op_graph import OpGraph
from ..runtime.plan import Bucket, Candidate, Plan
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .cost_model import CostModel
from .export_facts import (
    PDMUX,
    PDMUX_DEFAULT_GROUPS,
    PDMUX_REFUSED,
    SGLANG_FLAGS,
    check_pdmux,
)
from .export_lossy import Loss, losses, lossy_block
from .pd_curves import Contexts, PdCurves
from .pd_divisions import DECODE_STEP, Division, divisions, possible_divisions
from .sensitivity import NOISE

PDMUX_FILE = "plan.pdmux.yaml"
_TARGET = {
    "nano_batches": "one prefill batch and one decode batch, split by phase",
    "sm_shares": "two parts of the GPU, one for all ops of prefill, one for all of decode",
    "lanes": "two streams: prefill and decode",
    "order": "each phase's ops in the model's order",
    "transports": "the engine's collectives, on SMs of their phase",
    "kernels": "the engine's own kernels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangExport:
    """The file's values and what a reader must be told first."""

    document: dict[str, Any]
    launch: tuple[str, ...]
    """Words of the launch line."""
    verdict: str


def export_sglang(
    plan: Plan,
    candidate: Candidate,
    role: str,
    model: ModelSpec,
    hardware: HardwareSpec,
    profile: Profile | None,
    *,
    tpot_ms: float,
    sm_groups: int = PDMUX_DEFAULT_GROUPS,
) -> SglangExport:
    """The PD multiplexing table of a plan's model, batch and contexts.

    Args:
        plan: its first bucket is exported.
        candidate: the schedule whose decisions the `lossy` block is about.
        role: of the candidate in the bucket.
        model: of the plan.
        hardware: of the plan.
        profile: where the curves come from; None: the datasheet.
        tpot_ms: limit on the time of a decode step.
        sm_groups: at most so many SM groups, the two whole-GPU ones included.

    Raises:
        ValueError: no decode or no prefill rows, a GPU that SGLang does not split, or a limit that
            no division keeps.
    """
    bucket = plan.buckets[0]
    _check(plan, bucket)
    graph = OpGraph.build(model, plan.num_gpus)
    cost_model = CostModel(profile, hardware, model.torch_dtype)
    contexts = Contexts(
        decode_context_tokens=bucket.decode_context_tokens,
        prefill_context_tokens=bucket.prefill_context_tokens,
    )
    curves = PdCurves(graph, cost_model, contexts, _prefill_tokens(bucket))
    candidates = possible_divisions(
        hardware.num_sms, hardware.sm_granularity, _least_measured(profile)
    )
    rows = divisions(
        curves,
        candidates,
        limit_us=1e3 * tpot_ms,
        max_decodes=bucket.decode_tokens,
        max_rows=sm_groups - 2,
    )
    table = [[row.prefill_sms, row.decode_sms, row.least_decodes] for row in rows]
    check_pdmux(len(rows) + 2, table, hardware.num_sms, hardware.sm_granularity)
    keys = {
        "sm_group_num": len(rows) + 2,
        "manual_divisions": table,
        "split_forward_token_budget": _slice_budget(curves, rows),
    }
    PDMUX.check(keys)
    reach = rows[-1].most_decodes
    reached = _reached(curves, bucket, rows, 1e3 * tpot_ms)
    document = {
        "format": PDMUX.header(),
        **keys,
        "predicted": [_predicted(row) for row in rows],
        "lossy": lossy_block(
            bucket,
            candidate,
            [*losses(candidate.schedule, hardware.num_sms, _TARGET), *_phases(plan, bucket)],
            role=role,
            target_runs=f"prefill beside decode steps of up to {reach} requests",
            target_vs_sequential=reached.divided / reached.whole,
            more={"predicted_tokens_per_s": reached.as_dict(tpot_ms)},
        ),
    }
    return SglangExport(
        document=document,
        launch=_launch(plan, reach),
        verdict=_verdict(reached, reach, bucket, tpot_ms),
    )


def _check(plan: Plan, bucket: Bucket) -> None:
    if plan.hardware in PDMUX_REFUSED:
        raise ValueError(
            f"SGLang's PD multiplexing must be able to split the GPU, but on {plan.hardware} "
            f"{PDMUX_REFUSED[plan.hardware]}; export --to vllm or schema"
        )
    if not 0 < bucket.decode_tokens < bucket.dense_batch_tokens:
        raise ValueError(
            "PD multiplexing needs decode rows and prefill rows, but the plan has "
            f"{bucket.decode_tokens} decodes in {bucket.dense_batch_tokens} rows; export a plan "
            "of a workload with both"
        )


def _prefill_tokens(bucket: Bucket) -> int:
    """Rows of one prefill batch: the plan's, whole prompts at least."""
    return max(
        bucket.dense_batch_tokens - bucket.decode_tokens,
        round(2 * bucket.prefill_context_tokens - 1),
    )


def _least_measured(profile: Profile | None) -> int:
    """Smallest share that attention and GEMMs were both measured on."""
    kinds: dict[str, int] = {}
    for row in profile.usable_rows if profile else ():
        point = row.point
        if point.num_sms > 0 and point.kind in ("gemm", "decode_attention", "prefill_attention"):
            kinds[point.kind] = min(kinds.get(point.kind, point.num_sms), point.num_sms)
    return max(kinds.values(), default=0)


def _slice_budget(curves: PdCurves, rows: tuple[Division, ...]) -> int:
    """Prompt rows x layers of a slice: as long as the longest decode step that it runs beside.

    A shorter slice leaves its SMs idle until the step ends; the loop launches one of each in turn.
    """
    layers = 1
    for row in rows:
        fill_us = curves.prefill_tokens / row.prefill_tokens_per_s * 1e6
        layer_us = fill_us / curves.graph.num_layers
        layers = max(layers, ceil(row.decode_step_us / layer_us))
    return min(layers, curves.graph.num_layers) * curves.prefill_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reached:
    """Predicted tokens/s of one replica, prompts and decodes in the plan's proportion."""

    divided: float
    """The last row of the table at its largest decode batch."""
    under_limit: float
    """Dense batches after the other that keep the same limit; 0 if none does."""
    whole: float
    """The plan's dense batch after the other, which knows no limit."""
    whole_us: float
    """Time of that batch: of one token."""

    def as_dict(self, tpot_ms: float) -> dict[str, Any]:
        return {
            f"pd_multiplexing_at_{tpot_ms:g}_ms": round(self.divided),
            f"one_dense_batch_at_{tpot_ms:g}_ms": round(self.under_limit) or None,
            f"one_dense_batch_at_{self.whole_us / 1e3:.0f}_ms": round(self.whole),
        }


def _reached(
    curves: PdCurves, bucket: Bucket, rows: tuple[Division, ...], limit_us: float
) -> _Reached:
    prefills = bucket.dense_batch_tokens - bucket.decode_tokens

    def rate(decodes: int, us: float) -> float:
        return decodes * bucket.dense_batch_tokens / bucket.decode_tokens / us * 1e6

    def prompt_rows(decodes: int) -> int:
        return max(1, round(decodes * prefills / bucket.decode_tokens))

    most, division = rows[-1].most_decodes, (rows[-1].prefill_sms, rows[-1].decode_sms)
    under_limit = 0.0
    for decodes in range(DECODE_STEP, bucket.decode_tokens + 1, DECODE_STEP):
        us = curves.mixed_us(decodes, prompt_rows(decodes))
        if us <= limit_us:
            under_limit = max(under_limit, rate(decodes, us))
    whole_us = curves.mixed_us(bucket.decode_tokens, prefills)
    return _Reached(
        divided=rate(most, curves.divided_us(most, prompt_rows(most), division)),
        under_limit=under_limit,
        whole=rate(bucket.decode_tokens, whole_us),
        whole_us=whole_us,
    )


def _phases(plan: Plan, bucket: Bucket) -> list[Loss]:
    found = [
        Loss(
            decision="dense_batch",
            plan=f"{bucket.dense_batch_tokens} rows in one batch, {bucket.decode_tokens} of them "
            "decodes, prompts in chunks",
            target="whole prompts and decode steps apart: weights are read by both "
            "(--chunked-prefill-size -1)",
            part="target",
        )
    ]
    if len(plan.buckets) > 1:
        found.append(
            Loss(
                decision="buckets",
                plan=f"{len(plan.buckets)} batch sizes and mixes with a schedule each",
                target="one table by decode batch",
                part="target",
            )
        )
    return found


def _predicted(row: Division) -> dict[str, Any]:
    return {
        "prefill_sms": row.prefill_sms,
        "decode_sms": row.decode_sms,
        "decodes": [row.least_decodes, row.most_decodes],
        "decode_step_ms": round(row.decode_step_us / 1e3, 1),
        "prefill_tokens_per_s": round(row.prefill_tokens_per_s),
        "source": row.source,
    }


def _launch(plan: Plan, reach: int) -> tuple[str, ...]:
    flags = {
        "--model-path": "MODEL",
        "--tp": str(plan.num_gpus),
        "--pp-size": "1",
        "--enable-pdmux": "",
        "--pdmux-config-path": PDMUX_FILE,
        "--chunked-prefill-size": "-1",
        "--disable-overlap-schedule": "",
        "--max-running-requests": str(reach),
        "--cuda-graph-max-bs": str(reach),
    }
    SGLANG_FLAGS.check(flags)
    words = [word for name, value in flags.items() for word in (name, value) if word]
    return ("python", "-m", "sglang.launch_server", *words)


def _verdict(reached: _Reached, reach: int, bucket: Bucket, tpot_ms: float) -> str:
    held = f"up to {reach} of the plan's {bucket.decode_tokens} decodes keep {tpot_ms:g} ms a token"
    whole = (
        f"{100 * (reached.divided / reached.whole - 1):+.1f} % against the plan's own batch, which "
        f"takes {reached.whole_us / 1e3:.0f} ms a token"
    )
    if not reached.under_limit:
        return (
            f"PD multiplexing keeps the limit where one dense batch cannot, predicted: {held}, "
            f"tokens/s {whole}."
        )
    change = reached.divided / reached.under_limit - 1
    against = f"{100 * change:+.1f} % tokens/s against dense batches under the same limit; {whole}"
    if abs(change) <= NOISE:
        return (
            f"PD multiplexing makes no difference that this prediction can tell: {against}; "
            f"{held}. Measure both."
        )
    if change > 0:
        return f"PD multiplexing pays here, predicted: {against}; {held}."
    return (
        f"PD multiplexing does not pay here, predicted: {against}; {held}. Leave out "
        "--enable-pdmux and chunk prompts instead."
    )
