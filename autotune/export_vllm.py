"""A plan for vLLM: engine arguments for its batch sizes, capture sizes and thresholds.

vLLM has no nano-batches for dense models: it runs the plan's dense batch op after op, with
collectives fused into GEMMs where the plan book knows from which size on hiding them pays.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from math import ceil
from typing import Any

from ..runtime.plan import Bucket, Candidate, Plan
from ..search_spaces.schema import HardwareSpec, ModelSpec
from .export_facts import VLLM_ARGUMENTS
from .export_lossy import Loss, losses, lossy_block, speedup

_TARGET = {
    "nano_batches": "one dense batch; its own two micro-batches are for experts with data "
    "parallelism",
    "sm_shares": "every op on the whole GPU",
    "lanes": "one stream",
    "order": "the model's order, one layer at a time",
    "transports": "NCCL or custom all-reduce on SMs",
    "kernels": "the engine's own kernels",
}
_NEVER, _UNKNOWN = "overlap pays at no size looked at", "the plan has no break-even token count"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmExport:
    """The file's values and what a reader must be told first."""

    document: dict[str, Any]
    verdict: str


def export_vllm(
    plan: Plan, candidate: Candidate, role: str, model: ModelSpec, hardware: HardwareSpec
) -> VllmExport:
    """Engine arguments of a plan, with the reason for each and for what is left out.

    Args:
        plan: its first bucket is the steady batch, the others give capture sizes.
        candidate: the schedule whose decisions the `lossy` block is about.
        role: of the candidate in the bucket.
        model: of the plan.
        hardware: of the plan.
    """
    bucket = plan.buckets[0]
    arguments, reasons = _batch_arguments(plan, bucket)
    left_out: dict[str, str] = {}
    _fusion(plan, arguments, reasons, left_out)
    conditional = _micro_batches(plan, model, left_out)
    VLLM_ARGUMENTS.check({*arguments, *conditional})
    gain, source = speedup(bucket, candidate)
    document: dict[str, Any] = {
        "format": VLLM_ARGUMENTS.header(),
        "command": shlex.join(["vllm", "serve", "MODEL", *_words(arguments)]),
        "arguments": arguments,
        "reasons": reasons,
        "left_out": left_out,
    }
    if conditional:
        document["only_with_data_and_expert_parallelism"] = conditional
    document["lossy"] = lossy_block(
        bucket,
        candidate,
        [*losses(candidate.schedule, hardware.num_sms, _TARGET), *_rows_and_books(plan, bucket)],
        role=role,
        target_runs="the dense batch op after op on the whole GPU",
        target_vs_sequential=1.0,
        more={},
    )
    lost = (
        f"loses {100 * (gain - 1):.1f} % tokens/s ({source})"
        if gain > 1
        else f"loses no {source} gain"
    )
    fused = "-cc.pass_config.sp_min_token_num" in arguments
    return VllmExport(
        document=document,
        verdict=f"vLLM runs the batch op after op, which {lost}; collectives are "
        f"{'fused into GEMMs' if fused else 'left as vLLM has them'} (see reasons, left_out).",
    )


def _batch_arguments(plan: Plan, bucket: Bucket) -> tuple[dict[str, Any], dict[str, str]]:
    prefill = bucket.dense_batch_tokens - bucket.decode_tokens
    prompt = max(1.0, 2 * bucket.prefill_context_tokens - 1)
    prompts = ceil(prefill / prompt)
    arguments: dict[str, Any] = {
        "--tensor-parallel-size": plan.num_gpus,
        "--dtype": plan.dtype,
        "--max-num-batched-tokens": bucket.dense_batch_tokens,
        "--max-num-seqs": max(1, bucket.decode_tokens + prompts),
        "--enable-chunked-prefill": True,
        "-cc.cudagraph_capture_sizes": capture_sizes(plan),
    }
    reasons = {
        "--max-num-batched-tokens": "the plan's dense batch",
        "--max-num-seqs": f"{bucket.decode_tokens} decodes and {prompts} prompt(s) in prefill",
        "--enable-chunked-prefill": "the plan fills the batch with chunks of prompts",
        "-cc.cudagraph_capture_sizes": "nano-batch and bucket sizes; below the smallest of them "
        "powers of two, because a given list replaces vLLM's own and small batches are padded up",
    }
    return arguments, reasons


