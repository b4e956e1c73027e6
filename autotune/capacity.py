"""How many GPUs a model needs, and the largest dense batch whose KV cache fits on them.

    room for KV = usable share of memory - weights - activations          (bytes, one GPU)
    KV in use   = decodes x mean context + prompts being prefilled        (tokens)

A dense batch is steady when every decode row is one request in flight, at its mean context
p + d/2, and the prefill rows replace the requests that finish: d/(p+d) of the rows decode.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.op_graph import RowMix
from ..search_spaces.schema import HardwareSpec, ModelSpec, SearchSpace, WorkloadSpec

KV_SHARE = 1 / 3
"""Share of the memory that the default number of GPUs leaves for KV."""
USABLE_SHARE = 0.9
"""Share of the memory that weights, activations and KV may take; the rest is the driver's, the
allocator's and the communication buffers'."""
DECODE_GRANULARITY = 8
"""Decode rows of a dense batch are a multiple of this."""


class DoesNotFitError(ValueError):
    """The model, or the smallest allowed batch, needs more memory than there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes of one GPU under one dense batch."""

    memory_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int

    @property
    def room_bytes(self) -> float:
        """What is left of the usable share beside weights and activations."""
        return USABLE_SHARE * self.memory_bytes - self.weight_bytes - self.activation_bytes

    @property
    def fits(self) -> bool:
        """Whether the KV cache fits into the room."""
        return self.kv_bytes <= self.room_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseBatch:
    """The dense batch that a plan is made for, and the memory it takes."""

    mix: RowMix
    memory: MemoryUse

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return round(self.mix.tokens)

    @property
    def decode_tokens(self) -> int:
        """Decode rows."""
        return round(self.mix.decode_tokens)


def rank_weight_bytes(model: ModelSpec, num_gpus: int) -> int:
    """Weights of one tensor-parallel rank: GEMMs and LM head are shards, the rest is repeated."""
    per_layer = 2 * model.hidden_size + model.router_parameters
    repeated = model.num_hidden_layers * per_layer + model.hidden_size
    repeated += model.vocab_size * model.hidden_size
    sharded = model.num_parameters - repeated
    return (-(-sharded // num_gpus) + repeated) * model.dtype_bytes


def activation_bytes(model: ModelSpec, num_gpus: int, tokens: int) -> int:
    """Activation buffers of one layer, reused by all layers, and fp32 logits of every row.

    With experts a row is there as often as it is routed, from the router to the combine.
    """
    attention = 2 * model.qo_size + 2 * model.kv_size
    routed = model.num_experts_per_tok or 0
    per_rank = attention + 3 * model.intermediate_size * max(1, routed)
    row_elements = (3 + 2 * routed) * model.hidden_size + -(-per_rank // num_gpus)
    return tokens * (row_elements * model.dtype_bytes + 4 * -(-model.vocab_size // num_gpus))


def allowed_num_gpus(model: ModelSpec, hardware: HardwareSpec) -> tuple[int, ...]:
    """Powers of two that share the fast interconnect and divide the heads and the FFN."""
    widths = (model.num_attention_heads, model.num_key_value_heads, model.intermediate_size)
    counts: list[int] = []
    count = 1
    while count <= max(1, hardware.max_link_gpus):
        if all(width % count == 0 for width in widths):
            counts.append(count)
        count *= 2
    return tuple(counts)


def num_gpus_default(model: ModelSpec, hardware: HardwareSpec) -> int:
    """The smallest number of GPUs that holds the weights and leaves a third of memory for KV.

    Raises:
        DoesNotFitError: not even the largest allowed number does.
    """
    allowed = allowed_num_gpus(model, hardware)
    room = (1 - KV_SHARE) * hardware.memory_bytes
    for count in allowed:
        if rank_weight_bytes(model, count) <= room:
            return count
    largest = allowed[-1]
    raise DoesNotFitError(
        f"weights must leave a third of the memory for KV, but {model.name} on {largest} x "
        f"{hardware.name} has {_gb(rank_weight_bytes(model, largest))} of weights a GPU and only "
        f"{_gb(room)} for them (memory {_gb(hardware.memory_bytes)}); take a --gpu with more "
        "memory, or a smaller --model"
    )


def check_num_gpus(model: ModelSpec, hardware: HardwareSpec, num_gpus: int) -> None:
    """Refuse a number of GPUs that cannot share this model.

    Raises:
        ValueError: not a power of two, too many, or the heads do not divide.
    """
    allowed = allowed_num_gpus(model, hardware)
    if num_gpus not in allowed:
        raise ValueError(
            f"--num-gpus must be a power of two, at most {hardware.max_link_gpus} on "
            f"{hardware.name}, that divides the heads of {model.name} "
            f"({model.num_attention_heads} query, {model.num_key_value_heads} KV), but got "
            f"{num_gpus}; choose from {', '.join(map(str, allowed))}"
        )


def dense_batch(
    model: ModelSpec,
    hardware: HardwareSpec,
    workload: WorkloadSpec,
    space: SearchSpace,
    num_gpus: int,
) -> DenseBatch:
    """The largest allowed dense batch whose KV cache fits on `num_gpus` GPUs.

    Raises:
        ValueError: `num_gpus` cannot share this model.
        DoesNotFitError: weights and the smallest allowed batch need more memory than there is.
    """
    check_num_gpus(model, hardware, num_gpus)
    sizes = sorted(space.dense_batch_tokens, reverse=True)
    batch = None
    for tokens in sizes:
        batch = _batch(model, hardware, workload, num_gpus, tokens)
        if batch.memory.fits:
            return batch
    assert batch is not None, space
    memory = batch.memory
    raise DoesNotFitError(
        f"weights, activations and KV must fit in {USABLE_SHARE:.0%} of the memory, but "
        f"{model.name} on {num_gpus} x {hardware.name} needs, a GPU, "
        f"{_gb(memory.weight_bytes)} for weights, {_gb(memory.activation_bytes)} for activations "
        f"and {_gb(memory.kv_bytes)} for the KV of the smallest batch ({sizes[-1]} tokens), of "
        f"{_gb(USABLE_SHARE * memory.memory_bytes)}; {_remedy(model, hardware, num_gpus)}"
    )


def row_mix(workload: WorkloadSpec, tokens: int) -> RowMix:
    """Decode and prefill rows of a steady dense batch of `tokens` rows."""
    decodes = round(tokens * workload.decode_fraction / DECODE_GRANULARITY) * DECODE_GRANULARITY
    return RowMix(
        decode_tokens=min(decodes, tokens),
        prefill_tokens=max(0, tokens - decodes),
        decode_context_tokens=workload.decode_context_tokens,
        prefill_context_tokens=workload.prefill_context_tokens,
    )


def _batch(
    model: ModelSpec, hardware: HardwareSpec, workload: WorkloadSpec, num_gpus: int, tokens: int
) -> DenseBatch:
    mix = row_mix(workload, tokens)
    memory = memory_use(model, hardware, num_gpus, mix, workload.prompt_tokens)
    return DenseBatch(mix=mix, memory=memory)


def memory_use(
    model: ModelSpec, hardware: HardwareSpec, num_gpus: int, mix: RowMix, prompt_tokens: float
) -> MemoryUse:
    """Bytes of one GPU under a dense batch whose prompts have this mean length."""
    # Prompts in this iteration, and one that is cut by its end.
    prompts = mix.prefill_tokens + prompt_tokens if mix.prefill_tokens else 0.0
    kv_tokens = mix.decode_tokens * mix.decode_context_tokens + prompts
    return MemoryUse(
        memory_bytes=hardware.memory_bytes,
        weight_bytes=rank_weight_bytes(model, num_gpus),
        activation_bytes=activation_bytes(model, num_gpus, round(mix.tokens)),
        kv_bytes=round(kv_tokens * model.kv_bytes_per_token / num_gpus),
    )


def _remedy(model: ModelSpec, hardware: HardwareSpec, num_gpus: int) -> str:
    more = [count for count in allowed_num_gpus(model, hardware) if count > num_gpus]
    if more:
        return f"use --num-gpus {more[0]} or more"
    return "take a --gpu with more memory, or a smaller --model"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB ({num_bytes:.0f} bytes)"
