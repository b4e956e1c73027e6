"""Paged keys and values: a pool of pages per layer, and which of them are free.

Shape legend: L layers, Z = 2 (keys, values), P pages, G kv heads of this rank, B tokens of a page,
H head dim.

Page 0 is never handed out: page tables are padded with it, and verification uses it as a guard.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ..search_spaces.schema import DTYPE_BYTES, Dtype, ModelSpec
from .kv_sizes import PAGE_SIZE, pages_for
from .weights import seeded_generator, torch_dtype


class OutOfPagesError(RuntimeError):
    """The cache has fewer free pages than a request needs."""


def cache_bytes(
    model: ModelSpec, tp_degree: int, num_pages: int, page_size: int, dtype: Dtype
) -> int:
    """Bytes of the cache of one rank, all layers."""
    per_token = 2 * model.num_hidden_layers * (model.kv_size // tp_degree) * DTYPE_BYTES[dtype]
    return per_token * num_pages * page_size


class PagedKvCache:
    """Keys and values of all layers on one rank, in pages that are handed out in random order."""

    k_pages: tuple[Tensor, ...]
    """Per layer, [P, G, B, H]."""
    v_pages: tuple[Tensor, ...]
    """Per layer, [P, G, B, H]."""

    def __init__(
        self,
        model: ModelSpec,
        *,
        num_pages: int,
        device: torch.device,
        tp_degree: int = 1,
        rank: int = 0,
        page_size: int = PAGE_SIZE,
        num_layers: int | None = None,
        seed: int = 0,
    ) -> None:
        """Make `num_pages` pages besides the reserved page 0.

        Args:
            model: its dtype is that of the cache.
            num_pages: pages that can be handed out.
            device: where the pages live.
            tp_degree: tensor-parallel ranks; each holds its share of the kv heads.
            rank: this rank.
            page_size: tokens of a page.
            num_layers: fewer layers than the model has, for verification.
            seed: of the order in which pages are handed out.
        """
        self.page_size = page_size
        self._first_head = rank * (model.num_key_value_heads // tp_degree)
        self._free = list(range(1, num_pages + 1))
        random.Random(seed).shuffle(self._free)
        shape = (
            num_pages + 1,
            model.num_key_value_heads // tp_degree,
            page_size,
            model.head_dim,
        )
        layers = model.num_hidden_layers if num_layers is None else num_layers
        dtype = torch_dtype(model.torch_dtype)
        self.pool_LZPGBH = torch.zeros((layers, 2, *shape), dtype=dtype, device=device)
        """All of it in one tensor, by layer and keys or values, so that pages move as a whole."""
        self.k_pages = tuple(layer_ZPGBH[0] for layer_ZPGBH in self.pool_LZPGBH)
        self.v_pages = tuple(layer_ZPGBH[1] for layer_ZPGBH in self.pool_LZPGBH)

    @property
    def num_free_pages(self) -> int:
        """Pages that can still be handed out."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's pages, all layers, page 0 included."""
        return self.pool_LZPGBH.numel() * self.pool_LZPGBH.element_size()

    def allocate(self, num_tokens: int) -> tuple[int, ...]:
        """Hand out pages for `num_tokens` tokens of one request.

        Raises:
            OutOfPagesError: not enough pages are free.
        """
        count = pages_for(num_tokens, self.page_size)
        if count > len(self._free):
            raise OutOfPagesError(
                f"a request of {num_tokens} tokens needs {count} pages of {self.page_size} tokens, "
                f"but {len(self._free)} are free: release requests, or make the cache larger"
            )
        pages = tuple(self._free[-count:][::-1]) if count else ()
        del self._free[len(self._free) - count :]
        return pages

    def release(self, pages: tuple[int, ...]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))

    def fill_random(self, seed: int) -> None:
        """Fill all pages with normal values; a kv head has the same ones for every `tp_degree`."""
        for name, layers in (("k", self.k_pages), ("v", self.v_pages)):
            for layer, pages_PGBH in enumerate(layers):
                for head in range(pages_PGBH.shape[1]):
                    key = f"{name}/{layer}/{self._first_head + head}"
                    generator = seeded_generator(seed, key, pages_PGBH.device)
                    pages_PGBH[:, head].normal_(generator=generator)
