"""Refinement: an Optuna study around the MILP's structure and the ping-pong family.

Every trial is a whole schedule, and follows from its parameters alone. Its value is the simulated
period; `hardware_loop.py` measures trials of the same family. Trials live in Optuna's own
storage, so that a search resumes and optuna-dashboard opens it; a trial whose schedule is illegal
fails and keeps the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from ..profiler.progress import Advance, nothing
from ..runtime.legality import check
from ..runtime.op_graph import Op, OpGraph, OutputForm, RowMix
from ..runtime.plan import Candidate, Schedule
from ..runtime.schedule import IllegalScheduleError, output_forms
from ..search_spaces.schema import RowOrder, SearchSpace
from .baselines import PingPongChoice, PingPongOrder, ping_pong, whole_gpu_choice
from .cost_model import CostModel
from .patterns import (
    COMPUTE,
    MEMORY,
    NETWORK,
    Placed,
    batch_mix,
    build_schedule,
    has_sm_free,
    lane_of,
    legal_shares,
    macro_ops,
    split_batches,
    total_tokens,
)
from .simulator import predict
from .study_storage import mark, open_storage, retry_lost

if TYPE_CHECKING:
    import optuna

CLOSE = 1.05
"""Times the fastest variant's time: slower ones are no choice of a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a study searches: the structures, and the lists its parameters choose from."""

    graph: OpGraph
    cost_model: CostModel
    space: SearchSpace
    mix: RowMix
    structure: tuple[Placed, ...] = ()
    """One period of two nano-batches found by the MILP; empty when it found none."""
    is_variant_free: bool = False
    """Let trials choose GEMM variants; pointless on the simulator, where the fastest alone wins."""

    def shares(self, lane: str) -> list[int]:
        """Shares a lane may take beside other lanes."""
        return legal_shares(lane, self.cost_model.hardware, self.space, self.is_sm_free)

    @property
    def is_sm_free(self) -> bool:
        """Whether the collectives of this model can go without SMs."""
        return has_sm_free(self.graph, self.cost_model)

    @property
    def orders(self) -> tuple[PingPongOrder, ...]:
        """Orders of the ping-pong family; `alternating` is the one on the whole GPU."""
        if self.is_sm_free:
            return "blocks", "interleaved", "alternating"
        return "blocks", "interleaved"

    def first_tokens(self) -> list[int]:
        """Places for the boundary of two nano-batches."""
        step, total = self.space.token_granularity, total_tokens(self.mix)
        return list(range(step, total, step)) or [total // 2]

    def schedule(self, trial: optuna.trial.BaseTrial) -> Schedule:
        """The schedule of a trial's parameters.

        Raises:
            IllegalScheduleError: the parameters do not fit together.
        """
        kinds = [*self.orders, *(["milp"] if self.structure else [])]
        kind = trial.suggest_categorical("structure", kinds)
        first = trial.suggest_categorical("first_tokens", self.first_tokens())
        orders: list[str] = list(self.space.row_orders)
        order = cast(RowOrder, trial.suggest_categorical("row_order", orders))
        variants, forms = self._variants(trial), self._forms(trial)
        if kind == "milp":
            return self._from_structure(trial, first, order, variants, forms)
        if kind == "alternating":
            num_sms = self.cost_model.hardware.num_sms
            whole = whole_gpu_choice(first, order, num_sms, forms)
            return self._ping_pong(replace(whole, variants=variants))
        choice = PingPongChoice(
            first_tokens=first,
            row_order=order,
            compute_sms=trial.suggest_categorical("compute_sms", self.shares(COMPUTE)),
            memory_sms=trial.suggest_categorical("memory_sms", self.shares(MEMORY)),
            network_sms=self._network_sms(trial),
            order=cast(PingPongOrder, kind),
            variants=variants,
            forms=forms,
        )
        return self._ping_pong(choice)

    def _ping_pong(self, choice: PingPongChoice) -> Schedule:
        return ping_pong(self.graph, self.cost_model, self.mix, choice, "overlapped_refined")

    def _network_sms(self, trial: optuna.trial.BaseTrial) -> int:
        if self.graph.tp_degree == 1:
            return self.shares(NETWORK)[0]
        return trial.suggest_categorical("network_sms", self.shares(NETWORK))

    def _forms(self, trial: optuna.trial.BaseTrial) -> tuple[OutputForm, OutputForm]:
        """How each nano-batch joins the attention's output, where there is a choice."""
        names = list(self.graph.forms)
        if len(names) == 1:
            return names[0], names[0]
        first, second = (trial.suggest_categorical(f"form.{batch}", names) for batch in (0, 1))
        return cast(OutputForm, first), cast(OutputForm, second)

    def _form_parameters(self, forms: Sequence[OutputForm]) -> dict[str, Any]:
        has_choice = len(self.graph.forms) > 1
        return {f"form.{b}": form for b, form in enumerate(forms)} if has_choice else {}

    def _variants(self, trial: optuna.trial.BaseTrial) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for op in self.graph.all_ops if self.is_variant_free else ():
            names = self.close_variants(op)
            if len(names) > 1:
                name = trial.suggest_categorical(f"variant.{op.name}", ["fastest", *names])
                chosen |= {} if name == "fastest" else {op.name: name}
        return chosen

    def close_variants(self, op: Op) -> list[str]:
        """Variants within 5 % of the fastest on half of the rows, at a share that is likely.

        A property of the study, not of a trial: Optuna's choices must not change.
        """
        half = split_batches(self._halves(), "interleaved", self.mix)[0]
        rows, found = batch_mix(half, self.mix), set[str]()
        for share in self._likely_shares(op):
            names = self.cost_model.variants(op, share)
            us = {name: self.cost_model.estimate(op, rows, share, name).us for name in names}
            found |= {name for name in names if us[name] <= CLOSE * min(us.values())}
        return sorted(found)

    def _likely_shares(self, op: Op) -> set[int]:
        """Those of the structure, else the largest of the op's lane; all SMs where none are lost.

        None is left out: what takes no SMs has no other variant there.
        """
        macros = macro_ops(self.graph)
        shares = {p.num_sms for p in self.structure if op in macros[p.macro].all_ops}
        shares = shares or {self.shares(lane_of(op))[-1]}
        if self.is_sm_free and lane_of(op) != NETWORK:
            shares.add(self.cost_model.hardware.num_sms)
        return shares - {0}

    def _halves(self) -> tuple[int, int]:
        half = total_tokens(self.mix) // 2
        return half, total_tokens(self.mix) - half

    def _from_structure(
        self,
        trial: optuna.trial.BaseTrial,
        first: int,
        order: RowOrder,
        variants: Mapping[str, str],
        forms: tuple[OutputForm, OutputForm],
    ) -> Schedule:
        placed: list[Placed] = []
        macros = macro_ops(self.graph)
        for place in self.structure:
            if not macros[place.macro].ops_of(forms[place.batch]):
                continue
            shares = self._structure_shares(place)
            share = trial.suggest_categorical(f"sms.{_place_name(self.graph, place)}", shares)
            placed.append(
                Placed(macro=place.macro, batch=place.batch, stage=place.stage, num_sms=share)
            )
        sizes = first, total_tokens(self.mix) - first
        batches = split_batches(sizes, order, self.mix)
        return build_schedule(
            "overlapped_refined",
            self.cost_model,
            self.graph,
            self.mix,
            batches,
            placed,
            variants,
            forms=forms,
        )

    def _structure_shares(self, place: Placed) -> list[int]:
        total = self.cost_model.hardware.num_sms
        lane = macro_ops(self.graph)[place.macro].lane
        return sorted({*self.shares(lane), place.num_sms, total})

    def parameters(self, choice: PingPongChoice) -> dict[str, Any]:
        """A ping-pong choice as trial parameters."""
        parameters: dict[str, Any] = {
            "structure": choice.order,
            "first_tokens": choice.first_tokens,
            "row_order": choice.row_order,
        } | self._form_parameters(choice.forms)
        if choice.order == "alternating":
            return parameters
        return parameters | {
            "compute_sms": choice.compute_sms,
            "memory_sms": choice.memory_sms,
            "network_sms": choice.network_sms,
        }

    def structure_parameters(self, schedule: Schedule) -> dict[str, Any]:
        """The MILP's own solution as trial parameters."""
        batches = schedule.nano_batches
        first = batches[0].num_tokens
        for order in self.space.row_orders:
            sizes = first, total_tokens(self.mix) - first
            if split_batches(sizes, order, self.mix) == batches:
                shares = {
                    f"sms.{_place_name(self.graph, place)}": place.num_sms
                    for place in self.structure
                }
                taken: list[OutputForm] = [f[0] for f in output_forms(schedule, self.graph)]
                own = {"structure": "milp", "first_tokens": first, "row_order": order}
                return own | self._form_parameters(taken) | shares
        return {}


def _place_name(graph: OpGraph, place: Placed) -> str:
    return f"{macro_ops(graph)[place.macro].name}.{place.batch}"


def placed_of(schedule: Schedule, graph: OpGraph) -> tuple[Placed, ...]:
    """The macro ops of a schedule that was built from macro ops, in issue order.

    Those that its forms leave out stand where other forms would have them: before the next one of
    their nano-batch, on the share of the collective behind.
    """
    batch_of = {batch.tokens: index for index, batch in enumerate(schedule.nano_batches)}
    macros = macro_ops(graph)
    heads = {
        ops[0].name: index
        for index, macro in enumerate(macros)
        for ops in (macro.ops, *(ops for _, ops in macro.others))
        if ops
    }
    placed = [
        Placed(
            macro=heads[nano_op.op],
            batch=batch_of[nano_op.tokens],
            stage=nano_op.stage,
            num_sms=nano_op.num_sms,
        )
        for nano_op in schedule.nano_ops
        if nano_op.op in heads
    ]
    idle = [index for index, macro in enumerate(macros) if not macro.ops]
    for macro, batch in product(idle, range(len(schedule.nano_batches))):
        if any((place.macro, place.batch) == (macro, batch) for place in placed):
            continue
        where = {p.macro: index for index, p in enumerate(placed) if p.batch == batch}
        behind, collective = placed[where[macro + 1]], placed[where[macro + 2]]
        own = replace(behind, macro=macro, num_sms=collective.num_sms)
        placed.insert(where[macro + 1], own)
    return tuple(placed)


def refine(
    family: Family,
    *,
    trials: int,
    seed: int,
    storage: str | None = None,
    enqueue: Sequence[Mapping[str, Any]] = (),
    advance: Advance = nothing,
) -> tuple[Candidate, ...]:
    """Run the study up to this many trials; every legal one is a candidate, in trial order.

    Args:
        family: what to search.
        trials: in all, those of a resumed study and of other workers included.
        seed: of the sampler.
        storage: as `study_storage.py` opens it; None keeps the study in memory.
        enqueue: parameters to try first.
        advance: told how many trials are done.
    """
    study = open_study(family, seed, "simulator", storage, enqueue)
    own: dict[int, Candidate] = {}
    last: int | None = None
    while (number := _num_finished(study)) < trials:  # other workers' trials count
        advance(number, trials)
        trial, schedule = ask(study, family)
        if last is not None and trial.number != last + 1:
            study.sampler.reseed_rng()  # another worker is here, perhaps with the same seed
        last = trial.number
        if schedule is None:
            continue
        timing = predict(schedule, family.graph, family.cost_model, family.mix)
        study.tell(trial, timing.period_us, skip_if_finished=True)
        own[trial.number] = Candidate(schedule=schedule, predicted=timing)
    done = study.get_trials(deepcopy=False)
    candidates = (own.get(trial.number) or replayed(family, trial) for trial in done)
    return tuple(candidate for candidate in candidates if candidate is not None)


def _num_finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def open_study(
    family: Family,
    seed: int,
    how: str,
    storage: str | None,
    enqueue: Sequence[Mapping[str, Any]],
) -> optuna.Study:
    """The study of these inputs, resumed where the storage has it, with parameters to try first.

    Raises:
        ValueError: the storage cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=study_name(family, seed, how),
        storage=None if storage is None else open_storage(storage),
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
        direction="minimize",
    )
    if study.trials:  # the draws of whoever began it would be its trials once more
        study.sampler = optuna.samplers.TPESampler(seed=(seed + len(study.trials)) % 2**32)
    retry_lost(study)
    for parameters in enqueue:
        study.enqueue_trial(dict(parameters), skip_if_exists=True)
    return study


def ask(study: optuna.Study, family: Family) -> tuple[optuna.Trial, Schedule | None]:
    """The next trial and its schedule; an illegal one has failed, with the reason kept."""
    import optuna

    trial = study.ask()
    mark(trial)
    try:
        return trial, checked(family, trial)
    except IllegalScheduleError as err:
        trial.set_user_attr("reason", str(err))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return trial, None


def checked(family: Family, trial: optuna.trial.BaseTrial) -> Schedule:
    """The schedule of a trial's parameters.

    Raises:
        IllegalScheduleError: it cannot run on this GPU.
    """
    schedule, hardware = family.schedule(trial), family.cost_model.hardware
    check(schedule, family.graph, hardware.num_sms, hardware.sm_granularity)
    return schedule


def replayed(family: Family, trial: optuna.trial.FrozenTrial) -> Candidate | None:
    """The candidate of a finished trial of an earlier run; a measured time is not taken over."""
    import optuna

    if trial.state != optuna.trial.TrialState.COMPLETE:
        return None
    schedule = checked(family, optuna.trial.FixedTrial(trial.params))
    timing = predict(schedule, family.graph, family.cost_model, family.mix)
    return Candidate(schedule=schedule, predicted=timing)


def study_name(family: Family, seed: int, how: str) -> str:
    """Names the inputs, so that a changed space, mix, structure or profile starts a new study."""
    profile = family.cost_model.profile
    inputs = repr((family.space, family.mix, family.structure, family.cost_model.hardware, profile))
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:8]
    graph = family.graph
    return (
        f"{graph.model.name}-tp{graph.tp_degree}-{total_tokens(family.mix)}-{how}-{seed}-{digest}"
    )
