"""Joules, watts and clocks of kernels and plans; `power_fit.py` gives the numbers.

    dynamic joules of a call   D(x) = factor x (a x FLOPs + b x bytes + c x link bytes) x^e
    of a GEMM                  D(x) = (factor x a x FLOPs + g x b x bytes) x^e
    time of a call             t(x) = burst time x max(1, how far clocks below the burst's slow it)
    a plan under the cap       sum of D(x) <= (kept x cap - static watts) x period(x)

x is the SM clock as a part of the highest one, and one for a whole plan: power management takes
longer than a kernel. At the largest x that keeps the cap a plan has its period, watts and clock.

- a, b, c are the profile's `EnergyModel`. The factors (one for each kind, for each variant of a
  kind, for each share of a variant), g and the exponent e are fitted to the logarithms of all
  measured joules, as random effects: few rows move a factor little from 1, and e little from
  `EXPONENT`. GEMMs with and without SiLU are one kind here. Their factors are those of the tensor
  cores; the weights, which each nano-batch reads again, cost less a byte (g) than keys do, on
  which attention computes.
- Compute-bound kernels take 1 / x as long. The burst of dense ones (12 to 30 ms on a hot card) ran
  below the highest clock already: at the clock that their FLOP/s need at `flops_per_clock`, the
  median of the GEMMs kept up for longer; not below the clock that the cap allows them.
- Memory-bound kernels keep their time until their SMs draw `PORT_BYTES` a clock each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp

from ..profiler.profile import EnergyModel
from ..runtime.op_graph import GEMM_KINDS, Op, RowMix
from ..runtime.op_shapes import RESOURCE_OF_KIND, moved_bytes
from .copy_transport import as_sent

MAX_CLOCK_MHZ = 1980.0
"""Of a profile that tells no clocks: an H200's highest."""
KEPT = 0.99
"""Part of the cap that a card at it draws: 693 to 695 W of 700, medians of plans on H200."""
EXPONENT = 0.77
"""How dynamic joules of one GEMM rose with the clock, measured on one H200 (132 and 64 SMs)."""
FLOPS_PER_CLOCK = 3360.0
"""Of one SM in a GEMM of many waves: 0.82 of the tensor cores' 4096, measured on one H200."""
PORT_BYTES = 60.0
"""Bytes a clock that one SM draws at most: measured 59 to 62 of the port's 64."""
BISECTIONS = 40
EDGE = 0.1
"""A kernel whose time begins to grow this little below the clock counts as growing: the clock of
its burst is known no better."""
LEAST_CLOCK = 0.2
"""Smallest x looked at: far below what any kernel needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a joule is worth: the marginal rate at which a plan trades joules for time."""

    clock: float = 1.0
    """x at which times and joules count."""
    us_per_joule: float = 0.0
    """0 where the cap does not bind."""


