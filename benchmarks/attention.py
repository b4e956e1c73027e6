"""Decode attention: bytes a clock and SM on few SMs, TB/s on all, uniform and mixed lengths.

    python benchmarks/attention.py --commit $(git rev-parse --short HEAD)

`attn_per_sm` and `attn_bandwidth` take the fastest variant of the run; where FlashInfer is
installed, `attn_full` sets it beside its batch decode on the same pages. `attn_variants` shows
every variant against the first. Besides the registered ones, the split kernel runs with other
numbers of keys per split.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import ab

from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape, kernel
from nanoflow_tune.runtime.kv_cache import PAGE_SIZE
from nanoflow_tune.runtime.op_graph import OpGraph
from nanoflow_tune.runtime.op_shapes import shape_numbers
from nanoflow_tune.search_spaces.loader import load_model

if TYPE_CHECKING:
    from torch import Tensor

SHARES = (8, 16, 24, 32)
SPLIT_KEYS = (256, 512, 2048)
PER_SM_REACH, FULL_REACH, BANDWIDTH_REACH = 54.0, 1.0, 4.3
_CONTENDERS_EXPECTED = 6  # for the predicted seconds: --dry-run needs no kernels
_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Requests that decode one row each."""

    id: str
    """`attn_per_sm`, `attn_full` or `attn_bandwidth`."""
    label: str
    heads: HeadShape
    kv_lens: tuple[int, ...]
    num_sms: int

    @property
    def memory_bytes(self) -> float:
        """Keys and values read, queries read and outputs written."""
        rows = 2 * len(self.kv_lens) * self.heads.qo_size
        return float(_ITEM_BYTES * (2 * sum(self.kv_lens) * self.heads.kv_size + rows))

    @property
    def num_pages(self) -> int:
        """Pages of all requests."""
        return sum(-(-kv_len // PAGE_SIZE) for kv_len in self.kv_lens)


def attention_cases(num_sms: int) -> list[AttentionCase]:
    """Every case of every model."""
    mixed = random.Random(0)
    lengths = {
        "512 x 1024 keys": (1024,) * 512,
        "128 x 8192 keys": (8192,) * 128,
        "512 x 1-8192 keys": (1, 8192, *(mixed.randint(1, 8192) for _ in range(510))),
        "16 x 8192 keys": (8192,) * 16,
    }
    cases: list[AttentionCase] = []
    for model, tp_degree in ab.MODELS:
        shape = OpGraph.build(load_model(model), tp_degree).op("decode_attention").shape
        qo, kv, dim = shape_numbers(shape)
        heads = HeadShape(num_qo_heads=qo, num_kv_heads=kv, head_dim=dim)
        named = [("attn_per_sm", "512 x 1024 keys", share) for share in SHARES]
        named += [
            ("attn_full", "512 x 1024 keys", num_sms),
            ("attn_full", "512 x 1-8192 keys", num_sms),
            ("attn_full", "16 x 8192 keys", num_sms),
            ("attn_bandwidth", "128 x 8192 keys", num_sms),
        ]
        cases += [
            AttentionCase(
                id=figure_id,
                label=f"{model} TP{tp_degree} {keys} {share} SMs",
                heads=heads,
                kv_lens=lengths[keys],
                num_sms=share,
            )
            for figure_id, keys, share in named
        ]
    return cases


def per_second(turns: ab.Turns, amount: float) -> tuple[float, ...]:
    """Amount per second, by round."""
    return tuple(amount / (time_us * 1e-6) for time_us in turns.times_us)


def figures(case: AttentionCase, turns: dict[str, ab.Turns]) -> list[ab.Figure]:
    """The case's own figure, then every contender against the first."""
    own = {name: value for name, value in turns.items() if name != "flashinfer"}
    best = min(own.values(), key=lambda value: value.median_us)
    rates = per_second(best, case.memory_bytes)
    found: list[ab.Figure] = []
    if case.id == "attn_per_sm":
        clock_hz = best.sm_clock_mhz * 1e6
        values = tuple(rate / clock_hz / case.num_sms for rate in rates)
        found.append(_absolute(case, values, "B/clk", PER_SM_REACH, best))
    elif case.id == "attn_bandwidth":
        values = tuple(rate / 1e12 for rate in rates)
        found.append(_absolute(case, values, "TB/s", BANDWIDTH_REACH, best))
    if case.id == "attn_full" and "flashinfer" in turns:
        found.append(ab.ratio(case.id, case.label, FULL_REACH, best, turns["flashinfer"]))
    first = next(iter(own.values()))
    for name, value in turns.items():
        rate = case.memory_bytes / (value.median_us * 1e-6) / 1e12
        label = f"{case.label} {name} ({rate:.2f} TB/s)"
        found.append(ab.ratio("attn_variants", label, 0.0, value, first))
    return found


def _absolute(
    case: AttentionCase, values: tuple[float, ...], unit: str, reach: float, turns: ab.Turns
) -> ab.Figure:
    return ab.Figure(
        id=case.id, case=case.label, values=values, unit=unit, reach=reach, subject=turns
    )


class Operands:
    """Random pages, queries and page tables on the GPU; the pool is kept between cases."""

    def __init__(self, bench: ab.Bench, cases: Sequence[AttentionCase]) -> None:
        self._bench = bench
        self._cases = cases
        self._pools: dict[HeadShape, tuple[Tensor, Tensor]] = {}

    def _pool(self, heads: HeadShape) -> tuple[Tensor, Tensor]:
        if heads not in self._pools:
            self._pools.clear()
            pages = max(case.num_pages for case in self._cases if case.heads == heads)
            shape = (pages, heads.num_kv_heads, PAGE_SIZE, heads.head_dim)
            self._pools[heads] = self._bench.cases.randn(*shape), self._bench.cases.randn(*shape)
        return self._pools[heads]

    def calls(
        self, case: AttentionCase, split_keys: Sequence[int]
    ) -> dict[str, Callable[[], None]]:
        """Launches by contender's name."""
        import torch

        from nanoflow_tune.runtime.kernels.triton_decode_split import (
            SPLIT_TILE,
            launch_split_decode,
        )

        heads, rows = case.heads, len(case.kv_lens)
        k_pages, v_pages = self._pool(heads)
        counts = [-(-kv_len // PAGE_SIZE) for kv_len in case.kv_lens]
        order = torch.randperm(k_pages.shape[0], generator=torch.Generator().manual_seed(0))
        pages = list(order[: sum(counts)].to(torch.int32).split(counts))
        table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
        meta = DecodeRows(
            row_ids_R=torch.arange(rows, dtype=torch.int32).cuda(),
            kv_lens_R=torch.tensor(case.kv_lens, dtype=torch.int32).cuda(),
            page_table_RP=table.cuda(),
            max_kv_len=max(case.kv_lens),
        )
        qkv = self._bench.cases.randn(rows, heads.qo_size + 2 * heads.kv_size)
        out = self._bench.cases.randn(rows, heads.qo_size)
        calls: dict[str, Callable[[], None]] = {}
        for name in ab.gpu_variants("decode_attention"):
            run = kernel("decode_attention", name, "cuda")
            calls[name] = lambda run=run: run(qkv, k_pages, v_pages, meta, out, heads, case.num_sms)
        for keys in split_keys:
            tile = replace(SPLIT_TILE, split_keys=keys)
            calls[f"triton_split, {keys} keys"] = lambda tile=tile: launch_split_decode(
                tile, qkv, k_pages, v_pages, meta, out, heads, case.num_sms
            )
        if case.num_sms == self._bench.num_sms and find_spec("flashinfer") is not None:
            try:
                calls["flashinfer"] = _flashinfer(case, pages, qkv, k_pages, v_pages, out)
            except RuntimeError as err:  # its kernels may need a compiler that is not there
                print(f"flashinfer left out: {str(err).splitlines()[0]}", file=sys.stderr)
        return calls


def _flashinfer(
    case: AttentionCase,
    pages: Sequence[Tensor],
    qkv: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
) -> Callable[[], None]:
    """FlashInfer's batch decode on the same pages, with tensor cores; planned once."""
    import flashinfer
    import torch

    heads, rows = case.heads, len(case.kv_lens)
    ends = torch.tensor([0, *(len(mine) for mine in pages)]).cumsum(0).to(torch.int32)
    last = torch.tensor([(n - 1) % PAGE_SIZE + 1 for n in case.kv_lens], dtype=torch.int32)
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, kv_layout="HND", use_tensor_cores=True
    )
    decode.plan(
        ends.cuda(),
        torch.cat(list(pages)).cuda(),
        last.cuda(),
        heads.num_qo_heads,
        heads.num_kv_heads,
        heads.head_dim,
        PAGE_SIZE,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    shape = (rows, heads.num_qo_heads, heads.head_dim)
    q = qkv[:, : heads.qo_size].reshape(shape)
    out_RNH = torch.empty_like(out).view(shape)

    def run() -> None:
        decode.run(q, (k_pages, v_pages), out=out_RNH)

    run()
    return run


def main() -> None:
    bench = ab.Bench("attention", __doc__ or "")
    by_label = {f"{case.id} {case.label}": case for case in attention_cases(bench.num_sms)}
    chosen = bench.chosen(by_label)
    if bench.is_dry_run:
        turns = len(chosen) * _CONTENDERS_EXPECTED * bench.rounds
        bench.print_plan(chosen, ab.predicted_s(len(chosen) * _CONTENDERS_EXPECTED, turns))
        return
    bench.start()
    cases = [by_label[label] for label in chosen]
    operands = Operands(bench, cases)
    for case in cases:
        stream = bench.sweep.stream(case.num_sms)
        batches = {
            name: bench.sweep.timer.batch([call], stream)
            for name, call in operands.calls(case, SPLIT_KEYS).items()
        }
        bench.add(figures(case, ab.take_turns(bench.sweep.timer, batches, bench.rounds)))
    bench.finish()


if __name__ == "__main__":
    main()
