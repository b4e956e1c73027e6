"""What runs: op graph, plan, SM partitions, kernels, model, executor, verification.

`op_graph`, `plan` and `schedule` import no torch: a plan can be made and checked on a laptop.
"""

from __future__ import annotations