FASTEST = Price()
"""Joules cost nothing: the fastest kernel at the highest clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One nano-op, as power management sees it."""

    us: float
    """Burst time."""
    joules: float
    """Dynamic, at the highest clock."""
    stretch_from: float
    """x below which its time is proportional to 1 / x; 0: never."""

    def us_at(self, clock: float) -> float:
        """Time at a clock."""
        return self.us * max(1.0, self.stretch_from / clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """Fitted model of one GPU."""

    base: EnergyModel
    cap_w: float
    kept: float = 1.0
    """Part of the cap that a card at it draws."""
    max_clock_mhz: float = MAX_CLOCK_MHZ
    exponent: float = EXPONENT
    flops_per_clock: float = FLOPS_PER_CLOCK
    """Of one SM in a GEMM."""
    gemm_bytes: float = 1.0
    """g: joules of a byte that a GEMM moves, over those of `base`."""
    effects: Mapping[tuple[str, ...], float] = field(default_factory=dict[tuple[str, ...], float])
    """Logarithms of the factors: (kind), (kind, variant), (kind, variant, share)."""

    @property
    def headroom_w(self) -> float:
        """Watts left under what the card keeps of its cap, for dynamic joules."""
        return max(1.0, self.kept * self.cap_w - self.base.static_w)

    def load(self, op: Op, mix: RowMix, num_sms: int, variant: str, us: float) -> Load:
        """What a nano-op that takes `us` alone in a burst asks of the card."""
        if us <= 0:
            return Load(us=0.0, joules=0.0, stretch_from=0.0)
        op = as_sent(op, variant)
        moved = moved_bytes(op, mix, variant)
        work, beside = split_joules(self.base, op.kind, op.flops(mix), moved, op.link_bytes(mix))
        joules = work * exp(self._effect(op.kind, variant, num_sms)) + self.gemm_bytes * beside
        if RESOURCE_OF_KIND[op.kind] == "compute":
            x_burst = self._burst_clock(op.kind, op.flops(mix), num_sms, us, joules)
            return Load(us=us, joules=joules, stretch_from=x_burst)
        if op.link_bytes(mix) > 0 or num_sms == 0:
            return Load(us=us, joules=joules, stretch_from=0.0)
        drawn = moved / (us * num_sms * self.max_clock_mhz)
        return Load(us=us, joules=joules, stretch_from=min(1.0, drawn / PORT_BYTES))

    def _burst_clock(
        self, kind: str, flops: float, num_sms: int, us: float, joules: float
    ) -> float:
        """The x that a compute-bound kernel ran at in its burst."""
        if kind not in GEMM_KINDS or joules <= 0:
            return 1.0
        needed = flops / (us * num_sms * self.max_clock_mhz * self.flops_per_clock)
        allowed = (self.headroom_w * us * 1e-6 / joules) ** (1 / self.exponent)
        return min(1.0, max(needed, allowed))

    def joules_at(self, joules: float, clock: float) -> float:
        """Dynamic joules at a clock, of those at the highest one."""
        return joules * clock**self.exponent

    def cost(self, load: Load, price: Price) -> float:
        """Time and joules of a nano-op at a price, in us."""
        joules = self.joules_at(load.joules, price.clock)
        return load.us_at(price.clock) + price.us_per_joule * joules

    def clock_under_cap(self, joules: float, period_us: Callable[[float], float]) -> float:
        """Highest x at which a plan keeps the cap; 1 where it binds nowhere.

        Args:
            joules: dynamic, of a period, at the highest clock.
            period_us: period at x; never shorter at a lower clock.
        """

        def excess(clock: float) -> float:
            return self.joules_at(joules, clock) - self.headroom_w * period_us(clock) * 1e-6

        low, high = LEAST_CLOCK, 1.0
        if excess(high) <= 0:
            return high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) > 0 else (middle, high)
        return low

    def price(self, loads: Sequence[tuple[Load, int]]) -> Price:
        """Price at the working point of calls that run one after the other.

        With w the part of the period that stretches with the clock, a small change of times and
        joules (both at x) changes the period by (dt + w / e x dJ / headroom) / (1 + w / e).

        Args:
            loads: each with how often it runs.
        """

        def period(clock: float) -> float:
            return sum(count * load.us_at(clock) for load, count in loads)

        joules = sum(count * load.joules for load, count in loads)
        clock = self.clock_under_cap(joules, period)
        if clock >= 1.0:
            return FASTEST
        edge = clock * (1 - EDGE)
        stretching = sum(n * load.us_at(clock) for load, n in loads if load.stretch_from > edge)
        share = stretching / period(clock)
        return Price(clock=clock, us_per_joule=1e6 * share / (self.exponent * self.headroom_w))

    def _effect(self, kind: str, variant: str, num_sms: int) -> float:
        family = family_of(kind)
        known = self.effects.get((family,), 0.0) + self.effects.get((family, variant), 0.0)
        return known + self._share_effect(family, variant, num_sms)

    def _share_effect(self, family: str, variant: str, num_sms: int) -> float:
        """Between measured shares on the line between them; none beyond them."""
        measured = [
            (int(key[2]), effect)
            for key, effect in self.effects.items()
            if len(key) == 3 and key[:2] == (family, variant)
        ]
        below = max((pair for pair in measured if pair[0] <= num_sms), default=None)
        above = min((pair for pair in measured if pair[0] >= num_sms), default=None)
        if below is None or above is None:
            return 0.0
        if below[0] == above[0]:
            return below[1]
        weight = (num_sms - below[0]) / (above[0] - below[0])
        return (1 - weight) * below[1] + weight * above[1]


def period_at(periods: Mapping[float, float], clock: float) -> float:
    """Period at a clock from those at some clocks, in us.

    Between two of them on the line over 1 / x, which is exact while the same ops stretch; below
    all of them on the line through the last two.
    """
    known = sorted(periods)
    if len(known) == 1:
        return periods[known[0]]
    high = next((x for x in known[1:] if x >= clock), known[-1])
    low = known[known.index(high) - 1]
    weight = (1 / clock - 1 / high) / (1 / low - 1 / high)
    return (1 - weight) * periods[high] + weight * periods[low]


def split_joules(
    base: EnergyModel, kind: str, flops: float, memory_bytes: float, link_bytes: float
) -> tuple[float, float]:
    """Dynamic joules that a kind's factors are about, and those beside them: of a GEMM's bytes."""
    if kind in GEMM_KINDS:
        moved = base.dynamic_joules(0.0, memory_bytes, link_bytes)
        return base.dynamic_joules(flops, 0.0), moved
    return base.dynamic_joules(flops, memory_bytes, link_bytes), 0.0


def family_of(kind: str) -> str:
    """The kind that factors are kept by: GEMMs with and without SiLU are one."""
    return "gemm" if kind in GEMM_KINDS else kind
