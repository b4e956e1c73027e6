"""One rank's part of a verification: run the schedule in many ways and compare the outputs.

    plain reference  ~ sequential run  ~ planned run  = repeats, random legal orders, CUDA graph

`~` within the tolerance of the dtype, for every layer's output and the logits; `=` bit by bit. All
buffers and the cache slots of this iteration are poisoned before each run.

With experts, a row whose choice is nearly a tie may go elsewhere once sums are rounded differently.
`~` leaves out the rows whose reference was that close; `=` leaves out none.

Shape legend: T rows of the logical batch, D hidden, R logit rows, V this rank's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from .audit import audit, same_bits
from .batching import DenseBatch, Request
from .executor import Executor, Observe, Resources
from .kv_cache import PagedKvCache
from .launch import RankContext
from .legality import check
from .model import ReferenceOutput, reference_forward
from .op_graph import OpGraph, RowMix
from .plan import Schedule, Verification
from .schedule import Instance, has_o_columns, random_legal_order
from .steady_state import batch_mix, steady_pages, steady_requests
from .verify import TOLERANCE, Case, MakeResources, VerificationError
from .weights import Weights, random_weights

_CACHE_POISON = 512.0
"""Finite, since a masked key may be multiplied by 0; far from any key or value."""
_ANY_SHARE = 1 << 20
_ROW_FACTOR = 10.0
"""A single row may be this much worse than the tolerance of the whole output."""
_CLEAR_FACTOR = 3.0
"""A row is compared when its margin to other experts is this many tolerances or more."""
_LEAST_CLEAR = 0.25
"""Share of the rows that must be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs:
    layers_TD: tuple[Tensor, ...]
    """Rows in logical order."""
    logits_RV: Tensor
    token_ids_R: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What all runs of a case share."""

    case: Case
    rank: int
    graph: OpGraph
    weights: Weights
    cache: PagedKvCache
    requests: tuple[Request, ...]
    resources: Resources

    def executor(self, schedule: Schedule) -> Executor:
        """A prepared executor; the logical batch is the same for every schedule."""
        batch = DenseBatch.build(
            schedule.nano_batches,
            self.requests,
            page_size=self.cache.page_size,
            device=self.weights.device,
        )
        executor = Executor(self.graph, self.weights, self.cache, batch, schedule, self.resources)
        return executor.prepare()


def default_resources(ctx: RankContext, schedules: Sequence[Schedule]) -> Resources:
    """No partitions; one process group per lane, kept for later calls."""
    if ctx.world_size == 1:
        return Resources()
    groups = ctx.state.setdefault("lane_groups", {})
    for schedule in schedules:
        for lane in schedule.lanes:
            if lane not in groups:
                groups[lane] = dist.new_group(list(range(ctx.world_size)))
    return Resources(groups=groups)


def verify_on_rank(
    ctx: RankContext, case: Case, make_resources: MakeResources | None = None
) -> Verification:
    """Run and compare; see the module's docstring.

    Raises:
        VerificationError: something differs.
    """
    setting = _setting(ctx, case, make_resources or default_resources)
    tolerance = TOLERANCE[case.model.torch_dtype]
    sequential = _observed(setting.executor(case.sequential))
    reference = _reference(setting)
    clear = _clear_rows(setting, reference, tolerance)
    what = "the sequential run against the plain reference"
    layers_TD, logits_RV = reference.layer_outputs_TD, reference.logits_RV
    reference_error = _compare(sequential, layers_TD, logits_RV, tolerance, what, ctx.rank, clear)
    executor = setting.executor(case.schedule)
    _poison(executor)
    audit(executor, ctx.rank)  # first: it names the nano-op that is at fault
    planned = _observed(executor)
    what = f"schedule {case.schedule.name!r} against the sequential run"
    layers_TD, logits_RV = sequential.layers_TD, sequential.logits_RV
    worst = _compare(planned, layers_TD, logits_RV, tolerance, what, ctx.rank, clear)
    orders = _check_repeats(setting, executor, planned)
    return Verification(
        passed=True,
        device=_device_name(setting.weights.device),
        model=case.model.name,
        num_layers=case.num_layers,
        num_ranks=ctx.world_size,
        dtype=case.model.torch_dtype,
        max_relative_error=worst,
        max_reference_error=reference_error,
        tolerance=tolerance,
        orders_checked=orders,
    )


def _setting(ctx: RankContext, case: Case, make_resources: MakeResources) -> _Setting:
    if case.tp_degree != ctx.world_size:
        raise ValueError(f"the case is for {case.tp_degree} ranks, but {ctx.world_size} run it")
    graph = OpGraph.build(case.model, case.tp_degree)
    # Order and token ranges; whether the shares fit is for the hardware's owner, `check_plan`.
    check(case.schedule, graph, num_sms=_ANY_SHARE, sm_granularity=1)
    device = torch.device(ctx.device)
    resources = make_resources(ctx, (case.schedule, case.sequential))
    mix = _straddling_mix(case)
    cache = PagedKvCache(
        case.model,
        num_pages=steady_pages(mix, case.page_size, mixed_lengths=True) + 8,
        device=device,
        tp_degree=case.tp_degree,
        rank=ctx.rank,
        page_size=case.page_size,
        num_layers=case.num_layers,
        seed=case.seed,
    )
    cache.fill_random(case.seed)
    weights = random_weights(
        case.model,
        rank=ctx.rank,
        tp_degree=case.tp_degree,
        device=device,
        seed=case.seed,
        num_layers=case.num_layers,
        with_o_columns=has_o_columns((case.schedule, case.sequential)),
    )
    return _Setting(
        case=case,
        rank=ctx.rank,
        graph=graph,
        weights=weights,
        cache=cache,
        requests=steady_requests(
            mix, cache, vocab_size=case.model.vocab_size, seed=case.seed, mixed_lengths=True
        ),
        resources=resources,
    )


def _straddling_mix(case: Case) -> RowMix:
    """The case's mix, prompts lengthened by a few tokens until one straddles two nano-batches."""
    nano_batches = case.schedule.nano_batches
    mix = batch_mix(nano_batches, case.decode_context_tokens, case.prefill_context_tokens)
    boundaries: set[int] = set()
    seen = 0
    for nano_batch in nano_batches:
        seen += nano_batch.num_tokens - nano_batch.decode_tokens
        boundaries.add(seen)
    boundaries -= {0, seen}  # places inside the stream of prefill rows where it is cut
    for _ in range(8):
        prompt = max(1, round(2 * mix.prefill_context_tokens - 1))
        first = prompt - prompt // 2
        if not boundaries or any((cut - first) % prompt for cut in boundaries):
            return mix
        mix = replace(mix, prefill_context_tokens=mix.prefill_context_tokens + 0.5)
    raise AssertionError(f"no prompt length straddles a nano-batch boundary of {nano_batches}")


