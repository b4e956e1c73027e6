"""Attention variants that a CUDA graph holds, for schedules whose own ones plan on the host.

The registry says what is there; the order of preference is that of the measurements
(results/README.md). All ranks of a model ask for the same shapes, so they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..host_planned import HOST_PLANNED
from ..op_graph import OpGraph, OpKind
from ..weights import torch_dtype
from . import load, sm90_attention
from .registry import HeadShape, variants

_ATTENTION: tuple[OpKind, ...] = ("decode_attention", "prefill_attention")
_BEST_FIRST = ("sm90", "triton")
_HOPPER = 9
"""Major compute capability that sm90 kernels are compiled for; they run on no other."""


def graph_variants(graph: OpGraph, page_size: int, major: int | None = None) -> dict[OpKind, str]:
    """The best variant of each attention kind that plans nothing on the host and takes the model.

    Args:
        graph: of the model on one rank.
        page_size: tokens of a page of the KV cache.
        major: compute capability; None: that of this process's GPU.
    """
    load("cuda")
    if major is None:
        major, _ = torch.cuda.get_device_capability()
    model = graph.model
    heads = HeadShape(
        num_qo_heads=model.num_attention_heads // graph.tp_degree,
        num_kv_heads=model.num_key_value_heads // graph.tp_degree,
        head_dim=model.head_dim,
    )
    dtype = torch_dtype(model.torch_dtype)
    takes_sm90 = major == _HOPPER and sm90_attention.takes(heads, dtype, page_size)
    return {
        kind: _best(variants(kind, "cuda"), lambda name: takes_sm90 or not name.startswith("sm90"))
        for kind in _ATTENTION
    }


def _best(names: tuple[str, ...], is_fit: Callable[[str], bool]) -> str:
    able = [name for name in names if is_fit(name) and not name.startswith(HOST_PLANNED)]
    ranked = [name for name in _BEST_FIRST if name in able]
    return (ranked or able)[0]
