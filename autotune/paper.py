"""The cost model of the NanoFlow paper (arXiv 2408.12757, section 3), equation by equation.

It serves comparison and bounds in the paper's own terms; the search uses measured profiles. Peaks
are datasheet values, times are of one whole iteration on all GPUs together.

Notation (paper -> here)
    Compute, MemBW, MemSize, NetBW   aggregates: `num_gpus` times the HardwareSpec's value
    P_model, L, D_model, S_type      num_parameters, num_hidden_layers, hidden_size, dtype_bytes
    B_dense                          dense_batch_tokens
    p, d                             WorkloadSpec.prompt_tokens, decode_tokens
    T_mem, T_compute, T_net, T_R     memory_us, compute_us, network_us, memory_compute_ratio

`num_parameters` is an argument because the paper's figures 2 and 3 use nominal counts (8e9, 70e9,
72e9); pass `model.num_parameters` for the true one. NetBW is one way: the paper's table 1 prints
both directions together, and its figure 2 divides by half of that.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.op_graph import OpGraph, RowMix
from ..runtime.op_shapes import op_of_shape
from ..search_spaces.schema import HardwareSpec, ModelSpec, WorkloadSpec


def memory_us(hardware: HardwareSpec) -> float:
    """Equation 1, T_mem = MemSize / MemBW: a full memory is read once in an iteration."""
    return 1e6 * hardware.memory_bytes / hardware.memory_bytes_per_s


def compute_us(
    model: ModelSpec,
    hardware: HardwareSpec,
    num_gpus: int,
    dense_batch_tokens: float,
    num_parameters: float,
) -> float:
    """Equation 2, T_compute = 2 B_dense P_model / Compute."""
    flops_per_s = num_gpus * hardware.peak(model.torch_dtype)
    return 1e6 * 2 * dense_batch_tokens * num_parameters / flops_per_s


def network_us(
    model: ModelSpec, hardware: HardwareSpec, num_gpus: int, dense_batch_tokens: float
) -> float:
    """Equation 3, T_net = 4 N_GPU B_dense D_model S_type L / NetBW, times (N - 1) / N.

    Two all-reduces a layer, each of which sends the batch twice. The equation leaves the factor
    (N - 1) / N out; figure 2 and table 2 have it.
    """
    sent_bytes = (
        4 * (num_gpus - 1) * dense_batch_tokens * model.hidden_size * model.dtype_bytes
    ) * model.num_hidden_layers
    return 1e6 * sent_bytes / (num_gpus * hardware.link_bytes_per_s)


def memory_compute_ratio(
    model: ModelSpec,
    hardware: HardwareSpec,
    num_gpus: int,
    workload: WorkloadSpec,
    num_parameters: float,
) -> float:
    """Equation 4, T_R = T_mem / T_compute at the largest dense batch; above 1: memory-bound.

    Raises:
        ValueError: see `max_dense_batch_tokens`.
    """
    tokens = max_dense_batch_tokens(model, hardware, num_gpus, workload, num_parameters)
    return memory_us(hardware) / compute_us(model, hardware, num_gpus, tokens, num_parameters)


def network_compute_ratio(
    model: ModelSpec, hardware: HardwareSpec, num_gpus: int, num_parameters: float
) -> float:
    """T_net / T_compute (section 3.2, figure 2); the dense batch cancels out."""
    return network_us(model, hardware, num_gpus, 1) / compute_us(
        model, hardware, num_gpus, 1, num_parameters
    )


def optimal_tokens_per_s_per_gpu(
    model: ModelSpec, hardware: HardwareSpec, num_parameters: float
) -> float:
    """Equation 5, Throughput_opt = Compute / (2 P_model): prompt and generated tokens together."""
    return hardware.peak(model.torch_dtype) / (2 * num_parameters)


def max_dense_batch_tokens(
    model: ModelSpec,
    hardware: HardwareSpec,
    num_gpus: int,
    workload: WorkloadSpec,
    num_parameters: float,
) -> float:
    """B_dense when the KV cache of the decoding requests fills the memory beside the weights.

    The paper prints no formula; this one reproduces its figure 3 to the printed digits:
    n = (MemSize - S_type P_model) / (KV bytes per token x (p + d / 2)) requests decode, and each
    of their rows brings p / d prefill rows with it, so B_dense = n (p + d) / d.

    Raises:
        ValueError: the weights fill the memory, or the workload decodes nothing.
    """
    if workload.decode_fraction == 0:
        raise ValueError(
            "`decode_tokens` must be positive for B_dense to be limited by the KV cache, but got "
            f"decode_tokens={workload.decode_tokens} in {workload.name}; use a decoding workload"
        )
    memory_bytes = num_gpus * hardware.memory_bytes
    kv_bytes = memory_bytes - num_parameters * model.dtype_bytes
    if kv_bytes <= 0:
        raise ValueError(
            "weights must leave memory for the KV cache, but got "
            f"{num_parameters * model.dtype_bytes:.4g} weight bytes on memory_bytes={memory_bytes} "
            f"({num_gpus} x {hardware.name}); use more GPUs"
        )
    num_decodes = kv_bytes / (model.kv_bytes_per_token * workload.decode_context_tokens)
    return num_decodes / workload.decode_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Table2Row:
    """One operation class of the paper's table 2: whole model, one iteration, all GPUs."""

    name: str
    """KQV, O, UG, D, DecAttn, PfAttn, Net."""
    flops: float
    memory_bytes: float
    link_bytes: float

    def compute_ms(self, model: ModelSpec, hardware: HardwareSpec, num_gpus: int) -> float:
        """T_compute at the datasheet peak."""
        return 1e3 * self.flops / (num_gpus * hardware.peak(model.torch_dtype))

    def memory_ms(self, hardware: HardwareSpec, num_gpus: int) -> float:
        """T_mem at the datasheet bandwidth."""
        return 1e3 * self.memory_bytes / (num_gpus * hardware.memory_bytes_per_s)

    def network_ms(self, hardware: HardwareSpec, num_gpus: int) -> float:
        """T_net at the one-way link bandwidth."""
        return 1e3 * self.link_bytes / (num_gpus * hardware.link_bytes_per_s)


