"""Arrays that the host fills and the device reads, in one block that is copied at once.

On a GPU host the blocks of host memory are pinned and take turns, so that one is filled while the
other is on its way. On a CPU the tensors are the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Kind = Literal["i8", "i4", "?"]
Array = NDArray[Any]
Field = tuple[Kind, tuple[int, ...]]
"""numpy type, shape."""

_TORCH_TYPES: dict[Kind, torch.dtype] = {"i8": torch.int64, "i4": torch.int32, "?": torch.bool}
_ALIGNMENT = 256
_TURNS = 2


class Staging:
    """Named arrays on the host and the tensors they are copied to."""

    tensors: Mapping[str, Tensor]
    """On the device, in place for good."""

    def __init__(
        self, fields: Mapping[str, Field], device: torch.device, block: Tensor | None = None
    ) -> None:
        """Allocate zeros.

        Args:
            fields: type and shape by name.
            device: where the tensors are.
            block: of at least `num_bytes(fields)` on the device, which others that never run at the
                same time may use too: every upload fills its part anew. Not used on a CPU.
        """
        places, end = _places(fields)
        self._is_cuda = device.type == "cuda"
        self._host = [
            torch.zeros(end, dtype=torch.uint8, pin_memory=self._is_cuda)
            for _ in range(_TURNS if self._is_cuda else 1)
        ]
        self._arrays = [
            {
                name: block.numpy()[places[name]].view(kind).reshape(shape)
                for name, (kind, shape) in fields.items()
            }
            for block in self._host
        ]
        self._copied = [torch.cuda.Event() for _ in self._host] if self._is_cuda else []
        self._turn = 0
        self._block = self._host[0]
        if self._is_cuda:
            self._block = self._host[0].to(device) if block is None else block[:end]
        self.tensors = {
            name: self._block[places[name]].view(_TORCH_TYPES[kind]).view(shape)
            for name, (kind, shape) in fields.items()
        }

    def next_arrays(self) -> Mapping[str, Array]:
        """Arrays to fill now; they hold what some earlier turn left."""
        self._turn = (self._turn + 1) % len(self._arrays)
        if self._is_cuda:
            self._copied[self._turn].synchronize()  # of two steps ago, long done
        return self._arrays[self._turn]

    def upload(self) -> None:
        """Copy what was filled to the device, behind all that the current stream holds."""
        if self._is_cuda:
            self._block.copy_(self._host[self._turn], non_blocking=True)
            self._copied[self._turn].record()


def num_bytes(fields: Mapping[str, Field]) -> int:
    """Of the block that holds them all."""
    return _places(fields)[1]


def _places(fields: Mapping[str, Field]) -> tuple[dict[str, slice], int]:
    """Where each field lies in the block, and the bytes of the block."""
    places: dict[str, slice] = {}
    offset = 0
    for name, (kind, shape) in fields.items():
        end = offset + prod(shape) * np.dtype(kind).itemsize
        places[name] = slice(offset, end)
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
    return places, offset
