"""Scratch memory of a kernel, one for each stream, kept because CUDA graphs hold its address.

Launches on one stream take turns and may share it; so may graphs that were captured on it, unless
two of them run at once. What is allocated inside a capture belongs to the graph, and its zeros are
written at replay only, so it is not kept: correct, at the price of a memset a call. An executor
runs eagerly before it captures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Memory = TypeVar("Memory")
_kept: dict[tuple[int, int, Hashable], object] = {}


def per_stream(kind: type[Memory], size: Hashable, make: Callable[[], Memory]) -> Memory:
    """The current stream's memory of this kind and size, made when there is none."""
    stream = torch.cuda.current_stream()
    key = (torch.cuda.current_device(), stream.cuda_stream, (kind, size))
    found = _kept.get(key)
    if isinstance(found, kind):
        return found
    made = make()
    if not torch.cuda.is_current_stream_capturing():
        _kept[key] = made
    return made
