"""Time of one op if nothing but the datasheet limited it, on a share of the SMs.

Used where nothing was measured, and to carry a measured utilisation from one shape to another.
Assumptions, all of them optimistic or plain:

    compute  scales with the share of the SMs
    memory   half of the SMs can draw the whole bandwidth (on an H200, 64 of 132 SMs reach 3.8 of
             4.4 TB/s), fewer a proportional part
    network  16 SMs can fill the link (NCCL on two H200s: 16 blocks within 11 % of the default)

A share of 0 means copy engines: they fill the link, and draw the memory bandwidth that it takes to
read what is sent and to write what arrives.
"""

from __future__ import annotations

from math import log

from ..runtime.op_graph import Op, RowMix
from ..runtime.op_shapes import shape_numbers
from ..search_spaces.schema import HardwareSpec

MEMORY_SATURATION = 2.0
"""Share of the bandwidth per share of the SMs, until it is all taken."""
LINK_SATURATION_SMS = 16


def memory_share(num_sms: int, hardware: HardwareSpec) -> float:
    """Part of the memory bandwidth that a share of the SMs, or copy engines (0), can draw."""
    if num_sms == 0:
        return min(1.0, 2 * hardware.link_bytes_per_s / hardware.memory_bytes_per_s)
    return min(1.0, MEMORY_SATURATION * num_sms / hardware.num_sms)


def roofline_us(op: Op, mix: RowMix, num_sms: int, hardware: HardwareSpec, dtype: str) -> float:
    """Time at the datasheet's peaks on `num_sms` SMs, in us; 0 SMs are for collectives only."""
    memory_s = op.memory_bytes(mix) / (
        hardware.memory_bytes_per_s * memory_share(num_sms, hardware)
    )
    link_bytes = op.link_bytes(mix)
    if link_bytes == 0:
        compute_s = op.flops(mix) / (hardware.peak(dtype) * num_sms / hardware.num_sms)
        return 1e6 * max(compute_s, memory_s)
    link_share = min(1.0, num_sms / LINK_SATURATION_SMS) if num_sms else 1.0
    link_s = link_bytes / (hardware.link_bytes_per_s * link_share)
    return 1e6 * max(memory_s, link_s)


def shape_distance(a: str, b: str) -> float:
    """How different two shapes of one kind are: sum of |log ratio| of their numbers."""
    pairs = zip(shape_numbers(a), shape_numbers(b), strict=True)
    return sum(abs(log(x / y)) for x, y in pairs)
