from __future__ import annotations

import pytest
import torch

from nanoflow_tune.runtime.kernels import load, registry, torch_ops
from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape, PrefillRows

HEADS = HeadShape(num_qo_heads=6, num_kv_heads=2, head_dim=8)
PAGE = 4


def _int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def cache():
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(12, 2, PAGE, 8, generator=generator)
    v = torch.randn(12, 2, PAGE, 8, generator=generator)
    return k, v


def _reference(q_MH, pages, table, kv_len, head):
    """float64 attention of the query heads of one kv head, key by key."""
    k, v = pages
    keys = [k[table[n // PAGE], head, n % PAGE].double() for n in range(kv_len)]
    values = [v[table[n // PAGE], head, n % PAGE].double() for n in range(kv_len)]
    scores = torch.stack([q_MH.double() @ key for key in keys], dim=-1) / 8**0.5
    return torch.softmax(scores, dim=-1) @ torch.stack(values)


def _expected_row(qkv_row, pages, table, kv_len):
    q = qkv_row[: HEADS.qo_size].view(6, 8)
    heads = [_reference(q[g * 3 : g * 3 + 3], pages, table, kv_len, g) for g in range(2)]
    return torch.cat(heads).flatten()


@pytest.mark.parametrize("gather_elements", [1, 1 << 26])
def test_decode_attention_equals_a_float64_reference_and_touches_only_its_rows(
    cache, monkeypatch, gather_elements
):
    monkeypatch.setattr(torch_ops, "_GATHER_ELEMENTS", gather_elements)
    qkv = torch.randn(7, 80, generator=torch.Generator().manual_seed(1))
    tables, kv_lens, row_ids = [[3, 7, 1], [5, 0, 0], [2, 4, 0]], [11, 1, 8], [5, 0, 3]
    rows = DecodeRows(
        row_ids_R=_int32(row_ids),
        kv_lens_R=_int32(kv_lens),
        page_table_RP=_int32(tables),
        max_kv_len=11,
    )
    out = torch.full((7, HEADS.qo_size), float("nan"))
    torch_ops.decode_attention(qkv, *cache, rows, out, HEADS, 1)
    for row, table, kv_len in zip(row_ids, tables, kv_lens, strict=True):
        expected = _expected_row(qkv[row], cache, table, kv_len)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)
    assert out[[1, 2, 4, 6]].isnan().all()


def test_prefill_attention_is_causal_and_reads_earlier_chunks(cache):
    qkv = torch.randn(9, 80, generator=torch.Generator().manual_seed(2))
    rows = PrefillRows(
        row_starts_S=_int32([1, 6]),
        num_rows_S=_int32([4, 2]),
        position_starts_S=_int32([5, 0]),
        page_table_SP=_int32([[9, 2, 6], [4, 0, 0]]),
        segment_rows=(4, 2),
        max_kv_len=9,
    )
    out = torch.full((9, HEADS.qo_size), float("nan"))
    torch_ops.prefill_attention(qkv, *cache, rows, out, HEADS, 1)
    for i in range(4):
        expected = _expected_row(qkv[1 + i], cache, [9, 2, 6], 6 + i)
        torch.testing.assert_close(out[1 + i].double(), expected, rtol=1e-5, atol=1e-6)
    for i in range(2):
        expected = _expected_row(qkv[6 + i], cache, [4], 1 + i)
        torch.testing.assert_close(out[6 + i].double(), expected, rtol=1e-5, atol=1e-6)
    assert out[[0, 5, 8]].isnan().all()


def test_attention_ignores_nan_in_keys_it_must_not_see(cache):
    k, v = (pages.clone() for pages in cache)
    k[5, :, 1:] = v[5, :, 1:] = float("nan")
    k[0] = v[0] = float("nan")
    rows = DecodeRows(
        row_ids_R=_int32([0, 1]),
        kv_lens_R=_int32([1, 8]),
        page_table_RP=_int32([[5, 0], [2, 4]]),
        max_kv_len=8,
    )
    out = torch.zeros(2, HEADS.qo_size)
    torch_ops.decode_attention(torch.ones(2, 80), k, v, rows, out, HEADS, 1)
    assert not out.isnan().any()


def test_rope_append_rotates_halves_and_writes_the_given_slots(cache):
    k, v = (pages.clone() for pages in cache)
    qkv = torch.randn(2, 80, generator=torch.Generator().manual_seed(3))
    before = qkv.clone()
    angles = torch.rand(6, 4)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    slots = torch.tensor([7 * PAGE + 2, 3 * PAGE])
    torch_ops.rope_append(qkv, _int32([5, 0]), slots, table, k, v, HEADS, 1)
    for row, position in enumerate((5, 0)):
        for head in range(8):
            x = before[row, head * 8 : head * 8 + 8]
            turn = torch.exp(1j * angles[position])
            rotated = (x[:4] + 1j * x[4:]) * turn
            expected = torch.cat((rotated.real, rotated.imag))
            torch.testing.assert_close(qkv[row, head * 8 : head * 8 + 8], expected)
    torch.testing.assert_close(k[7, :, 2], qkv[0, 48:64].view(2, 8))
    torch.testing.assert_close(v[3, :, 0], before[1, 64:].view(2, 8))
    changed = (k != cache[0]).any(dim=-1).nonzero().tolist()
    assert changed == [[3, 0, 0], [3, 1, 0], [7, 0, 2], [7, 1, 2]]


def test_norm_adds_the_delta_before_it_normalises():
    residual, delta, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total = (residual + delta).double()
    out = torch.empty(3, 8)
    torch_ops.norm(residual, delta, weight, out, 1e-5, 1)
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(residual.double(), total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_gemm_silu_takes_up_first_and_gate_second(num_rows):
    x, up, gate = torch.randn(num_rows, 8), torch.randn(6, 8), torch.randn(6, 8)
    scratch, out = torch.full((num_rows, 12), torch.nan), torch.full((num_rows, 6), torch.nan)
    torch_ops.gemm_silu(x, torch.cat((up, gate)), scratch, out, 1)
    x64 = x.double()
    expected = torch.nn.functional.silu(x64 @ gate.double().t()) * (x64 @ up.double().t())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_gemm_silu_rounds_both_products_as_an_unfused_kernel_does():
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(12, 64).bfloat16()
    scratch, out, parts = (torch.empty(5, n, dtype=torch.bfloat16) for n in (12, 6, 12))
    torch_ops.gemm_silu(x, weight, scratch, out, 1)
    torch_ops.gemm(x, weight, None, parts, 1)
    up, gate = parts.float().chunk(2, dim=-1)
    assert torch.equal(out, (torch.nn.functional.silu(gate) * up).bfloat16())


def test_every_kind_of_a_layer_has_a_torch_variant_on_cpu_and_cuda():
    load("cpu")
    for kind in ("norm", "gemm", "gemm_silu", "rope_append", "decode_attention",
                 "prefill_attention", "all_reduce", "embedding", "sampling"):  # fmt: skip
        for device in ("cpu", "cuda"):
            assert "torch" in registry.variants(kind, device)


def test_on_a_cpu_every_variant_name_gives_the_torch_kernel():
    load("cpu")
    assert registry.kernel("gemm", "triton_128x256", "cpu") is torch_ops.gemm