def _poison(executor: Executor) -> None:
    executor.buffers.poison()
    slots_T, page_size = executor.batch.slots_T, executor.cache.page_size
    pages_T, offsets_T = slots_T // page_size, slots_T % page_size
    for pages_PGBH in (*executor.cache.k_pages, *executor.cache.v_pages):
        pages_PGBH[pages_T, :, offsets_T] = _CACHE_POISON
    executor.logits_RV.fill_(float("nan"))


def _observed(executor: Executor, run: Callable[[Observe], None] | None = None) -> _Outputs:
    """Run on poisoned buffers and keep every layer's output."""
    num_layers, nano_ops = len(executor.weights.layers), executor.schedule.nano_ops
    residual_TD = executor.buffers.residual_TD
    layers_TD = [torch.full_like(residual_TD, float("nan")) for _ in range(num_layers)]

    def observe(instance: Instance) -> None:
        # The attention norm of the next layer has just added this layer's FFN to the residual.
        nano_op = nano_ops[instance.index]
        if nano_op.op == "attn_norm" and instance.layer > 0:
            rows = slice(*nano_op.tokens)
            layers_TD[instance.layer - 1][rows].copy_(residual_TD[rows])

    _poison(executor)
    (run or executor.run)(observe)
    torch.add(residual_TD, executor.buffers.ffn_TD, out=layers_TD[-1])
    broken = executor.buffers.broken_guards()
    if broken:
        raise VerificationError(
            f"schedule {executor.schedule.name!r} on rank {executor.weights.rank} wrote the guard "
            f"rows of {', '.join(broken)}"
        )
    return _Outputs(
        layers_TD=tuple(executor.batch.to_logical(layer_TD) for layer_TD in layers_TD),
        logits_RV=executor.logits_RV.clone(),
        token_ids_R=executor.next_token_ids_R.clone(),
    )


def _reference(setting: _Setting) -> ReferenceOutput:
    is_cuda = setting.weights.device.type == "cuda"
    has_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = reference_forward(
        setting.weights,
        setting.cache,
        setting.requests,
        dtype=torch.float32 if is_cuda else torch.float64,
    )
    torch.backends.cuda.matmul.allow_tf32 = has_tf32
    return reference


