"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[(d, g) for d in (64, 128) for g in (1, 4, 8)], ids="d{0[0]}-g{0[1]}".format)
def heads(request):
    from nanoflow_tune.runtime.kernels.registry import HeadShape

    head_dim, group = request.param
    return HeadShape(num_qo_heads=2 * group, num_kv_heads=2, head_dim=head_dim)


@pytest.fixture
def poisoned_memory():
    """New tensors are NaN or the largest integer: a kernel that reads what it never wrote shows."""
    import torch

    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
