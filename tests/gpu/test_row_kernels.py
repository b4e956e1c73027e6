"""Row-wise kernels against float64.

Needs a GPU; with TRITON_INTERPRET=1 the Triton ones also run on a CPU with Triton installed.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from .kernel_reference import (  # noqa: E402
    DEVICE,
    DTYPE,
    MARKS,
    PAGE,
    randn,
    relative_error,
    tolerance,
)

pytestmark = MARKS


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
    silu_mul(up_gate, out)
    up, gate = up_gate.double().chunk(2, dim=-1)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < tolerance()


def test_rope_append_rotates_and_writes_the_slots(heads):
    from nanoflow_tune.runtime.kernels.triton_rows import rope_append

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


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_norm_sums_what_was_received_in_rank_order(rank):
    from nanoflow_tune.runtime.kernels import torch_ops
    from nanoflow_tune.runtime.kernels.registry import Received
    from nanoflow_tune.runtime.kernels.triton_rows import add_rms_norm

    parts, residual, weight = randn(3, 7, 96, seed=4), randn(5, 96, seed=5), randn(96, seed=6)
    delta = parts[rank, 1:6].clone()
    parts[rank] = float("nan")
    received = Received(parts[:, 1:6], rank)
    expected, expected_out = residual.clone(), torch.empty_like(residual)
    torch_ops.norm(expected, delta, weight, expected_out, 1e-5, 132, received)
    out = torch.empty_like(residual)
    add_rms_norm(residual, delta, weight, out, 1e-5, 132, received)
    assert torch.equal(residual, expected)
    assert relative_error(out, expected_out) < tolerance()
