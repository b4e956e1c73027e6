"""What one op costs on a share of the SMs, and how much two ops disturb each other.

Three sources, best first, and every figure says which one it is from:

    measured      the profile holds this very point
    interpolated  between or beyond the profile's points of this kernel, or carried over from the
                  nearest measured shape by its utilisation (measured time / roofline time)
    roofline      nothing of this kind was measured

Variants that take no SMs run on a share of 0, and only they do; all others need more than 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import cast

from ..profiler.profile import EnergyModel, PairRow, Point, Profile, Row, Source
from ..runtime.op_graph import Op, OpGraph, OpKind, RowMix
from ..runtime.op_shapes import moved_bytes, op_of_shape
from ..runtime.plan import SM_FREE_VARIANTS
from ..search_spaces.schema import DTYPE_BYTES, Dtype, HardwareSpec
from .copy_transport import as_sent, summing
from .gather_rows import with_gather_rows
from .interference import Interference, Place
from .kernel_grid import KernelGrid
from .pair_clocks import at_equal_clocks
from .power_fit import fit_power
from .power_model import FASTEST, Load, PowerModel, Price
from .roofline import roofline_us, shape_distance

DEFAULT_VARIANTS: dict[OpKind, str] = {
    "gemm": "cublas",
    "gemm_silu": "cublas",
    "all_reduce": "nccl",
    "all_gather": "nccl",
}
"""Kernel named in a plan where nothing was measured; `triton` for every other kind."""

H200_ENERGY = EnergyModel(
    static_w=117.0, joules_per_flop=0.85e-12, joules_per_byte=130e-12, relative_error=0.1
)
"""Measured on one H200 by hand; stands in for profiles of that card without an energy fit."""
PRICE_ROUNDS = 3
"""Choices of kernels and the price of a joule that follows from them, in turn: both settle."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of one op on one GPU."""

    us: float
    joules: float
    """Dynamic and static; 0 where no energy model is known."""
    source: Source


NO_WORK = Estimate(0.0, 0.0, "measured")
"""An op without rows is not launched."""