def capture_sizes(plan: Plan) -> list[int]:
    """Rows of every bucket and nano-batch and of its decodes, and powers of two below them.

    None above the main bucket's rows: vLLM is told to batch no more.
    """
    sizes: set[int] = set()
    for bucket in plan.buckets:
        sizes |= {bucket.dense_batch_tokens, bucket.decode_tokens}
        for candidate in (bucket.winner, bucket.best_overlapped):
            sizes |= {batch.num_tokens for batch in candidate.schedule.nano_batches}
    # Sequence parallelism divides the rows among the ranks.
    unit = plan.num_gpus if plan.num_gpus > 1 else 1
    known = {size for size in sizes if size > 0 and size % unit == 0}
    largest = plan.buckets[0].dense_batch_tokens  # --max-num-batched-tokens
    known = {size for size in known if size <= largest}
    smallest = min(known, default=largest)
    powers = {2**power for power in range(smallest.bit_length()) if 2**power < smallest}
    return sorted(known | {size for size in powers if size % unit == 0})


def _fusion(
    plan: Plan, arguments: dict[str, Any], reasons: dict[str, str], left_out: dict[str, str]
) -> None:
    names = [
        f"-cc.pass_config.{name}" for name in ("enable_sp", "fuse_gemm_comms", "sp_min_token_num")
    ]
    if plan.num_gpus == 1:
        left_out[", ".join(names)] = "one GPU has no collectives"
        return
    if not plan.break_even:
        left_out[", ".join(names)] = f"{_UNKNOWN}: tune with a plan book"
        return
    even = plan.break_even[0]
    if even.tokens is None:
        looked = f"{even.smallest_tokens} to {even.largest_tokens} rows"
        left_out[", ".join(names)] = f"{_NEVER} ({looked})"
        return
    arguments |= dict(zip(names, (True, True, even.tokens), strict=True))
    reasons[names[2]] = (
        f"break-even of the plan book ({even.mix}, {even.decode_context_tokens:.0f} keys): from "
        "here on hiding collectives behind GEMMs pays. vLLM hides them within one GEMM, the plan "
        "beside other nano-batches, so measure both sides of it"
    )


def _micro_batches(plan: Plan, model: ModelSpec, left_out: dict[str, str]) -> dict[str, Any]:
    """Thresholds of dual-batch overlap, for a deployment with data and expert parallelism."""
    names = "--enable-dbo", "--dbo-decode-token-threshold", "--dbo-prefill-token-threshold"
    even = {record.mix: record.tokens for record in reversed(plan.break_even)}
    if model.num_local_experts is None:
        left_out[", ".join(names)] = (
            "dual-batch overlap yields only in layers of experts with data and expert "
            "parallelism; this model has none"
        )
        return {}
    decode, prefill = even.get("decode_only"), even.get("prefill_heavy", even.get("steady"))
    if decode is None and prefill is None:
        left_out[", ".join(names)] = _NEVER if plan.break_even else _UNKNOWN
        return {}
    thresholds = {names[1]: decode, names[2]: prefill}
    return {names[0]: True} | {name: size for name, size in thresholds.items() if size is not None}


def _rows_and_books(plan: Plan, bucket: Bucket) -> list[Loss]:
    found: list[Loss] = []
    if bucket.row_order != "decodes_first":
        found.append(
            Loss(
                decision="row_order",
                plan=bucket.row_order,
                target="decodes first",
                part="overlap",
            )
        )
    if len(plan.buckets) > 1:
        found.append(
            Loss(
                decision="buckets",
                plan=f"{len(plan.buckets)} batch sizes and mixes with a schedule each",
                target="one setting for all; capture sizes and one threshold follow the batch",
                part="target",
            )
        )
    return found


def _words(arguments: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in arguments.items():
        if name.startswith("-cc."):
            words.append(f"{name}={json.dumps(value, separators=(',', ':'))}")
        elif value is True:
            words.append(name)
        else:
            words += [name, str(value)]
    return words
