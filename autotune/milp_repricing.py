"""A solved structure MILP again, with the times that its own schedule took in the simulator.

Split, shares and forms stay as they were: another share has neighbours that nobody simulated. What
is decided afresh is the order, which is what wrong prices spoil most. The power cap is left out, as
from the simulator's steady layer, which runs at the highest clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .milp import Model, Solution
from .milp_input import Instance
from .milp_start import Start

TIME_LIMIT_S = 0.5
GAP = 1e-3


@dataclass(frozen=True, slots=True)
class PricedAgain:
    """What a solution took in the simulator."""

    instance: Instance
    """That was solved."""
    solution: Solution
    node_us: Mapping[int, float]
    """By node; 0 for those that are left out."""

    def restricted(self) -> Instance:
        """One split and one share a node, at simulated times in whichever form it has.

        Sums that a collective leaves to a norm, and synchronisations, are part of those times.
        """
        shares = self.solution.share
        times = {(i, 0, a): self.node_us.get(i, 0.0) for i, a in enumerate(shares)}
        formed = {i for held in self.instance.nodes_of_forms for i in held}
        return replace(
            self.instance,
            shares=tuple((a,) for a in shares),
            num_splits=1,
            duration_us=times,
            floor_us=(0.0,),
            sum_us={},
            form_us={key: us for key, us in times.items() if key[0] in formed},
        )


def solved_again(
    priced: PricedAgain, seed: int, start: Start | None
) -> tuple[Solution | None, float, float]:
    """The best order at simulated times.

    Args:
        priced: solution and times.
        seed: of the solver.
        start: its schedule, as an instance with its split alone has it.

    Returns:
        A solution whose split is numbered as in the instance that was solved first, or None; the
        period of one layer in us (0 without a solution); seconds that the solver took.
    """
    model = Model(priced.restricted())
    model.fix_forms(priced.solution.is_form_1)
    solution, certificate = model.solve(TIME_LIMIT_S, GAP, seed, start)
    if solution is not None:
        solution = replace(solution, split=priced.solution.split)
    return solution, certificate.period_us, certificate.seconds
