"""Scratch memory is one for each stream, kind and size; what a capture makes is not kept."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from nanoflow_tune.runtime.kernels import workspace  # noqa: E402


@dataclass
class Memory:
    size: int


@dataclass
class Other:
    size: int


@pytest.fixture
def state(monkeypatch):
    """A pretended device: which stream is current, and whether it captures."""
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(workspace, "_kept", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=state.stream)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def take(kind=Memory, size=4):
    return workspace.per_stream(kind, size, lambda: kind(size))


def test_a_stream_gets_its_own_again(state):
    first = take()
    assert take() is first
    assert take(size=8) is not first
    assert isinstance(take(Other), Other)
    state.stream = 2
    assert take() is not first
    state.stream = 1
    assert take() is first


def test_a_capture_uses_what_is_there_and_keeps_nothing_of_its_own(state):
    state.capturing = True
    made = take()
    assert take() is not made
    state.capturing = False
    kept = take()
    assert kept is not made
    state.capturing = True
    assert take() is kept
