"""From a profile point to callable kernels on random data: the runtime's own variants, bound.

Operands are random normal bf16 (zeros run up to 13 % faster). A case has several operand sets when
one would stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.kernels.gather_buffer import output_rows
from ..runtime.kernels.registry import DecodeRows, HeadShape, PrefillRows, kernel
from ..runtime.kv_cache import PAGE_SIZE
from ..runtime.op_shapes import shape_numbers
from .energy import point_costs
from .profile import Point

Call = Callable[[], None]
_ROTATED_BYTES = 150e6  # more than twice the L2 of an H200


def _no_kernel() -> None:
    """Embedding and sampling are torch calls, not registered variants."""


def _discard(_: Tensor) -> None:
    """Drop a result that only its kernel was wanted for."""


class CaseFactory:
    """Builds the calls of a point; keeps weights and the KV pool between points."""

    def __init__(self, dtype: torch.dtype, device: torch.device, kv_pool_bytes: float) -> None:
        self._dtype, self._device = dtype, device
        self._kv_pool_bytes = kv_pool_bytes
        self._weights: dict[str, list[Tensor]] = {}
        self._pools: list[Tensor] = []
        self._generator = torch.Generator(device=device).manual_seed(0)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random normal values of the profile's dtype."""
        out = torch.empty(*shape, dtype=self._dtype, device=self._device)
        return out.normal_(0.0, scale, generator=self._generator)

    def calls(self, point: Point, group: Any = None) -> list[Call]:  # noqa: ANN401
        """Zero-argument launches of the point, one per operand set.

        Raises:
            ValueError: unknown variant.
        """
        run: Callable[..., None] = _no_kernel
        if point.kind not in ("embedding", "sampling"):
            run = kernel(point.kind, point.variant, self._device.type)  # type: ignore[arg-type]
        _, memory_bytes, _ = point_costs(point, self._dtype.itemsize)
        num_sets = max(1, min(8, -(-int(_ROTATED_BYTES) // max(1, int(memory_bytes)))))
        return [self._call(point, run, group, index) for index in range(num_sets)]

    def _call(self, point: Point, run: Callable[..., None], group: Any, index: int) -> Call:  # noqa: ANN401
        rows, share, sizes = point.tokens, point.num_sms, shape_numbers(point.shape)
        if point.kind == "gemm":
            n, k = sizes
            x, out = self.randn(rows, k), self.randn(rows, n)
            weight = self._weight(point.shape, n, k, index)
            return lambda: run(x, weight, None, out, share)
        if point.kind == "gemm_silu":
            n, k = sizes
            x, scratch, out = (self.randn(rows, width) for width in (k, n, n // 2))
            weight = self._weight(point.shape, n, k, index)
            return lambda: run(x, weight, scratch, out, share)
        if point.kind in ("grouped_gemm", "grouped_gemm_silu"):
            return self._grouped_gemm_call(point, run, sizes)
        if point.kind in ("moe_router", "moe_combine"):
            return self._routing_call(point, run, sizes)
        if point.kind == "norm":
            x, delta, out = (self.randn(rows, sizes[0]) for _ in range(3))
            delta.mul_(1e-3)
            weight = self.randn(sizes[0])
            return lambda: run(x, delta, weight, out, 1e-5, share)
        if point.kind == "all_reduce":
            x = self.randn(rows, sizes[0])
            return lambda: run(x, group, share)
        if point.kind == "all_gather":
            width, ranks = sizes
            x = self.randn(rows, width // ranks)
            out = output_rows(group, rows, width, self._dtype, self._device)
            return lambda: run(x, out, group, share)
        if point.kind == "embedding":
            table = self._weight(point.shape, 32768, sizes[0], 0)
            ids = torch.randint(0, 32768, (rows,), device=self._device)
            out = self.randn(rows, sizes[0])
            return lambda: _discard(torch.index_select(table, 0, ids, out=out))
        if point.kind == "sampling":
            logits = self.randn(rows, sizes[0])
            return lambda: _discard(torch.argmax(logits, dim=-1))
        return self._attention_call(point, run, sizes)

    def _grouped_gemm_call(
        self, point: Point, run: Callable[..., None], sizes: tuple[int, ...]
    ) -> Call:
        """Each token goes to different experts, all of them equally likely."""
        experts, per_token, n, k = sizes
        draws = torch.rand(point.tokens, experts, device=self._device, generator=self._generator)
        chosen = draws.topk(per_token, dim=1).indices.flatten()
        offsets = chosen.bincount(minlength=experts).cumsum(0).to(torch.int32)
        rows, share = point.tokens * per_token, point.num_sms
        x, product = self.randn(rows, k), self.randn(rows, n)
        weight = self._weight(point.shape, experts * n, k, 0).view(experts, n, k)
        if point.kind == "grouped_gemm":
            return lambda: run(x, weight, offsets, product, share)
        out = self.randn(rows, n // 2)
        return lambda: run(x, weight, offsets, product, out, share)

    def _routing_call(self, point: Point, run: Callable[..., None], sizes: tuple[int, ...]) -> Call:
        """Rows to their experts' places, or back from random places."""
        rows, share, (*_, per_token, hidden) = point.tokens, point.num_sms, sizes
        x, routed = self.randn(rows, hidden), self.randn(rows * per_token, hidden)
        order = torch.randperm(rows * per_token, device=self._device, generator=self._generator)
        places = order.to(torch.int32).view(rows, per_token)
        weights = torch.full((rows, per_token), 1 / per_token, device=self._device)
        if point.kind == "moe_combine":
            return lambda: run(routed, places, weights, x, share)
        router = self._weight(point.shape, sizes[0], hidden, 0)
        offsets = torch.zeros(sizes[0], dtype=torch.int32, device=self._device)
        return lambda: run(x, router, routed, offsets, places, weights, share)

    def _weight(self, shape: str, n: int, k: int, index: int) -> Tensor:
        sets = self._weights.setdefault(shape, [])
        while len(sets) <= index:
            sets.append(self.randn(n, k, scale=k**-0.5))
        return sets[index]

    def _pool(self, heads: HeadShape) -> tuple[Tensor, Tensor]:
        """Pages of keys and of values; all head shapes look at the same memory."""
        page = heads.num_kv_heads * PAGE_SIZE * heads.head_dim
        if not self._pools:
            elements = int(self._kv_pool_bytes / 2 / self._dtype.itemsize)
            self._pools = [self.randn(elements), self.randn(elements)]
        pages = self._pools[0].numel() // page
        shape = (pages, heads.num_kv_heads, PAGE_SIZE, heads.head_dim)
        keys, values = (pool[: pages * page].view(shape) for pool in self._pools)
        return keys, values

    def _page_table(self, num_pages: int, requests: int, kv_len: int) -> Tensor:
        pages_each = -(-kv_len // PAGE_SIZE)
        if requests * pages_each > num_pages:
            raise ValueError(
                f"{requests} requests of {kv_len} keys need {requests * pages_each} pages, the "
                f"profiler's pool has {num_pages}: give it more memory"
            )
        order = torch.randperm(num_pages, device=self._device, generator=self._generator)
        return order[: requests * pages_each].view(requests, pages_each).to(torch.int32)

    def _ints(self, values: Any) -> Tensor:  # noqa: ANN401 - list or range
        return torch.tensor(list(values), dtype=torch.int32, device=self._device)

    def _attention_call(
        self, point: Point, run: Callable[..., None], sizes: tuple[int, ...]
    ) -> Call:
        heads = HeadShape(num_qo_heads=sizes[0], num_kv_heads=sizes[1], head_dim=sizes[2])
        k_pages, v_pages = self._pool(heads)
        rows, share = point.tokens, point.num_sms
        qkv = self.randn(rows, heads.qo_size + 2 * heads.kv_size)
        if point.kind == "rope_append":
            positions = self._ints(range(rows))
            slots = torch.randperm(
                k_pages.shape[0] * PAGE_SIZE, device=self._device, generator=self._generator
            )[:rows].to(torch.int32)
            angles = torch.rand(rows, heads.head_dim // 2, device=self._device)
            cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
            return lambda: run(qkv, positions, slots, cos_sin, k_pages, v_pages, heads, share)
        out = self.randn(rows, heads.qo_size)
        if point.kind == "decode_attention":
            decode = DecodeRows(
                row_ids_R=self._ints(range(rows)),
                kv_lens_R=self._ints([point.kv_len] * rows),
                page_table_RP=self._page_table(k_pages.shape[0], rows, point.kv_len),
                max_kv_len=point.kv_len,
            )
            return lambda: run(qkv, k_pages, v_pages, decode, out, heads, share)
        prefill = self._prefill_rows(point, k_pages.shape[0])
        return lambda: run(qkv, k_pages, v_pages, prefill, out, heads, share)

    def _prefill_rows(self, point: Point, num_pages: int) -> PrefillRows:
        """Whole prompts of `kv_len` tokens, the last one cut; or one chunk that ends a prompt."""
        if point.tokens < point.kv_len:
            segments = [point.tokens]
            starts = [point.kv_len - point.tokens]
        else:
            full, rest = divmod(point.tokens, point.kv_len)
            segments = [point.kv_len] * full + ([rest] if rest else [])
            starts = [0] * len(segments)
        first_rows = [sum(segments[:index]) for index in range(len(segments))]
        return PrefillRows(
            row_starts_S=self._ints(first_rows),
            num_rows_S=self._ints(segments),
            position_starts_S=self._ints(starts),
            page_table_SP=self._page_table(num_pages, len(segments), point.kv_len),
            segment_rows=tuple(segments),
            max_kv_len=point.kv_len,
        )
