"""Proves, nano-op by nano-op, that a kernel writes its own rows, all of them, and nothing else.

A shadow holds what every byte should be. Before a nano-op its pure outputs and its scratch rows are
poisoned with NaN; after it, its own rows are copied to the shadow, and then buffers, guard rows and
the layer's cache pages must equal the shadow bit by bit, and no poison may be left in its outputs.
An all-reduce that leaves the sum to the norm writes the rows received from the peers, and no other
buffer; what it sends is checked on the peers. They send only while the same nano-op runs here.

Shape legend: T rows of the dense batch, R rows of one nano-op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .binding import FIRST_ROW_ONLY, IN_PLACE, SCRATCH, outputs
from .buffers import GUARD_ROWS, is_poison, poison
from .executor import Executor
from .schedule import Instance
from .verify import VerificationError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CACHE_OPS = ("rope_append", "decode_attention", "prefill_attention")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit; NaNs count as what they are."""
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def audit(executor: Executor, rank: int) -> None:
    """Run all instances in plan order, one at a time, and check what each wrote.

    Raises:
        VerificationError: names the nano-op, the buffer and the rows.
    """
    auditor = _Auditor(executor, rank)
    executor.run_in_order(
        range(len(executor.instances)), observe=auditor.after, before=auditor.before
    )
    auditor.finish()


class _Auditor:
    def __init__(self, executor: Executor, rank: int) -> None:
        self._executor, self._rank = executor, rank
        self._buffers = executor.buffers.named() | executor.received
        self._guarded = executor.buffers.guarded() | executor.received
        self._ids = executor.schedule.ids
        cache = executor.cache
        self._pages = {
            f"{name}_pages of layer {layer}": pages
            for name, layers in (("k", cache.k_pages), ("v", cache.v_pages))
            for layer, pages in enumerate(layers)
        }
        self._pages_shadow = {name: pages.clone() for name, pages in self._pages.items()}
        self._shadow: dict[str, Tensor] = {}

    def before(self, instance: Instance) -> None:
        if not self._shadow:  # the embedding has just written the residual
            self._shadow = {name: rows.clone() for name, rows in self._guarded.items()}
        op = self._op(instance)
        for name in (*self._outputs(instance), *SCRATCH.get(op, ())):
            if name not in IN_PLACE.get(op, ()):
                rows_R = self._rows_of(name, self._rows(instance))
                self._buffers[name][rows_R] = poison(self._buffers[name].dtype)

    def after(self, instance: Instance) -> None:
        op, rows_R = self._op(instance), self._rows(instance)
        written = self._outputs(instance)
        for name in written:
            self._check_written(instance, name, self._rows_of(name, rows_R))
        for name in (*written, *SCRATCH.get(op, ())):
            own_R = self._rows_of(name, rows_R)
            self._shadow[name][own_R + self._first_row(name)] = self._buffers[name][own_R]
        for name, guarded in self._guarded.items():
            if not same_bits(guarded, self._shadow[name]):
                self._fail_outside(instance, name)
        if op in _CACHE_OPS:
            self._check_pages(instance, is_append=op == "rope_append")

    def finish(self) -> None:
        for name, pages in self._pages.items():
            if not same_bits(pages, self._pages_shadow[name]):
                raise VerificationError(
                    f"some nano-op that must not touch the cache wrote {name} on rank {self._rank}"
                )

    def _op(self, instance: Instance) -> str:
        return self._executor.schedule.nano_ops[instance.index].op

    def _outputs(self, instance: Instance) -> tuple[str, ...]:
        if instance.index in self._executor.fetching:
            return tuple(self._executor.received)
        return outputs(self._executor.graph.op(self._op(instance)))

    def _rows_of(self, name: str, rows_R: Tensor) -> Tensor:
        """Those of the nano-op's rows that it writes in one buffer."""
        return rows_R[:1] if name in FIRST_ROW_ONLY else rows_R

    def _first_row(self, name: str) -> int:
        """Guard rows before row 0; received rows have spare ones behind them only."""
        return 0 if name in self._executor.received else GUARD_ROWS

    def _rows(self, instance: Instance) -> Tensor:
        """Rows that the nano-op owns: of its range, those of its kind."""
        batch, nano_op = self._executor.batch, self._executor.schedule.nano_ops[instance.index]
        wanted = {"decode_attention": True, "prefill_attention": False}.get(nano_op.op)
        places = [
            place
            for place in range(*nano_op.tokens)
            if wanted is None or batch.requests[batch.rows[place].request].is_decode == wanted
        ]
        return torch.tensor(places, dtype=torch.int64, device=batch.device)

    def _check_written(self, instance: Instance, name: str, rows_R: Tensor) -> None:
        is_poisoned_R = is_poison(self._buffers[name][rows_R]).any(dim=-1)
        if is_poisoned_R.any():
            what = "NaN" if self._buffers[name].is_floating_point() else "-1"
            rows = _some(rows_R[is_poisoned_R])
            raise VerificationError(
                f"{self._name(instance)} left {what} in {rows} of {name}: it "
                "must write all rows of its range, from inputs that were written before"
            )

    def _fail_outside(self, instance: Instance, name: str) -> None:
        start, end = self._executor.schedule.nano_ops[instance.index].tokens
        guarded = self._guarded[name]
        bits = _BITS[guarded.element_size()]
        is_changed_T = (guarded.view(bits) != self._shadow[name].view(bits)).any(dim=-1)
        changed_T = is_changed_T.nonzero().flatten() - self._first_row(name)
        raise VerificationError(
            f"{self._name(instance)} wrote {_some(changed_T)} of {name}, outside its own "
            f"rows of the range [{start}, {end})"
        )

    def _check_pages(self, instance: Instance, is_append: bool) -> None:
        batch, layer = self._executor.batch, instance.layer
        start, end = self._executor.schedule.nano_ops[instance.index].tokens
        slots_R = batch.slots_T[start:end]
        pages_R, offsets_R = slots_R // batch.page_size, slots_R % batch.page_size
        for name in (f"k_pages of layer {layer}", f"v_pages of layer {layer}"):
            pages, shadow = self._pages[name], self._pages_shadow[name]
            if is_append:
                shadow[pages_R, :, offsets_R] = pages[pages_R, :, offsets_R]
            if not same_bits(pages, shadow):
                what = "slots outside its range of" if is_append else "to"
                raise VerificationError(f"{self._name(instance)} wrote {what} the {name}")

    def _name(self, instance: Instance) -> str:
        return f"{self._ids[instance.index]} in layer {instance.layer} on rank {self._rank}"


def _some(rows: Tensor) -> str:
    """`row 3`, or the first few of many."""
    places = [int(row) for row in rows]
    shown = ", ".join(map(str, places[:4]))
    return f"row {shown}" if len(places) == 1 else f"{len(places)} rows ({shown}, ...)"