def table2(
    model: ModelSpec, num_gpus: int, dense_batch_tokens: int, workload: WorkloadSpec
) -> tuple[Table2Row, ...]:
    """Table 2 from the op graph: FLOPs and bytes of each operation class.

    The paper counts GEMMs and attention unsharded (weights and activations once, whatever the
    number of GPUs) and the collectives summed over GPUs. Where it departs from what the op graph
    holds to be true of our kernels, its own count is used here and named:

    - UG is a GEMM that writes both products, without the activation;
    - prefill attention attends to the whole prompt, without causal halving;
    - attention moves the fused projection's output in, its own output out, and the keys and
      values of earlier tokens once (`_attention_memory_bytes`);
    - the memory traffic of a collective equals its link traffic.
    """
    decode_tokens = dense_batch_tokens * workload.decode_fraction
    mix = RowMix(
        decode_tokens=decode_tokens,
        prefill_tokens=dense_batch_tokens - decode_tokens,
        decode_context_tokens=workload.decode_context_tokens,
        prefill_context_tokens=workload.prompt_tokens,
    )
    whole = OpGraph.build(model, tp_degree=1)
    rows: list[Table2Row] = []
    for name, op in (("KQV", "kqv"), ("O", "o_proj"), ("UG", "up_gate"), ("D", "down")):
        gemm = op_of_shape("gemm", whole.op(op).shape, model.dtype_bytes)
        rows.append(
            Table2Row(
                name=name,
                flops=whole.num_layers * gemm.flops(mix),
                memory_bytes=whole.num_layers * gemm.memory_bytes(mix),
                link_bytes=0.0,
            )
        )
    cached_decode = mix.decode_tokens * mix.decode_context_tokens
    cached_prefill = workload.prompt_tokens / 2
    for name, op, tokens, cached_tokens in (
        ("DecAttn", "decode_attention", mix.decode_tokens, cached_decode),
        ("PfAttn", "prefill_attention", mix.prefill_tokens, cached_prefill),
    ):
        rows.append(
            Table2Row(
                name=name,
                flops=whole.num_layers * whole.op(op).flops(mix),
                memory_bytes=_attention_memory_bytes(model, tokens, cached_tokens),
                link_bytes=0.0,
            )
        )
    return (*rows, _network_row(OpGraph.build(model, tp_degree=num_gpus), mix))


def _attention_memory_bytes(model: ModelSpec, tokens: float, cached_tokens: float) -> float:
    """Queries, keys, values in and output out of each row, and the cached tokens read.

    Decode rows read their whole context. Of a prefill chunk, only the prompt that straddles two
    iterations has earlier keys: half a prompt on average. Both reproduce the printed GB; the
    paper gives no formula.
    """
    row_bytes = (2 * model.qo_size + 2 * model.kv_size) * model.dtype_bytes
    return model.num_hidden_layers * tokens * row_bytes + cached_tokens * model.kv_bytes_per_token


def _network_row(sharded: OpGraph, mix: RowMix) -> Table2Row:
    collectives = [op for op in sharded.layer if op.resource == "network"]
    repeats = sharded.num_layers * sharded.tp_degree
    link_bytes = repeats * sum(op.link_bytes(mix) for op in collectives)
    return Table2Row(
        name="Net",
        flops=repeats * sum(op.flops(mix) for op in collectives),
        memory_bytes=link_bytes,
        link_bytes=link_bytes,
    )
