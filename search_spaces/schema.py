"""The four input records of a search: ModelSpec, HardwareSpec, WorkloadSpec, SearchSpace.

Everything downstream (op graph, profile, plan) is a function of these. They are plain data:
frozen, hashable, base SI units, no torch. `loader.py` reads them from YAML and from Hugging Face
`config.json` files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["llama", "qwen2", "mixtral"]
Dtype = Literal["bfloat16", "float16", "float32"]
RowOrder = Literal["decodes_first", "interleaved"]
RopeType = Literal["linear", "llama3", "yarn"]

DTYPE_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
ROPE_KEYS: dict[RopeType, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_slow", "beta_fast", "attention_factor"),
}
"""Keys that each type of rotary scaling needs besides `factor`."""
_ROPE_KEYS_ANY = frozenset(key for keys in ROPE_KEYS.values() for key in keys)


def _require(condition: bool, rule: str, **values: object) -> None:
    if not condition:
        got = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"{rule}, but got {got}")


MAX_LAYERS, MAX_SMS = 4096, 4096
"""Everything that goes over layers or SMs one by one stays within seconds and megabytes."""
MAX_NAME = 120
"""Names become parts of file names, which hold 255 bytes."""


def _require_name(name: str) -> None:
    _require(
        name.isprintable() and 0 < len(name) <= MAX_NAME and len(name.encode()) <= 2 * MAX_NAME,
        f"`name` must be 1 to {MAX_NAME} printable characters (it becomes part of file names)",
        name=name[: MAX_NAME + 1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of the first training.

    Keys as in `rope_parameters` of a Hugging Face `config.json`; each type has its own.
    """

    rope_type: RopeType
    factor: float
    """Positions are as if divided by it, where frequencies are low (`linear`: everywhere)."""
    original_max_position_embeddings: int | None = None
    """Positions of the first training (`llama3`, `yarn`)."""
    low_freq_factor: float | None = None
    """`llama3`: fewer turns than this over the first training are stretched by `factor`."""
    high_freq_factor: float | None = None
    """`llama3`: more turns than this are left as they are."""
    beta_slow: float | None = None
    """`yarn`: as `low_freq_factor`."""
    beta_fast: float | None = None
    """`yarn`: as `high_freq_factor`."""
    attention_factor: float | None = None
    """`yarn`: multiplies cosines and sines."""

    def __post_init__(self) -> None:
        given = {name for name in _ROPE_KEYS_ANY if getattr(self, name) is not None}
        _require(
            given == set(ROPE_KEYS[self.rope_type]),
            f"rotary scaling of type {self.rope_type!r} needs "
            f"{', '.join(('factor', *ROPE_KEYS[self.rope_type]))}, and no other",
            given=sorted(given),
        )
        for name in ("factor", *sorted(given)):
            value = getattr(self, name)
            _require(value > 0, f"`rope_scaling.{name}` must be positive", value=value)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            _require(
                low not in given or getattr(self, low) < getattr(self, high),
                f"`{low}` must be smaller than `{high}`",
                low=getattr(self, low),
                high=getattr(self, high),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer; field names as in a Hugging Face `config.json`."""

    name: str
    architecture: Architecture
    """`qwen2` adds a bias to the fused key, query and value projection; `mixtral` has experts."""
    hidden_size: int
    intermediate_size: int
    """Of one expert where there are several."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = False
    torch_dtype: Dtype = "bfloat16"
    """Type of weights, activations and KV cache."""
    num_local_experts: int | None = None
    """Feed-forward networks of a layer, of which a router chooses; None: one, without a router."""
    num_experts_per_tok: int | None = None
    """Experts that each token goes to."""
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _require_name(self.name)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            _require(
                getattr(self, name) > 0, f"`{name}` must be positive", name=getattr(self, name)
            )
        _require(
            self.num_hidden_layers <= MAX_LAYERS,
            f"`num_hidden_layers` must be at most {MAX_LAYERS}",
            num_hidden_layers=self.num_hidden_layers,
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "`num_attention_heads` must be a multiple of `num_key_value_heads`",
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
        )
        experts, per_token = self.num_local_experts, self.num_experts_per_tok
        _require(
            (self.architecture == "mixtral") == (experts is not None) == (per_token is not None),
            "`num_local_experts` and `num_experts_per_tok` belong to `architecture: mixtral`, and "
            "to no other",
            architecture=self.architecture,
            num_local_experts=experts,
            num_experts_per_tok=per_token,
        )
        _require(
            experts is None or per_token is None or 0 < per_token <= experts,
            "`num_experts_per_tok` must be at least 1 and at most `num_local_experts`",
            num_local_experts=experts,
            num_experts_per_tok=per_token,
        )
        _require(self.head_dim % 2 == 0, "`head_dim` must be even (rotary)", head_dim=self.head_dim)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight, activation or KV element."""
        return DTYPE_BYTES[self.torch_dtype]

    @property
    def qo_size(self) -> int:
        """Width of the queries, and of the attention output."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys (and of the values)."""
        return self.num_key_value_heads * self.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the fused KQV projection adds a bias."""
        return self.architecture == "qwen2"

    @property
    def router_parameters(self) -> int:
        """Parameters of one layer's router, 0 without experts."""
        return (self.num_local_experts or 0) * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, its two norms and all its experts included."""
        return self._layer_parameters(self.num_local_experts or 1)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, counted from its shapes."""
        return self._model_parameters(self.layer_parameters)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those that it is routed to."""
        return self._model_parameters(self._layer_parameters(self.num_experts_per_tok or 1))

    def _layer_parameters(self, num_experts: int) -> int:
        hidden, qkv = self.hidden_size, self.qo_size + 2 * self.kv_size
        attention = hidden * qkv + self.qo_size * hidden + (qkv if self.has_qkv_bias else 0)
        experts = num_experts * 3 * hidden * self.intermediate_size
        return attention + self.router_parameters + experts + 2 * hidden

    def _model_parameters(self, layer_parameters: int) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer_parameters + embeddings + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.num_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers (all tensor-parallel ranks)."""
        return 2 * self.kv_size * self.num_hidden_layers * self.dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSpec:
    """One accelerator, by its datasheet; live values are checked against it at start."""

    name: str
    device_name: str
    """What the driver calls it, e.g. `NVIDIA H200`."""
    num_sms: int
    sm_granularity: int
    """Smallest SM partition and its alignment."""
    peak_flops_per_s: dict[str, float]
    """Dense peak by dtype name."""
    memory_bytes: int
    memory_bytes_per_s: float
    l2_bytes: int
    link_bytes_per_s: float
    """Interconnect bandwidth of one GPU, one way."""
    max_link_gpus: int
    """GPUs that share the fast interconnect."""
    power_cap_w: float

    def __post_init__(self) -> None:
        _require_name(self.name)
        for name in ("num_sms", "sm_granularity", "memory_bytes", "memory_bytes_per_s"):
            _require(
                getattr(self, name) > 0, f"`{name}` must be positive", name=getattr(self, name)
            )
        _require(
            self.num_sms <= MAX_SMS, f"`num_sms` must be at most {MAX_SMS}", num_sms=self.num_sms
        )
        for dtype, flops in self.peak_flops_per_s.items():
            _require(flops > 0, "`peak_flops_per_s` must be positive", dtype=dtype, flops=flops)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of a dtype.

        Raises:
            ValueError: the YAML gives no peak for this dtype.
        """
        if dtype not in self.peak_flops_per_s:
            known = ", ".join(sorted(self.peak_flops_per_s))
            raise ValueError(f"{self.name} has no peak for dtype {dtype!r}; it knows {known}")
        return self.peak_flops_per_s[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """Average request of the traffic that a plan is made for."""

    name: str
    prompt_tokens: float
    """Mean prompt length (`p` of the paper)."""
    decode_tokens: float
    """Mean generated length (`d` of the paper)."""
    prompt_tokens_std: float = 0.0
    decode_tokens_std: float = 0.0

    def __post_init__(self) -> None:
        _require_name(self.name)
        _require(
            self.prompt_tokens > 0, "`prompt_tokens` must be positive", value=self.prompt_tokens
        )
        _require(
            self.decode_tokens >= 0,
            "`decode_tokens` must not be negative",
            value=self.decode_tokens,
        )

    @property
    def decode_fraction(self) -> float:
        """Share of decode rows in a steady dense batch: d / (p + d)."""
        return self.decode_tokens / (self.prompt_tokens + self.decode_tokens)

    @property
    def decode_context_tokens(self) -> float:
        """Mean KV length that a decode row reads: p + d / 2."""
        return self.prompt_tokens + self.decode_tokens / 2

    @property
    def prefill_context_tokens(self) -> float:
        """Mean number of keys that a prefill row attends to, causally: (p + 1) / 2."""
        return (self.prompt_tokens + 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What the search may decide, and how long it may think."""

    name: str
    dense_batch_tokens: tuple[int, ...]
    """Dense-batch sizes considered; the largest that fits the memory is the default bucket."""
    token_granularity: int
    """Nano-batch boundaries are multiples of this."""
    max_nano_batches: int
    row_orders: tuple[RowOrder, ...]
    sm_shares: tuple[int, ...]
    """SM shares a nano-op may take when it shares the GPU; the whole GPU is always allowed."""
    network_sm_shares: tuple[int, ...]
    """SM shares of a collective that runs beside other work."""
    milp_time_limit_s: float
    milp_relative_gap: float
    simulator_trials: int
    """Optuna trials on the simulator."""
    hardware_trials: int
    """Optuna trials executed and measured, where there is a GPU."""

    def __post_init__(self) -> None:
        _require_name(self.name)
        _require(self.max_nano_batches >= 1, "`max_nano_batches` must be at least 1", value=self)
        _require(
            self.token_granularity > 0, "`token_granularity` must be positive", space=self.name
        )
        for tokens in self.dense_batch_tokens:
            _require(
                tokens > 0 and tokens % self.token_granularity == 0,
                "`dense_batch_tokens` must be positive multiples of `token_granularity`",
                tokens=tokens,
                token_granularity=self.token_granularity,
            )