class CostModel:
    """Estimates from a profile, or from the datasheet when `profile` is None.

    Variants whose names start like one of `lacking` are not chosen, as the machine that the plan is
    for may not have them; times of plans that name them are still estimated.
    """

    def __init__(
        self,
        profile: Profile | None,
        hardware: HardwareSpec,
        dtype: str | None = None,
        lacking: Iterable[str] = (),
    ) -> None:
        self.lacking = tuple(lacking)
        self.hardware = hardware
        self.dtype = dtype or (profile.dtype if profile else "bfloat16")
        if profile is not None:
            profile = with_gather_rows(profile, hardware, cast(Dtype, self.dtype))
        self.profile = profile
        self.energy = energy_model(profile, hardware)
        self._power: PowerModel | None = None
        self._op_of_shape = cache(op_of_shape)
        self._grids = self._build_grids()
        self._interference: Interference | None = None
        self._estimates: dict[tuple[object, ...], Estimate] = {}
        self.variants = cache(self._variants)
        self.slowdown = cache(self._slowdown)
        self.price = cache(self._price)
        self._nearest_shape = cache(self._find_nearest_shape)

    def with_times(self, profile: Profile) -> CostModel:
        """The same with other times; joules, and so the power model, stay."""
        other = CostModel(profile, self.hardware, self.dtype, self.lacking)
        other.energy, other._power = self.energy, self.power
        return other

    @property
    def power(self) -> PowerModel | None:
        """Joules and clocks; None without an energy model."""
        if self.energy is None:
            return None
        if self._power is None or self._power.base is not self.energy:
            self._power = fit_power(self.profile, self.energy, self.hardware.power_cap_w)
        return self._power

    def estimate(self, op: Op, mix: RowMix, num_sms: int, variant: str) -> Estimate:
        """Time and energy of one variant on `num_sms` SMs, alone on the GPU.

        An op with more row elements than its shape has (`copy_transport.summing`) takes longer in
        proportion to its bytes.
        """
        rows, context = op.rows(mix), op.context(mix)
        if rows <= 0:
            return NO_WORK
        key = (op.kind, op.shape, op.row_elements, rows, context, num_sms, variant)
        if key not in self._estimates:
            self._estimates[key] = self._estimate(op, mix, rows, context, num_sms, variant)
        return self._estimates[key]

    def best(self, op: Op, mix: RowMix, num_sms: int) -> tuple[str, Estimate]:
        """The fastest variant at that share, and its cost.

        Raises:
            ValueError: a share of 0 for an op of which no variant goes without SMs.
        """
        names = self.variants(op, num_sms)
        options = [(self.estimate(op, mix, num_sms, name), name) for name in names]
        if not options:
            raise ValueError(_no_variant(op))
        estimate, variant = min(options, key=lambda option: (option[0].us, option[1]))
        return variant, estimate

    def sum_us(self, norm: Op, num_ranks: int, mix: RowMix) -> float:
        """Time that a norm on all SMs takes longer when it adds what the peers sent."""
        num_sms, longer = self.hardware.num_sms, summing(norm, num_ranks)
        return self.best(longer, mix, num_sms)[1].us - self.best(norm, mix, num_sms)[1].us

    def iteration_overhead(self, graph: OpGraph, mix: RowMix) -> Estimate:
        """Embedding, final norm, LM head and sampling: what an iteration has beyond its layers.

        Logits are needed of each decode row and of the last row of each prompt.
        """
        logits = logit_mix(mix)
        parts = [self.best(op, mix, self.hardware.num_sms)[1] for op in graph.prologue]
        parts += [self.best(op, logits, self.hardware.num_sms)[1] for op in graph.epilogue]
        return Estimate(
            sum(part.us for part in parts),
            sum(part.joules for part in parts),
            worst_source(part.source for part in parts),
        )

    def iteration_overhead_us(self, graph: OpGraph, mix: RowMix) -> float:
        """Time of an iteration beyond its layers, in us."""
        return self.iteration_overhead(graph, mix).us

    def overhead_loads(self, graph: OpGraph, mix: RowMix) -> tuple[Load, ...]:
        """What an iteration asks of the card beyond its layers; nothing without a power model."""
        ops = [(op, mix) for op in graph.prologue] + [(op, logit_mix(mix)) for op in graph.epilogue]
        return tuple(self._whole_load(op, rows, FASTEST) for op, rows in ops if self.power)

    def _whole_load(self, op: Op, mix: RowMix, price: Price) -> Load:
        assert self.power is not None
        num_sms = self.hardware.num_sms
        variant, _, _ = self.cheapest(op, mix, (num_sms,), price)
        us = self.estimate(op, mix, num_sms, variant).us
        return self.power.load(op, mix, num_sms, variant, us)

    def cheapest(
        self, op: Op, mix: RowMix, shares: Iterable[int], price: Price
    ) -> tuple[str, int, float]:
        """Variant and share of the least cost, and that cost in us, joules included.

        With a price of `FASTEST` the fastest. Without a power model joules cost nothing.

        Raises:
            ValueError: no variant runs on any of the shares.
        """
        options = [
            (self._cost(op, mix, share, name, price), -share, name)
            for share in shares
            for name in self.variants(op, share)
        ]
        if not options:
            raise ValueError(_no_variant(op))
        cost, share, variant = min(options)
        return variant, -share, cost

    def _cost(self, op: Op, mix: RowMix, num_sms: int, variant: str, price: Price) -> float:
        us = self.estimate(op, mix, num_sms, variant).us
        if price == FASTEST or self.power is None:
            return us
        return self.power.cost(self.power.load(op, mix, num_sms, variant, us), price)

    def _price(self, graph: OpGraph, mix: RowMix) -> Price:
        """What a joule is worth to this batch, were its ops run in a row on the whole GPU.

        `FASTEST` where the cap does not bind, and where nothing was measured.
        """
        price, power = FASTEST, self.power
        if power is None or self.profile is None:
            return FASTEST
        overhead = [(load, 1) for load in self.overhead_loads(graph, mix)]
        for _ in range(PRICE_ROUNDS):
            layer = [(self._whole_load(op, mix, price), graph.num_layers) for op in graph.layer]
            price = power.price([*layer, *overhead])
        return price

    def shares_of(self, op: Op) -> tuple[int, ...]:
        """Shares that this kind of op was measured on, as far as partitions have them, and all."""
        total, step = self.hardware.num_sms, self.hardware.sm_granularity
        measured = {
            num_sms
            for key, grid in self._grids.items()
            if key[0] == op.kind
            for _, _, num_sms in grid.rows
        }
        fits = {s for s in measured if 0 < s < total and (s % step == 0 or (total - s) % step == 0)}
        return tuple(sorted(fits | {total}))

    def _variants(self, op: Op, num_sms: int) -> tuple[str, ...]:
        """Variants at hand with measured rows, of this shape or else of any shape of the kind.

        On a share of 0 those that take no SMs, perhaps none; the others on any other share. A
        collective on fewer SMs than it was measured on is left out: its blocks, up to that many,
        make it the variant with fewer blocks there.
        """
        grids = {
            key: grid
            for key, grid in self._grids.items()
            if key[0] == op.kind and not key[2].startswith(self.lacking)
        }
        grids = {key: grid for key, grid in grids.items() if key[1] == op.shape} or grids
        free = {key[2] for key in grids if key[2] in SM_FREE_VARIANTS}
        if num_sms == 0:
            return tuple(sorted(free))
        known = {key[2] for key in grids} - free
        if op.resource == "network":
            fitting = {key[2] for key, grid in grids.items() if grid.least_share <= num_sms}
            known = known & fitting or known
        return tuple(sorted(known)) or (DEFAULT_VARIANTS.get(op.kind, "triton"),)

    def _estimate(
        self, op: Op, mix: RowMix, rows: float, context: float, num_sms: int, variant: str
    ) -> Estimate:
        op = as_sent(op, variant)
        kv_len = _profile_kv_len(op.kind, context)
        shape = self._nearest_shape(op.kind, op.shape, variant)
        target_us = roofline_us(op, mix, num_sms, self.hardware, self.dtype)
        if shape is None:
            return Estimate(target_us, self._joules(op, mix, target_us, variant), "roofline")
        grid = self._grids[op.kind, shape, variant]
        time = grid.time(rows, kv_len, num_sms)
        twin = self._profiled_op(op.kind, shape, variant)
        if shape != op.shape or (op.kind == "norm" and twin.row_elements != op.row_elements):
            twin_us = self._roofline_at(twin, rows, kv_len, num_sms)
            us = time.us * target_us / twin_us
            return Estimate(us, self._joules(op, mix, us, variant), "interpolated")
        if not time.is_measured:
            return Estimate(time.us, self._joules(op, mix, time.us, variant), "interpolated")
        row = grid.rows[int(rows), int(kv_len), num_sms]
        has_joules = row.joules_source != "missing" and row.joules > 0
        joules = row.joules if has_joules else self._joules(op, mix, time.us, variant)
        return Estimate(time.us, joules, row.source)

    def _joules(self, op: Op, mix: RowMix, us: float, variant: str) -> float:
        if self.energy is None:
            return 0.0
        memory_bytes = moved_bytes(op, mix, variant)
        dynamic = self.energy.dynamic_joules(op.flops(mix), memory_bytes, op.link_bytes(mix))
        return dynamic + self.energy.static_w * us * 1e-6

    def _build_grids(self) -> dict[tuple[OpKind, str, str], KernelGrid]:
        rows = defaultdict[tuple[OpKind, str, str], list[Row]](list)
        for row in self.profile.usable_rows if self.profile else ():
            point = row.point
            if (point.variant in SM_FREE_VARIANTS) == (point.num_sms == 0):
                rows[cast(OpKind, point.kind), point.shape, point.variant].append(row)
        return {
            key: KernelGrid(group, partial(self._roofline_at, self._profiled_op(*key)))
            for key, group in rows.items()
        }

    def _profiled_op(self, kind: OpKind, shape: str, variant: str) -> Op:
        """The op that the rows of a profile are about."""
        return as_sent(
            self._op_of_shape(kind, shape, DTYPE_BYTES[cast(Dtype, self.dtype)]), variant
        )

    def _roofline_at(self, op: Op, rows: float, kv_len: float, num_sms: int) -> float:
        """Roofline time of a profiled kernel at any point, in us."""
        mix = mix_of_rows(op.kind, rows, kv_len)
        return roofline_us(op, mix, num_sms, self.hardware, self.dtype)

    def _find_nearest_shape(self, kind: OpKind, shape: str, variant: str) -> str | None:
        shapes = sorted(key[1] for key in self._grids if (key[0], key[2]) == (kind, variant))
        if shape in shapes:
            return shape
        return min(shapes, key=lambda other: shape_distance(shape, other), default=None)

    def _slowdown(
        self,
        op_a: Op,
        num_sms_a: int,
        op_b: Op,
        num_sms_b: int,
        variant_a: str = "",
        variant_b: str = "",
    ) -> float:
        """Time of A beside B / time of A alone on the same SMs, at one clock.

        See `interference.py` and `pair_clocks.py`.
        """
        one, beside = Place(op_a, num_sms_a, variant_a), Place(op_b, num_sms_b, variant_b)
        if self._interference is None:
            self._interference = Interference(self._pairs(), self.hardware)
        return self._interference.slowdown(one, beside)

    def _pairs(self) -> Sequence[PairRow]:
        """The measured pairs at one clock; as measured without a power model."""
        pairs = self.profile.pairs if self.profile else ()
        power = self.power
        if power is None:
            return pairs

        def load_of(point: Point) -> Load | None:
            kind = cast(OpKind, point.kind)
            op = self._op_of_shape(kind, point.shape, DTYPE_BYTES[cast(Dtype, self.dtype)])
            mix = mix_of_rows(kind, point.tokens, point.kv_len)
            cost = self.estimate(op, mix, point.num_sms, point.variant)
            if cost.source == "roofline":
                return None
            return power.load(op, mix, point.num_sms, point.variant, cost.us)

        return at_equal_clocks(pairs, load_of, power)


