"""Every metric of the server, named and described once; vLLM's names for what vLLM has."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from octavo import __version__
from octavo.wire import Load, Progress, Ready

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
FINISHED_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("max_num_queued_reqs", "not_serving")

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
# vLLM's bounds start at 10 ms, where small models on fast devices cannot be told apart.
GAP_BUCKETS = (
    0.001, 0.002, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
    2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKEN_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class EngineView:
    """What the metrics read at scrape time: the last messages of the engine."""

    load: Load | None
    ready: Ready | None
    progress: Progress
    draining: bool


class Metrics:
    """The registry and the few calls that feed it; `view` is asked at each scrape."""

    def __init__(
        self, model_name: str, cache_config: dict[str, str], view: Callable[[], EngineView]
    ) -> None:
        self._registry = CollectorRegistry()
        labels = (model_name, "0")
        self._registry.register(_EngineCollector(labels, cache_config, view))
        self._tokens = _TokenCollector(labels)
        self._registry.register(self._tokens)
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=self._registry)

        def counter(name: str, help_text: str) -> Counter:
            return Counter(name, help_text, LABELS, registry=self._registry).labels(*labels)

        def histogram(name: str, help_text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(
                name, help_text, LABELS, registry=self._registry, buckets=tuple(buckets)
            ).labels(*labels)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._ttft = histogram(
            "vllm:time_to_first_token_seconds", "From admission to the first token.", TTFT_BUCKETS
        )
        self._latency = histogram(
            "vllm:e2e_request_latency_seconds", "From admission to the end.", LATENCY_BUCKETS
        )
        self._prompt_size = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a finished request.", TOKEN_BUCKETS
        )
        self._output_size = histogram(
            "vllm:request_generation_tokens", "Tokens that a request generated.", TOKEN_BUCKETS
        )
        finished = Counter(
            "vllm:request_success",
            "Requests ended, by how.",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._finished = {r: finished.labels(*labels, r) for r in FINISHED_REASONS}
        rejected = Counter(
            "vllm:admission_rejections",
            "Requests refused before they reached the engine, by why.",
            ("model_name", "reason"),
            registry=self._registry,
        )
        self._rejected = {r: rejected.labels(model_name, r) for r in REJECTIONS}

    def expose(self) -> bytes:
        """The exposition for one scrape."""
        return generate_latest(self._registry)

    def on_first_token(self, prompt_tokens: int, seconds: float) -> None:
        """A sequence's prompt is done."""
        self._prompt_tokens.inc(prompt_tokens)
        self._ttft.observe(seconds)

    def on_gap(self, seconds: float) -> None:
        """A further token of a sequence came after `seconds`."""
        self._tokens.gaps[bisect_left(GAP_BUCKETS, seconds)] += 1
        self._tokens.gap_seconds += seconds

    def on_tokens(self, count: int) -> None:
        """Tokens were generated."""
        self._tokens.count += count

    def on_finished(
        self, reason: str, prompt_tokens: int, generated: int, seconds: float | None
    ) -> None:
        """A sequence ended; `seconds` is None when it did not end by itself."""
        self._finished[reason].inc()
        if seconds is None:
            return
        self._latency.observe(seconds)
        self._prompt_size.observe(prompt_tokens)
        self._output_size.observe(generated)

    def on_rejected(self, reason: str) -> None:
        """A request was refused at the door."""
        self._rejected[reason].inc()


class _TokenCollector(Collector):
    """What is counted for every token: plain numbers, because the event loop alone adds to them
    and the client library's locks would cost more than all else that is done for a token.
    """

    def __init__(self, labels: tuple[str, str]) -> None:
        self._labels = labels
        self.count = 0
        self.gaps = [0] * (len(GAP_BUCKETS) + 1)  # by the smallest bound that holds it
        self.gap_seconds = 0.0

    def collect(self) -> Iterator[Metric]:
        """Both families; the buckets add up, as Prometheus wants them."""
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=LABELS)
        tokens.add_metric(self._labels, self.count)
        yield tokens
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", labels=LABELS
        )
        bounds = [*(str(float(bound)) for bound in GAP_BUCKETS), "+Inf"]
        up_to = zip(bounds, accumulate(self.gaps), strict=True)
        gaps.add_metric(self._labels, list(up_to), self.gap_seconds)
        yield gaps


