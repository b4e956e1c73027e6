"""Operations of one serving iteration, their cost in FLOPs and bytes, and who waits for whom.

The graph is per tensor-parallel rank: shapes are shards. One layer repeats `num_layers` times
between a prologue (embedding) and an epilogue (final norm, LM head, sampling). What an op costs is
in `op.py`, which ops a model has in `layer_ops.py`.

Notation (paper arXiv 2408.12757 section 3.1 -> here)
    B_dense     rows of the dense batch: every decoding request gives one row, every prefilling
                request as many rows as it has prompt tokens in this iteration
    D_model     hidden_size;  L  num_layers;  S_type  dtype_bytes;  N_GPU  tp_degree

Several ranks may join the attention's output in two forms, row by row of the dense batch as a plan
wants it (section 4.1.2, "AG to AR transformation"):

    all_reduce  o_proj (split by rows) -> attn_all_reduce
    all_gather  attn_all_gather (heads) -> o_proj_columns (split by columns) -> o_all_gather

`layer` has the first; the second is an `Alternative`. The feed-forward has its all-reduce always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from ..search_spaces.schema import ModelSpec
from .layer_ops import epilogue_ops, gather_ops, layer_ops, prologue_ops
from .op import DENSE_GEMM_KINDS as DENSE_GEMM_KINDS
from .op import GEMM_KINDS as GEMM_KINDS
from .op import Dependency as Dependency
from .op import Op as Op
from .op import OpKind as OpKind
from .op import Reach as Reach
from .op import Resource as Resource
from .op import RowMix as RowMix

OutputForm = Literal["all_reduce", "all_gather"]
"""How ranks join the attention's output; one rank has `all_reduce`, and joins nothing."""
OUTPUT_FORMS: tuple[OutputForm, ...] = get_args(OutputForm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A chain of ops that rows of the dense batch may take in the place of one of the layer."""

    form: OutputForm
    replaces: tuple[str, ...]
    """Names of the layer's ops that rows of this form leave out. What waits for the last of them
    waits for the last of `ops` where its rows take this form."""
    ops: tuple[Op, ...]
    """In sequential order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpGraph:
    """All operations of one iteration on one tensor-parallel rank."""

    model: ModelSpec
    tp_degree: int
    prologue: tuple[Op, ...]
    layer: tuple[Op, ...]
    epilogue: tuple[Op, ...]
    alternatives: tuple[Alternative, ...] = ()

    @classmethod
    def build(cls, model: ModelSpec, tp_degree: int = 1) -> OpGraph:
        """The graph with two all-reduces a layer when `tp_degree` > 1, and the other form.

        The other form is left out where the ranks cannot share the hidden columns equally.

        Raises:
            ValueError: heads, FFN or vocabulary do not divide by `tp_degree`.
        """
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(model, name) % tp_degree:
                raise ValueError(
                    f"`{name}` must be a multiple of the tensor-parallel degree, but got "
                    f"{name}={getattr(model, name)}, tp_degree={tp_degree} for {model.name}"
                )
        return cls(
            model=model,
            tp_degree=tp_degree,
            prologue=prologue_ops(model),
            layer=layer_ops(model, tp_degree),
            epilogue=epilogue_ops(model, tp_degree),
            alternatives=_alternatives(model, tp_degree),
        )

    @property
    def num_layers(self) -> int:
        """How often the layer repeats."""
        return self.model.num_hidden_layers

    @property
    def all_ops(self) -> tuple[Op, ...]:
        """The layer's ops, then those that may take the place of some."""
        return self.layer + tuple(op for chain in self.alternatives for op in chain.ops)

    @property
    def forms(self) -> tuple[OutputForm, ...]:
        """Forms that rows may take; the layer's own first."""
        return ("all_reduce", *(chain.form for chain in self.alternatives))

    def op(self, name: str) -> Op:
        """The op of this name, of the layer or of an alternative.

        Raises:
            KeyError: no such op; the message lists the known ones.
        """
        for ops in (self.layer, *(chain.ops for chain in self.alternatives)):
            for op in ops:
                if op.name == name:
                    return op
        known = ", ".join(op.name for op in self.all_ops)
        raise KeyError(f"unknown op {name!r}; this graph has {known}")

    @property
    def op_names(self) -> tuple[str, ...]:
        """Names of the layer's ops, in sequential order; alternatives left out."""
        return tuple(op.name for op in self.layer)

    def dependencies(self, op: Op) -> tuple[Dependency, ...]:
        """What an op waits for, whichever form the rows have.

        At the end of a replaced chain its rows come from either end.
        """
        found = op.dependencies
        for chain in self.alternatives:
            last = chain.replaces[-1]
            found += tuple(replace(on, op=chain.ops[-1].name) for on in found if on.op == last)
        return found

    def in_form(self, form: OutputForm) -> OpGraph:
        """The graph of batches of which all rows have one form: without alternatives.

        Raises:
            ValueError: the graph has no such form.
        """
        return _in_form(self, form)


def _alternatives(model: ModelSpec, tp_degree: int) -> tuple[Alternative, ...]:
    if tp_degree == 1 or model.hidden_size % tp_degree:
        return ()
    replaced = "o_proj", "attn_all_reduce"
    gather = gather_ops(model, tp_degree)
    return (Alternative(form="all_gather", replaces=replaced, ops=gather),)


@cache
def _in_form(graph: OpGraph, form: OutputForm) -> OpGraph:
    if form not in graph.forms:
        raise ValueError(
            f"`form` must be one of {', '.join(graph.forms)} on {graph.tp_degree} rank(s) of "
            f"{graph.model.name}, but got {form!r}"
        )
    layer = graph.layer
    for chain in graph.alternatives:
        if chain.form == form:
            layer = _replaced(layer, chain)
    return replace(graph, layer=layer, alternatives=())


def _replaced(layer: tuple[Op, ...], chain: Alternative) -> tuple[Op, ...]:
    """The layer with a chain in the place of the one that it replaces."""
    last, new_last = chain.replaces[-1], chain.ops[-1].name
    ops: list[Op] = []
    for op in layer:
        if op.name == chain.replaces[0]:
            ops += chain.ops
        if op.name not in chain.replaces:
            waits = tuple(
                replace(on, op=new_last) if on.op == last else on for on in op.dependencies
            )
            ops.append(replace(op, dependencies=waits))
    return tuple(ops)