def _no_variant(op: Op) -> str:
    return (
        f"a share of 0 is for variants that take no SMs ({', '.join(SM_FREE_VARIANTS)}), "
        f"but none of {op.name} is in the profile; give it SMs"
    )


def energy_model(profile: Profile | None, hardware: HardwareSpec) -> EnergyModel | None:
    """The profile's fit; the H200's hand-measured one for that card; otherwise none."""
    if profile is not None and profile.energy is not None:
        return profile.energy
    return H200_ENERGY if hardware.name.startswith("h200") else None


def logit_mix(mix: RowMix) -> RowMix:
    """Rows of the LM head: each decode row, and one per prompt."""
    prompt_tokens = max(1.0, _profile_kv_len("prefill_attention", mix.prefill_context_tokens))
    rows = mix.decode_tokens + mix.prefill_tokens / prompt_tokens
    return replace(mix, decode_tokens=rows, prefill_tokens=0.0)


def mix_of_rows(kind: str, rows: float, kv_len: float) -> RowMix:
    """The mix that a profile row was measured on; `kv_len` as in `Point.kv_len`."""
    is_prefill = kind == "prefill_attention"
    return RowMix(
        decode_tokens=0.0 if is_prefill else rows,
        prefill_tokens=rows if is_prefill else 0.0,
        decode_context_tokens=kv_len,
        prefill_context_tokens=(kv_len + 1) / 2,
    )


def worst_source(sources: Iterable[Source]) -> Source:
    """The least trustworthy of the sources."""
    found = set(sources)
    if "roofline" in found:
        return "roofline"
    return "interpolated" if "interpolated" in found else "measured"


def _profile_kv_len(kind: str, context: float) -> float:
    """`Point.kv_len` of a mean context: the prompt length, for causal prefill."""
    return 2 * context - 1 if kind == "prefill_attention" else context
