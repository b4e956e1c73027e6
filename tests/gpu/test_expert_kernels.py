"""Router and combine of experts by Triton against PyTorch; poisoned outputs; CUDA graphs.

Needs a GPU; with TRITON_INTERPRET=1 they also run on a CPU with Triton installed.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from .kernel_reference import DEVICE, DTYPE, INTERPRETED, MARKS, randn, tolerance  # noqa: E402

pytestmark = MARKS

SHAPES = [(1, 72, 8, 2), (7, 256, 8, 2), (33, 264, 4, 1), (600, 64, 8, 2), (50, 128, 40, 6)]
"""Rows, hidden, experts, experts of a row."""


def kernel(kind):
    from nanoflow_tune.runtime.kernels import registry, triton_experts  # noqa: F401

    return registry.kernel(kind, "triton", "cuda")


def outputs(rows, hidden, experts, per_token):
    """Poisoned, with a row before and behind."""
    routed = torch.full((rows * per_token + 2, hidden), float("nan"), device=DEVICE, dtype=DTYPE)
    offsets = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
    places = torch.full((rows, per_token), -1, dtype=torch.int32, device=DEVICE)
    weights = torch.full((rows, per_token), float("nan"), device=DEVICE)
    return routed, offsets, places, weights


def check_routing(x, router, routed, offsets, places, weights):
    experts, per_token = router.shape[0], places.shape[1]
    logits = x.double() @ router.double().T
    # Chosen logits, through the place of each row: whose range a place lies in is its expert.
    chosen = torch.searchsorted(offsets.long(), places.long(), right=True)
    values = logits.gather(1, chosen)
    best = logits.topk(per_token, dim=1).values
    torch.testing.assert_close(values, best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.double(), best.softmax(dim=1), rtol=1e-3, atol=1e-3)
    assert int(offsets[-1]) == places.numel()
    assert torch.equal(
        places.flatten().sort().values.long(), torch.arange(places.numel()).to(DEVICE)
    )
    assert torch.equal(routed[1:-1][places.long()], x.unsqueeze(1).expand(-1, per_token, -1))
    assert bool(routed[0].isnan().all() and routed[-1].isnan().all())
    for expert in range(experts):  # in the order of the batch
        own = places[chosen == expert]
        assert bool((own.diff() > 0).all())


@pytest.mark.parametrize(("rows", "hidden", "experts", "per_token"), SHAPES)
def test_rows_go_to_their_best_experts_in_order(rows, hidden, experts, per_token):
    x, router = randn(rows, hidden, seed=1), randn(experts, hidden, seed=2)
    routed, offsets, places, weights = outputs(rows, hidden, experts, per_token)
    kernel("moe_router")(x, router, routed[1:-1], offsets, places, weights, 8)
    check_routing(x, router, routed, offsets, places, weights)


def test_all_rows_may_go_to_one_expert():
    x = randn(20, 64, seed=1).abs()
    router = torch.zeros(8, 64, device=DEVICE, dtype=DTYPE)
    router[5], router[2] = 1.0, 0.5
    routed, offsets, places, weights = outputs(20, 64, 8, 2)
    kernel("moe_router")(x, router, routed[1:-1], offsets, places, weights, 8)
    assert offsets.tolist() == [0, 0, 20, 20, 20, 40, 40, 40]
    assert places.tolist() == [[20 + row, row] for row in range(20)]


@pytest.mark.parametrize(("rows", "hidden", "experts", "per_token"), SHAPES)
def test_the_combine_is_the_weighted_sum(rows, hidden, experts, per_token):
    results = randn(rows * per_token, hidden, seed=3)
    places = torch.randperm(rows * per_token).to(torch.int32).view(rows, per_token).to(DEVICE)
    weights = randn(rows, per_token, seed=4).float().softmax(dim=1)
    out = torch.full((rows + 2, hidden), float("nan"), device=DEVICE, dtype=DTYPE)
    kernel("moe_combine")(results, places, weights, out[1:-1], 8)
    expected = (results[places.long()].double() * weights.double().unsqueeze(-1)).sum(1)
    error = (out[1:-1].double() - expected).norm() / expected.norm()
    assert float(error) < tolerance()
    assert bool(out[0].isnan().all() and out[-1].isnan().all())


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_replay_follows_the_rows_of_its_time():
    router = randn(8, 4096, seed=2)
    routed, offsets, places, weights = outputs(256, 4096, 8, 2)
    x = randn(256, 4096, seed=1)
    run = kernel("moe_router")
    run(x, router, routed[1:-1], offsets, places, weights, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, router, routed[1:-1], offsets, places, weights, 16)
    x.copy_(randn(256, 4096, seed=9))
    graph.replay()
    check_routing(x, router, routed, offsets, places, weights)
