"""Sampling over whole rows in Triton against PyTorch.

Needs a GPU; with TRITON_INTERPRET=1 they also run on a CPU with Triton installed.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from nanoflow_tune.runtime.kernels import sampling_rows  # noqa: E402

from .kernel_reference import DEVICE, MARKS  # noqa: E402

pytestmark = MARKS
SHAPES = [(3, 5000, 0), (5, 4096, 64128), (2, 37, 128000)]
"""Rows, vocabulary of the rank, its first token."""


def _case(rows, vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * 3).round(decimals=1).to(dtype)
    thresholds = torch.tensor([float("-inf"), 1.5, 4.0, float("nan"), -2.0])[:rows]
    temperatures = torch.tensor([0.0, 0.7, 1.0, 2.0, 1e-6])[:rows]
    keys = sampling_rows.row_keys(torch.arange(rows) * 2**33 + 1, torch.arange(rows) + 5)
    return [x.to(DEVICE) for x in (logits, thresholds, temperatures, keys)]


@pytest.mark.parametrize(("rows", "vocab", "start"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_token_wins(rows, vocab, start, dtype):
    from nanoflow_tune.runtime.kernels import triton_sampling

    case = _case(rows, vocab, dtype)
    got, columns = triton_sampling.noisy_best(*case, start)
    expected, expected_columns = sampling_rows.noisy_best(*case, start)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    is_some = expected > float("-inf")
    assert torch.equal(columns[is_some], expected_columns[is_some])


@pytest.mark.parametrize(("rows", "vocab", "start"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mass_and_counts_above_a_threshold(rows, vocab, start, dtype):
    from nanoflow_tune.runtime.kernels import triton_sampling

    logits, thresholds, temperatures, _ = _case(rows, vocab, dtype)
    largest = logits.amax(dim=1).float()
    for scales in (temperatures, torch.zeros_like(largest)):
        got = triton_sampling.kept_mass(logits, thresholds, largest, scales)
        expected = sampling_rows.kept_mass(logits, thresholds, largest, scales)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    counts = (logits.float() >= thresholds[:, None]).sum(dim=1).double()
    assert torch.equal(got, counts)


@pytest.mark.parametrize(("rows", "vocab", "start"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_the_largest_logits_is_greedy(rows, vocab, start, dtype):
    from nanoflow_tune.runtime.kernels import triton_sampling

    logits = _case(rows, vocab, dtype)[0]  # rounded: many are equal
    logits[-1] = float("-inf")
    best = torch.empty(rows, dtype=dtype, device=DEVICE)
    columns = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    triton_sampling.largest(logits, best, columns)
    assert torch.equal(best, logits.amax(dim=1))
    places = torch.arange(vocab, device=DEVICE).expand(rows, vocab)
    first = places.masked_fill(logits != best[:, None], vocab).amin(dim=1)
    assert torch.equal(columns, first)
