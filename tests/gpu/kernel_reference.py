"""What the kernel tests share: operands, float64 references, tolerances."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import DecodeRows  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
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


def decode_operands(kv_lens, heads):
    """Arguments of a decode kernel but for the SM share, its out poisoned, and its reference."""
    k_pages, v_pages, table, dense = paged_cache(kv_lens, heads)
    rows = [2 * index + 1 for index in range(len(kv_lens))]
    qkv = randn(2 * len(kv_lens) + 2, heads.qo_size + 2 * heads.kv_size, seed=5)
    out = torch.full((qkv.shape[0], heads.qo_size), float("nan"), device=DEVICE, dtype=DTYPE)
    meta = DecodeRows(
        row_ids_R=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        kv_lens_R=torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE),
        page_table_RP=table,
        max_kv_len=max(kv_lens),
    )
    q = qkv[rows, : heads.qo_size].view(-1, heads.num_qo_heads, heads.head_dim)
    reference = [attend(one, k, v).flatten() for one, (k, v) in zip(q, dense, strict=True)]
    return (qkv, k_pages, v_pages, meta, out, heads), rows, torch.stack(reference)


def assert_rows(out, rows, reference):
    """Each row is right, and no other row was written."""
    for row, expected in zip(rows, reference, strict=True):
        assert relative_error(out[row], expected) < tolerance()
    others = [row for row in range(out.shape[0]) if row not in rows]
    assert bool(out[others].isnan().all())
