"""Decode attention: bytes a clock and SM on few SMs, TB/s on all, uniform and mixed lengths.

    python benchmarks/attention.py --commit $(git rev-parse --short HEAD)

`attn_per_sm` and `attn_bandwidth` take the fastest own variant of the run, `attn_full` sets it
beside FlashInfer's batch decode (tensor cores, planned for the whole GPU as its users get it) on
the same pages and lengths; without FlashInfer that figure is left out. The details hold every
variant against the first one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
PER_SM_REACH, FULL_REACH, BANDWIDTH_REACH = ">= 54", ">= 1.0", ">= 4.3"
FLASHINFER = "flashinfer"
_CONTENDERS_EXPECTED = 3  # for the predicted seconds: --dry-run needs no kernels
_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Requests that decode one row each."""

    id: str
    """`attn_per_sm`, `attn_full`, `attn_bandwidth`, or `attn_small`, of which nothing is asked."""
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
            ("attn_small", "16 x 8192 keys", num_sms),
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
    own = {name: value for name, value in turns.items() if name != FLASHINFER}
    best = min(own.values(), key=lambda value: value.median_us)
    rates = per_second(best, case.memory_bytes)
    found: list[ab.Figure] = []
    if case.id == "attn_per_sm":
        values = tuple(
            rate / (clock * 1e6) / case.num_sms
            for rate, clock in zip(rates, best.clocks_mhz, strict=True)
        )
        found.append(_absolute(case, values, "B/clk", PER_SM_REACH, best))
    elif case.id == "attn_bandwidth":
        values = tuple(rate / 1e12 for rate in rates)
        found.append(_absolute(case, values, "TB/s", BANDWIDTH_REACH, best))
    if case.id in ("attn_full", "attn_small") and FLASHINFER in turns:
        reach = FULL_REACH if case.id == "attn_full" else ""
        found.append(ab.ratio(case.id, case.label, reach, best, turns[FLASHINFER]))
    first = next(iter(own.values()))
    for name, value in turns.items():
        rate = case.memory_bytes / (value.median_us * 1e-6) / 1e12
        label = f"{case.label} {name} ({rate:.2f} TB/s)"
        found.append(ab.ratio("attn_variants", label, "", value, first))
    return found


def _absolute(
    case: AttentionCase, values: tuple[float, ...], unit: str, reach: str, turns: ab.Turns
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

    def calls(self, case: AttentionCase) -> dict[str, Callable[[], None]]:
        """Launches by contender's name."""
        import torch

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
            if name.startswith(FLASHINFER):
                continue  # it runs below, planned for the whole GPU
            run = kernel("decode_attention", name, "cuda")
            call = partial(run, qkv, k_pages, v_pages, meta, out, heads, case.num_sms)
            try:
                call()
            except (RuntimeError, ValueError) as err:
                print(f"{name} left out: {(str(err).splitlines() or [err])[0]}", file=sys.stderr)
            else:
                calls[name] = call
        if case.num_sms == self._bench.num_sms and find_spec(FLASHINFER) is not None:
            try:
                calls[FLASHINFER] = _flashinfer(case, pages, qkv, k_pages, v_pages, out)
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
    if find_spec(FLASHINFER) is None and any(case.id == "attn_full" for case in cases):
        print("attn_full is left out: flashinfer is not installed", file=sys.stderr)
    operands = Operands(bench, cases)
    for case in cases:
        if bench.is_over:
            break
        stream = bench.sweep.stream(case.num_sms)
        calls = operands.calls(case)
        batches = {
            name: bench.sweep.timer.batch([call], stream, batch_ms=4.0)
            for name, call in calls.items()
        }
        bench.warm()  # operands took a while
        bench.add(figures(case, ab.take_turns(bench.sweep.timer, batches, bench.rounds)))
    bench.finish()


if __name__ == "__main__":
    main()
