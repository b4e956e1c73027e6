"""Kernels against float64 references, every variant, poisoned outputs.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import (  # noqa: E402
    DecodeRows,
    HeadShape,
    PrefillRows,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

PAGE = 16


def relative_error(out, reference):
    out, reference = out.double().cpu(), reference.double().cpu()
    return float((out - reference).norm() / reference.norm())


def tolerance():
    return 1e-3 if INTERPRETED else 1e-2


def randn(*shape, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=generator).to(DTYPE)


def paged_cache(kv_lens, heads, seed=1):
    """Random K and V in random pages; returns pages, page table and dense K, V per request."""
    pages_each = [-(-length // PAGE) for length in kv_lens]
    total = sum(pages_each) + 3
    shape = (total, heads.num_kv_heads, PAGE, heads.head_dim)
    k_pages, v_pages = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.zeros(len(kv_lens), max(pages_each), dtype=torch.int32)
    dense = []
    for request, count in enumerate(pages_each):
        mine = [order.pop() for _ in range(count)]
        table[request, :count] = torch.tensor(mine, dtype=torch.int32)
        gather = [
            pages[mine].transpose(1, 2).reshape(-1, heads.num_kv_heads, heads.head_dim)
            for pages in (k_pages, v_pages)
        ]
        dense.append(tuple(x[: kv_lens[request]] for x in gather))
    return k_pages, v_pages, table.to(DEVICE), dense


def attend(q_NH, k_TKH, v_TKH):
    """float64 attention of one row: q [heads, dim]."""
    group = q_NH.shape[0] // k_TKH.shape[1]
    k = k_TKH.double().repeat_interleave(group, dim=1)
    v = v_TKH.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("nh,tnh->nt", q_NH.double(), k) / q_NH.shape[1] ** 0.5
    return torch.einsum("nt,tnh->nh", scores.softmax(dim=-1), v)


def heads_shape():
    return HeadShape(num_qo_heads=4, num_kv_heads=2, head_dim=32 if INTERPRETED else 128)


def test_decode_attention_matches_float64_and_touches_only_its_rows():
    from nanoflow_tune.runtime.kernels.triton_attention import decode_attention

    heads = heads_shape()
    kv_lens = [1, 17, 64, 100] if INTERPRETED else [1, 16, 17, 100, 1000, 4097]
    k_pages, v_pages, table, dense = paged_cache(kv_lens, heads)
    rows = [2 * index + 1 for index in range(len(kv_lens))]
    width = heads.qo_size + 2 * heads.kv_size
    qkv = randn(2 * len(kv_lens) + 2, width, seed=5)
    out = torch.full((qkv.shape[0], heads.qo_size), float("nan"), device=DEVICE, dtype=DTYPE)
    meta = DecodeRows(
        row_ids_R=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        kv_lens_R=torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE),
        page_table_RP=table,
        max_kv_len=max(kv_lens),
    )
    decode_attention(qkv, k_pages, v_pages, meta, out, heads, 4)
    for row, (k, v) in zip(rows, dense, strict=True):
        q = qkv[row, : heads.qo_size].view(heads.num_qo_heads, heads.head_dim)
        assert relative_error(out[row], attend(q, k, v).flatten()) < tolerance()
    others = [row for row in range(qkv.shape[0]) if row not in rows]
    assert bool(out[others].isnan().all())


def test_prefill_attention_is_causal_over_chunks():
    from nanoflow_tune.runtime.kernels.triton_attention import prefill_attention

    heads = heads_shape()
    segments = [(0, 5), (9, 30), (3, 140)] if INTERPRETED else [(0, 5), (300, 300), (64, 129)]
    kv_lens = [start + count for start, count in segments]
    k_pages, v_pages, table, dense = paged_cache(kv_lens, heads)
    total = sum(count for _, count in segments) + 4
    qkv = randn(total, heads.qo_size + 2 * heads.kv_size, seed=6)
    out = torch.full((total, heads.qo_size), float("nan"), device=DEVICE, dtype=DTYPE)
    starts, row = [], 2
    for _, count in segments:
        starts.append(row)
        row += count

    def column(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    meta = PrefillRows(
        row_starts_S=column(starts),
        num_rows_S=column([count for _, count in segments]),
        position_starts_S=column([start for start, _ in segments]),
        page_table_SP=table,
        segment_rows=tuple(count for _, count in segments),
        max_kv_len=max(kv_lens),
    )
    prefill_attention(qkv, k_pages, v_pages, meta, out, heads, 4)
    for (start, count), first, (k, v) in zip(segments, starts, dense, strict=True):
        expected = torch.stack(
            [
                attend(
                    qkv[first + i, : heads.qo_size].view(heads.num_qo_heads, heads.head_dim),
                    k[: start + i + 1],
                    v[: start + i + 1],
                ).flatten()
                for i in range(count)
            ]
        )
        assert relative_error(out[first : first + count], expected) < tolerance()
    assert bool(out[:2].isnan().all())
    assert bool(out[row:].isnan().all())


def gemm_variants():
    from nanoflow_tune.runtime.kernels.triton_gemm import TILES

    names = [tile.name for tile in TILES]
    return names if INTERPRETED else ["cublas", *names]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_sms", [16, 100, 132])
def test_gemm_variants_match_float64(num_sms, has_bias):
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry, triton_gemm  # noqa: F401

    if not INTERPRETED:
        kernels.load("cuda")
    rows, width, depth = (70, 130, 96) if INTERPRETED else (330, 1160, 1024)
    x, weight = randn(rows, depth, seed=7), randn(width, depth, seed=8)
    if INTERPRETED:
        width = 132
        weight = randn(width, depth, seed=8)
    bias = randn(width, seed=9) if has_bias else None
    reference = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for name in gemm_variants():
        buffer = torch.full((rows + 2, width), float("nan"), device=DEVICE, dtype=DTYPE)
        registry._VARIANTS["gemm", name, "cuda"].kernel(x, weight, bias, buffer[1:-1], num_sms)
        assert relative_error(buffer[1:-1], reference) < tolerance(), name
        assert bool(buffer[0].isnan().all() and buffer[-1].isnan().all()), name


def test_norm_adds_the_delta_and_normalises():
    from nanoflow_tune.runtime.kernels.triton_rows import add_rms_norm

    residual, delta, weight = randn(5, 96, seed=1), randn(5, 96, seed=2), randn(96, seed=3)
    expected_residual = (residual.float() + delta.float()).to(DTYPE)
    x = expected_residual.double()
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = torch.empty_like(residual)
    add_rms_norm(residual, delta, weight, out, 1e-5, 132)
    assert torch.equal(residual, expected_residual)
    assert relative_error(out, expected) < tolerance()
    add_rms_norm(residual, None, weight, out, 1e-5, 132)
    assert relative_error(out, expected) < tolerance()


def test_silu_mul_matches_float64():
    from nanoflow_tune.runtime.kernels.triton_rows import silu_mul

    up_gate = randn(7, 2 * 80, seed=4)
    out = torch.empty(7, 80, device=DEVICE, dtype=DTYPE)
    silu_mul(up_gate, out, 132)
    up, gate = up_gate.double().chunk(2, dim=-1)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < tolerance()


def test_rope_append_rotates_and_writes_the_slots():
    from nanoflow_tune.runtime.kernels.triton_rows import rope_append

    heads = heads_shape()
    width = heads.qo_size + 2 * heads.kv_size
    qkv = randn(3, width, seed=11)
    before = qkv.double().clone()
    half = heads.head_dim // 2
    angles = torch.arange(64, device=DEVICE)[:, None] * torch.logspace(0, -3, half, device=DEVICE)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    positions = torch.tensor([0, 5, 63], device=DEVICE, dtype=torch.int32)
    slots = torch.tensor([3, 40, 17], device=DEVICE, dtype=torch.int32)
    pages = [
        torch.full((4, heads.num_kv_heads, PAGE, heads.head_dim), float("nan"), device=DEVICE).to(
            DTYPE
        )
        for _ in range(2)
    ]
    rope_append(qkv, positions, slots, cos_sin, pages[0], pages[1], heads, 132)
    cos, sin = cos_sin[positions.long()].double().chunk(2, dim=-1)
    x = before[:, : heads.qo_size + heads.kv_size].view(3, -1, heads.head_dim)
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat(
        [
            first * cos[:, None] - second * sin[:, None],
            second * cos[:, None] + first * sin[:, None],
        ],
        dim=-1,
    ).flatten(1)
    assert relative_error(qkv[:, : heads.qo_size + heads.kv_size], rotated) < tolerance()
    for row, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE)
        k = qkv[row, heads.qo_size : heads.qo_size + heads.kv_size]
        v = qkv[row, heads.qo_size + heads.kv_size :]
        assert torch.equal(pages[0][page, :, offset].flatten(), k)
        assert torch.equal(pages[1][page, :, offset].flatten(), v)
    written = sum(int((~p.isnan()).sum()) for p in pages)
    assert written == 2 * 3 * heads.kv_size
