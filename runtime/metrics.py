"""What `/metrics` tells Prometheus: the engine's own figures, read when asked, and request times.

Every server has a registry of its own, so that several may live in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .sequence import EngineStats, FinishReason

_GAUGES = {
    "running": ("requests_running", "Requests with pages on the device"),
    "waiting": ("requests_waiting", "Requests in the queue"),
    "swapped": ("requests_swapped", "Preempted requests, their pages in host memory"),
    "kv_pages_used": ("kv_pages_used", "KV-cache pages in use"),
    "kv_pages_total": ("kv_pages", "KV-cache pages in all"),
    "last_step_s": ("last_step_seconds", "Duration of the last step"),
    "bucket_tokens": ("bucket_tokens", "Rows of the last step's dense batch"),
    "offload_host_bytes": ("offload_host_bytes", "KV of finished requests in host memory"),
    "offload_disk_bytes": ("offload_disk_bytes", "KV of finished requests on disk"),
}
_COUNTERS = {
    "tokens_generated_total": ("generated_tokens", "Tokens generated"),
    "prompt_tokens_total": ("prompt_tokens", "Prompt tokens computed or taken from the cache"),
    "prefix_tokens_total": ("prefix_tokens", "Prompt tokens whose KV came from the offload store"),
    "preemptions_total": ("preemptions", "Requests moved to host memory for lack of pages"),
    "steps_total": ("steps", "Engine steps"),
    "eager_steps_total": ("eager_steps", "Steps whose layout no captured graph had"),
    "padding_rows_total": ("padding_rows", "Rows of dense batches that held no token"),
    "host_s_total": ("host_seconds", "Time in which the engine thread worked for its steps"),
    "step_s_total": ("step_seconds", "Time of all steps"),
    "swap_bytes_total": ("swap_bytes", "KV bytes moved by preemption"),
}
_PREFIX = "nanoflow_"
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_TOKENS = tuple(2**n for n in range(18))


class _EngineCollector(Collector):
    """Reads the engine when Prometheus asks."""

    def __init__(self, read: Callable[[], EngineStats]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        stats = self._read()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value=getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=getattr(stats, field))
        plan = GaugeMetricFamily(_PREFIX + "plan_in_use", "Plan of the last step", labels=["plan"])
        # By name alone: the reason behind it has numbers of the step, and each would be a series.
        plan.add_metric([stats.plan_in_use.partition(" (")[0]], 1)
        yield plan


class ServerMetrics:
    """Counts and times of requests, beside the engine's figures."""

    def __init__(self, read_stats: Callable[[], EngineStats]) -> None:
        """Make a registry.

        Args:
            read_stats: the engine's figures at the instant of the call.
        """
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(read_stats))
        self._finished = Counter(
            _PREFIX + "requests_finished",
            "Requests that ended, by reason",
            ["reason"],
            registry=self._registry,
        )
        self._rejected = Counter(
            _PREFIX + "requests_rejected",
            "Requests that the engine did not take, by HTTP status",
            ["status"],
            registry=self._registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival on", _TTFT_S)
        self._tpot = self._histogram("time_per_output_token_seconds", "After the first", _TPOT_S)
        self._whole = self._histogram("request_seconds", "From arrival to the end", _WHOLE_S)
        self._prompt = self._histogram("request_prompt_tokens", "Length of prompts", _TOKENS)
        self._answer = self._histogram("request_generated_tokens", "Length of answers", _TOKENS)

    def first_token(self, seconds: float) -> None:
        """A request's first token came this long after it was submitted."""
        self._ttft.observe(seconds)

    def finished(
        self,
        *,
        reason: FinishReason,
        num_prompt_tokens: int,
        num_generated_tokens: int,
        first_token_s: float,
        whole_s: float,
    ) -> None:
        """A request ended; both times count from when it was submitted."""
        self._finished.labels(reason).inc()
        self._prompt.observe(num_prompt_tokens)
        self._answer.observe(num_generated_tokens)
        self._whole.observe(whole_s)
        if num_generated_tokens > 1:
            self._tpot.observe((whole_s - first_token_s) / (num_generated_tokens - 1))

    def rejected(self, status: int) -> None:
        """The engine did not take a request."""
        self._rejected.labels(str(status)).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, in the format that a client's `Accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, buckets=buckets, registry=self._registry)