def _clear_rows(
    setting: _Setting, reference: ReferenceOutput, tolerance: float
) -> tuple[Tensor, ...]:
    """Rows to compare, of each layer's output and of the logits."""
    clear = [margin_T >= _CLEAR_FACTOR * tolerance for margin_T in reference.margins_T]
    share = float(clear[-1].float().mean())
    if share < _LEAST_CLEAR:
        raise VerificationError(
            f"only {share:.0%} of the rows of {setting.case.model.name} go to experts by a clear "
            f"margin, so that too little is left to compare; {_LEAST_CLEAR:.0%} must: verify with "
            "another seed or fewer layers"
        )
    ends = accumulate(request.num_rows for request in setting.requests)
    pairs = zip(ends, setting.requests, strict=True)
    last = [end - 1 for end, request in pairs if request.is_complete]
    return (*clear, clear[-1][last])


def _compare(
    ours: _Outputs,
    layers_TD: tuple[Tensor, ...],
    logits_RV: Tensor,
    tolerance: float,
    what: str,
    rank: int,
    clear: tuple[Tensor, ...],
) -> float:
    """Largest relative error of all outputs; raises beyond the tolerance."""
    worst = 0.0
    pairs = [
        (f"the output of layer {layer}", a_TD, b_TD)
        for layer, (a_TD, b_TD) in enumerate(zip(ours.layers_TD, layers_TD, strict=True))
    ]
    pairs.append(("the logits", ours.logits_RV, logits_RV))
    for (name, a_TX, b_TX), clear_T in zip(pairs, clear, strict=True):
        if not clear_T.any():
            continue
        rows_T = clear_T.nonzero().flatten()
        a_TX, b_TX = a_TX[rows_T], b_TX[rows_T]
        dtype = torch.promote_types(a_TX.dtype, torch.float32)
        dtype = torch.promote_types(dtype, b_TX.dtype)
        difference_TX, b_TX = a_TX.to(dtype) - b_TX.to(dtype), b_TX.to(dtype)
        error = float(difference_TX.norm() / b_TX.norm())
        row_errors_T = difference_TX.norm(dim=-1) / b_TX.norm(dim=-1).clamp_min(1e-12)
        row_errors_T = row_errors_T.nan_to_num(nan=float("inf"))
        worst_row = int(row_errors_T.argmax())
        row, row_error = int(rows_T[worst_row]), float(row_errors_T[worst_row])
        if not (error <= tolerance and row_error <= _ROW_FACTOR * tolerance):
            raise VerificationError(
                f"{what}: {name} on rank {rank} differs by a relative error of {error:.3g} "
                f"(tolerance {tolerance:g}), most in logical row {row} ({row_error:.3g})"
            )
        worst = max(worst, error)
    return worst


def _check_repeats(setting: _Setting, executor: Executor, planned: _Outputs) -> int:
    """Repeats, random legal orders and the CUDA graph, bit by bit; how many orders were run."""
    case = setting.case

    def same(how: str, outputs: _Outputs) -> None:
        pairs = [
            *zip(planned.layers_TD, outputs.layers_TD, strict=True),
            (planned.logits_RV, outputs.logits_RV),
            (planned.token_ids_R, outputs.token_ids_R),
        ]
        for place, (a, b) in enumerate(pairs):
            if not same_bits(a, b):
                last = len(planned.layers_TD)
                name = f"layer {place}" if place < last else ("logits", "tokens")[place - last]
                raise VerificationError(
                    f"schedule {case.schedule.name!r} in {how} gives other bits than in plan order "
                    f"({name}, rank {setting.rank}): a nano-op reads what another may still write, "
                    "or a kernel is not repeatable"
                )

    same("a repeat", _observed(executor))
    for index in range(case.num_random_orders):
        order = random_legal_order(executor.instances, case.seed + index)
        same(
            f"random legal order {index}",
            _observed(executor, lambda observe, order=order: executor.run_in_order(order, observe)),
        )
    final_only = replace(planned, layers_TD=planned.layers_TD[-1:])
    if executor.device.type == "cuda":
        executor.capture()
        _poison(executor)
        executor.replay()
        torch.cuda.synchronize()
        _same_end(setting, executor, final_only)
    return 1 + case.num_random_orders


def _same_end(setting: _Setting, executor: Executor, planned: _Outputs) -> None:
    """The CUDA graph cannot be observed within: compare the last layer and the logits."""
    last_TD = executor.buffers.residual_TD + executor.buffers.ffn_TD
    is_same = same_bits(executor.batch.to_logical(last_TD), planned.layers_TD[-1])
    if not is_same or not same_bits(executor.logits_RV, planned.logits_RV):
        raise VerificationError(
            f"schedule {setting.case.schedule.name!r} as a CUDA graph gives other bits than run "
            f"eagerly (rank {setting.rank})"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
