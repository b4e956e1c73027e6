"""What the targets of an export take: every key that may be emitted, and where that is known from.

Formats move. A key that is not in this table is never written, and every export says against which
state of the target its keys were checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Target = Literal["sglang", "vllm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFormat:
    """One format of a target, with the keys that are known to exist in it."""

    target: Target
    name: str
    checked: str
    """Which state of the target was read, and when."""
    keys: frozenset[str]

    def check(self, emitted: Iterable[str]) -> None:
        """Assert that each key is known; an unknown one is a mistake of ours."""
        unknown = sorted(set(emitted) - self.keys)
        assert not unknown, f"{self.name} is not known to take {', '.join(unknown)}"

    def header(self) -> dict[str, str]:
        """The `format` block of an export."""
        return {"target": self.target, "name": self.name, "checked": self.checked}


PDMUX = TargetFormat(
    target="sglang",
    name="PD multiplexing config (--pdmux-config-path)",
    checked="sglang main, read 2026-11: srt/multiplex/pdmux_context.py; reads these keys by name "
    "and ignores others",
    keys=frozenset(
        {"sm_group_num", "manual_divisions", "split_forward_token_budget", "decode_bs_divisor"}
    ),
)
SGLANG_FLAGS = TargetFormat(
    target="sglang",
    name="launch flags",
    checked="sglang main, read 2026-11: server arguments and what PD multiplexing asserts",
    keys=frozenset(
        {
            "--model-path",
            "--tp",
            "--pp-size",
            "--enable-pdmux",
            "--pdmux-config-path",
            "--chunked-prefill-size",
            "--disable-overlap-schedule",
            "--max-running-requests",
            "--cuda-graph-max-bs",
        }
    ),
)
VLLM_ARGUMENTS = TargetFormat(
    target="vllm",
    name="engine arguments of `vllm serve`",
    checked="vllm main, read 2026-11: config files and docs/design/fusions; names move between "
    "releases, compare with `vllm serve --help=all` of yours",
    keys=frozenset(
        {
            "--tensor-parallel-size",
            "--dtype",
            "--max-num-batched-tokens",
            "--max-num-seqs",
            "--enable-chunked-prefill",
            "--enable-dbo",
            "--dbo-decode-token-threshold",
            "--dbo-prefill-token-threshold",
            "-cc.cudagraph_capture_sizes",
            "-cc.pass_config.enable_sp",
            "-cc.pass_config.fuse_gemm_comms",
            "-cc.pass_config.sp_min_token_num",
        }
    ),
)
PDMUX_MIN_GROUPS = 3
"""SM groups, of which two are the whole GPU for prefill alone and for decode alone."""
PDMUX_DEFAULT_GROUPS = 8
PDMUX_REFUSED = {
    **dict.fromkeys(("b100", "b200"), "compute capability 10 is not in its table of partitions"),
    **dict.fromkeys(
        ("gaudi2", "gaudi3", "mi250", "mi300", "mi325x"), "it makes partitions on NVIDIA GPUs only"
    ),
}
"""Shipped GPUs on which SGLang cannot make the partitions, and why."""


def check_pdmux(groups: int, rows: Sequence[Sequence[int]], num_sms: int, unit: int) -> None:
    """Assert what SGLang asks of the file: rows, sums, units, rising thresholds from 1 on.

    Args:
        groups: `sm_group_num`.
        rows: `manual_divisions`, (prefill SMs, decode SMs, least decode batch).
        num_sms: of the GPU.
        unit: least part, and granularity of the prefill part.
    """
    assert groups >= PDMUX_MIN_GROUPS, groups
    assert len(rows) == groups - 2, (groups, rows)
    thresholds = [row[2] for row in rows]
    assert thresholds[0] <= 1, "a decode batch below the first threshold has no row"
    assert thresholds == sorted(set(thresholds)), thresholds
    for prefill_sms, decode_sms, _ in rows:
        assert prefill_sms + decode_sms == num_sms, (prefill_sms, decode_sms)
        assert min(prefill_sms, decode_sms) >= unit, (prefill_sms, decode_sms)
        assert prefill_sms % unit == 0, prefill_sms