class _EngineCollector(Collector):
    """Metrics that are the engine's own numbers, read from its last messages."""

    def __init__(
        self, labels: tuple[str, str], cache_config: dict[str, str], view: Callable[[], EngineView]
    ) -> None:
        self._labels = labels
        self._cache_config = cache_config
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """All families; before the first load report the counts are zero."""
        view = self._view()
        yield from self._vllm(view)
        yield from self._octavo(view)

    def _vllm(self, view: EngineView) -> Iterator[Metric]:
        load = view.load
        yield self._gauge(
            "vllm:num_requests_running", "Sequences running.", load.running if load else 0
        )
        yield self._gauge(
            "vllm:num_requests_waiting", "Sequences waiting.", load.waiting if load else 0
        )
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of KV blocks in use, 0..1.",
            load.kv_utilization if load else 0,
        )
        yield self._gauge(
            "vllm:cpu_cache_usage_perc",
            "Share of the swap space in use, 0..1.",
            load.host_blocks_used / load.host_blocks if load and load.host_blocks else 0,
        )
        yield self._counter(
            "vllm:num_preemptions", "Sequences preempted.", load.preemptions if load else 0
        )
        yield self._counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked for in the prefix cache.",
            load.prefix_cache_queries if load else 0,
        )
        yield self._counter(
            "vllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            load.prefix_cache_hits if load else 0,
        )
        if view.ready is not None:
            values = self._cache_config | {
                "block_size": str(view.ready.block_size),
                "num_gpu_blocks": str(view.ready.num_kv_blocks),
                "cache_dtype": view.ready.dtype,
            }
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "The KV cache's configuration.", labels=[*LABELS, *values]
            )
            info.add_metric([*self._labels, *values.values()], 1)
            yield info

    def _octavo(self, view: EngineView) -> Iterator[Metric]:
        load = view.load
        if load is not None:
            blocks = load.blocks
            yield self._by(
                "octavo_kv_blocks",
                "KV blocks by state; active includes shared.",
                "state",
                {
                    "active": blocks.active,
                    "shared": blocks.shared,
                    "cached": blocks.cached,
                    "free": blocks.free,
                },
            )
            if view.ready is not None:
                yield self._gauge(
                    "octavo_kv_block_bytes",
                    "Bytes of a KV block: a block's tokens in one group of layers.",
                    view.ready.kv_bytes_per_block,
                )
            yield self._by(
                "octavo_kv_demand_blocks",
                "KV blocks that running and waiting work needs, by how soon.",
                "horizon",
                load.demand_blocks,
            )
            yield self._gauge(
                "octavo_waiting_blocks", "KV blocks that waiting work needs.", load.waiting_blocks
            )
            yield self._gauge(
                "octavo_step_budget_utilization",
                "Share of a step's token budget in use, 0..1.",
                load.step_budget_used,
            )
            yield self._counter(
                "octavo_swapped_out_blocks", "KV blocks copied to host memory.", load.swapped_out
            )
            yield self._counter(
                "octavo_swapped_in_blocks", "KV blocks copied back.", load.swapped_in
            )
            yield self._counter("octavo_preemptions", "Sequences preempted.", load.preemptions)
            yield self._gauge(
                "octavo_last_activity_timestamp_seconds",
                "Unix time of the engine's last work.",
                load.last_activity,
            )
        yield self._by(
            "octavo_load_progress_ratio",
            "How far the start has come, 0..1, by phase.",
            "phase",
            {view.progress.phase: view.progress.ratio},
        )
        yield self._gauge("octavo_draining", "1 after SIGTERM.", int(view.draining))
        build = GaugeMetricFamily("octavo_build_info", "The version.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _by(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*LABELS, label])
        for key, value in values.items():
            family.add_metric([*self._labels, key], value)
        return family
