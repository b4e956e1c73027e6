"""An empty nano-batch launches nothing and writes nothing, whichever the kernel variant.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
FlashInfer's are left out: they plan per nano-op, and a nano-op without rows is never planned.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels.registry import DecodeRows, HeadShape, PrefillRows  # noqa: E402

from .kernel_reference import DEVICE, DTYPE, INTERPRETED, MARKS, PAGE, randn  # noqa: E402

pytestmark = MARKS
HEADS = [HeadShape(num_qo_heads=8, num_kv_heads=2, head_dim=dim) for dim in (64, 128)]


def kernels_of(kind):
    """Variants that this machine can run, by name."""
    from nanoflow_tune.runtime import kernels
    from nanoflow_tune.runtime.kernels import registry, triton_attention, triton_gemm, triton_rows

    del triton_attention, triton_gemm, triton_rows  # registered
    if not INTERPRETED:
        kernels.load("cuda")
    names = [name for name in registry.variants(kind, "cuda") if not name.startswith("flashinfer")]
    if INTERPRETED:
        names = [name for name in names if name.startswith("triton")]
    return {name: registry.kernel(kind, name, "cuda") for name in names}


def poisoned(*shape):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=DTYPE)


def assert_untouched(*tensors):
    if not INTERPRETED:
        torch.cuda.synchronize()
    assert all(bool(tensor.isnan().all()) for tensor in tensors)


@pytest.mark.parametrize("num_sms", [8, 132])
def test_gemms_without_rows(num_sms):
    weight, out = randn(256, 64, seed=1), poisoned(4, 256)
    found = kernels_of("gemm")
    assert found
    for run in found.values():
        for bias in (None, randn(256, seed=2)):
            run(randn(4, 64)[:0], weight, bias, out[2:2], num_sms)
    for run in kernels_of("gemm_silu").values():
        run(randn(4, 64)[:0], weight, out[2:2], poisoned(4, 128)[2:2], num_sms)
    assert_untouched(out)


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"d{heads.head_dim}")
def test_attention_without_rows(heads):
    pages = [randn(4, heads.num_kv_heads, PAGE, heads.head_dim, seed=s) for s in (1, 2)]
    qkv, out = randn(3, heads.qo_size + 2 * heads.kv_size), poisoned(3, heads.qo_size)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    table = torch.empty(0, 4, dtype=torch.int32, device=DEVICE)
    decode = DecodeRows(row_ids_R=none, kv_lens_R=none, page_table_RP=table, max_kv_len=0)
    prefill = PrefillRows(
        row_starts_S=none,
        num_rows_S=none,
        position_starts_S=none,
        page_table_SP=table,
        segment_rows=(),
        max_kv_len=0,
    )
    for kind, rows in (("decode_attention", decode), ("prefill_attention", prefill)):
        found = kernels_of(kind)
        assert found
        for run in found.values():
            run(qkv, *pages, rows, out, heads, 8)
    assert_untouched(out)


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"d{heads.head_dim}")
def test_norms_and_rotary_without_rows(heads):
    residual, out, weight = poisoned(3, 96), poisoned(3, 96), randn(96)
    for run in kernels_of("norm").values():
        run(residual[1:1], residual[1:1], weight, out[1:1], 1e-5, 132)
        run(residual[1:1], None, weight, out[1:1], 1e-5, 132)
    pages = [poisoned(4, heads.num_kv_heads, PAGE, heads.head_dim) for _ in range(2)]
    qkv = poisoned(3, heads.qo_size + 2 * heads.kv_size)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    cos_sin = torch.ones(8, heads.head_dim, device=DEVICE)
    for run in kernels_of("rope_append").values():
        run(qkv[1:1], none, none, cos_sin, *pages, heads, 132)
    assert_untouched(residual, out, qkv, *pages)


def test_norms_write_their_rows_only():
    whole, out, weight = randn(7, 200, seed=3), poisoned(7, 200), randn(200, seed=4)
    for name, run in kernels_of("norm").items():
        residual, delta = whole.clone(), randn(7, 200, seed=5)
        before = residual.clone()
        run(residual[2:5], delta[2:5], weight, out[2:5], 1e-5, 132)
        assert torch.equal(residual[:2], before[:2]), name
        assert torch.equal(residual[5:], before[5:]), name
        assert bool(out[2:5].isfinite().all()), name
        assert_untouched(out[:2], out[5:])
