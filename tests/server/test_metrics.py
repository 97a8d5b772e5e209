"""The exposition, parsed by a Prometheus parser and compared with the names that others rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_server import eventually, running
from prometheus_client.parser import text_string_to_metric_families

from octavo.metrics import EngineView, Metrics
from octavo.wire import Blocks, Load, Progress, Ready

LABELS = {"model_name": "tiny", "engine": "0"}
LOAD = Load(
    blocks=Blocks(64, 16, 2, 8, 40), block_size=16, kv_utilization=0.25,
    demand_blocks={"now": 20, "60s": 30}, seconds_to_exhaustion=None, running=3, waiting=2,
    waiting_blocks=4, prefill_backlog_s=0.1, step_budget_used=0.5, preemptions=6, steps=9,
    prompt_tokens=7, generation_tokens=8, prefix_cache_queries=90, prefix_cache_hits=60,
    last_activity=5.5, swapped_out=12, swapped_in=11, host_blocks_used=1, host_blocks=4,
)  # fmt: skip
READY = Ready(512, 100, 16, 64, 4, "cpu", "float32", 1024)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(exposition: bytes) -> Samples:
    """Every sample by name and labels; a family without help or type is a defect."""
    found: Samples = {}
    for family in text_string_to_metric_families(exposition.decode()):
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted({**LABELS, **labels}.items()))]


def exposed(view: EngineView) -> Samples:
    metrics = Metrics("tiny", {"gpu_memory_utilization": "0.9"}, lambda: view)
    metrics.on_first_token(7, 0.03)
    metrics.on_tokens(1)
    metrics.on_gap(0.003)
    metrics.on_tokens(1)
    metrics.on_finished("length", 7, 2, 0.4)
    metrics.on_finished("abort", 7, 0, None)
    return samples(metrics.expose())


@pytest.fixture(scope="module")
def full() -> Samples:
    return exposed(EngineView(LOAD, READY, Progress("warmup", 1.0), draining=True))


def test_the_names_of_vllm(full: Samples) -> None:
    assert value(full, "vllm:num_requests_running") == 3
    assert value(full, "vllm:num_requests_waiting") == 2
    assert value(full, "vllm:kv_cache_usage_perc") == 0.25
    assert value(full, "vllm:cpu_cache_usage_perc") == 0.25
    assert value(full, "vllm:num_preemptions_total") == 6
    assert value(full, "vllm:prefix_cache_queries_total") == 90
    assert value(full, "vllm:prefix_cache_hits_total") == 60
    assert value(full, "vllm:prompt_tokens_total") == 7
    assert value(full, "vllm:generation_tokens_total") == 2
    assert value(full, "vllm:request_success_total", finished_reason="length") == 1
    assert value(full, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(full, "vllm:request_success_total", finished_reason="stop") == 0
    config = {"block_size": "16", "num_gpu_blocks": "64", "cache_dtype": "float32"}
    config["gpu_memory_utilization"] = "0.9"
    assert value(full, "vllm:cache_config_info", **config) == 1
    for name in (
        "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    ):  # fmt: skip
        assert value(full, f"{name}_count") == 1, name
    assert value(full, "vllm:time_to_first_token_seconds_sum") == 0.03


def test_small_gaps_can_be_told_apart(full: Samples) -> None:
    name = "vllm:inter_token_latency_seconds_bucket"
    assert value(full, name, le="0.002") == 0
    assert value(full, name, le="0.005") == value(full, name, le="80.0") == 1


def test_our_own_names(full: Samples) -> None:
    for state, count in (("active", 16), ("shared", 2), ("cached", 8), ("free", 40)):
        assert value(full, "octavo_kv_blocks", state=state) == count
    assert value(full, "octavo_kv_block_bytes") == 1024
    assert value(full, "octavo_kv_demand_blocks", horizon="60s") == 30
    assert value(full, "octavo_waiting_blocks") == 4
    assert value(full, "octavo_swapped_out_blocks_total") == 12
    assert value(full, "octavo_swapped_in_blocks_total") == 11
    assert value(full, "octavo_step_budget_utilization") == 0.5
    assert value(full, "octavo_preemptions_total") == 6
    assert value(full, "octavo_load_progress_ratio", phase="warmup") == 1
    assert value(full, "octavo_draining") == 1
    assert value(full, "octavo_last_activity_timestamp_seconds") == 5.5
    assert ("octavo_build_info", (("version", "0.1.0"),)) in full


def test_before_the_engine_is_ready_the_counts_are_zero() -> None:
    found = exposed(EngineView(None, None, Progress("import", 0.0), draining=False))
    assert value(found, "vllm:num_requests_running") == 0
    assert value(found, "vllm:kv_cache_usage_perc") == 0
    assert not [name for name, _ in found if name.startswith("octavo_kv")]


def test_a_server_counts_what_it_did(tmp_path: Path) -> None:
    with running(tmp_path) as server:

        def scrape() -> Samples:
            answer = server.http.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            return samples(answer.content)

        usage = server.http.post("/v1/completions", json={"prompt": "a b", "max_tokens": 9}).json()
        server.http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 3})
        stop = {"prompt": [300, 301, 302], "stop_token_ids": [302]}
        server.http.post("/v1/completions", json=stop)
        assert server.http.post("/v1/completions", json={"prompt": "a", "n": 0}).status_code == 400
        found = scrape()
        prompt = usage["usage"]["prompt_tokens"] + 2 * 2 + 3
        assert value(found, "vllm:prompt_tokens_total") == prompt
        assert value(found, "vllm:generation_tokens_total") == 9 + 2 * 3 + 3
        assert value(found, "vllm:request_success_total", finished_reason="length") == 3
        assert value(found, "vllm:request_success_total", finished_reason="stop") == 1
        assert value(found, "vllm:inter_token_latency_seconds_count") == 8 + 2 * 2 + 2
        assert value(found, "vllm:request_generation_tokens_sum") == 18
        assert value(found, "octavo_load_progress_ratio", phase="weights") == 1
        eventually(lambda: value(scrape(), "vllm:num_preemptions_total") == 3, what="a load")
        # Nothing that a client sends becomes a label.
        before = len(found)
        for name in ("x", "y"):
            server.http.post("/v1/completions", json={"prompt": "a", "model": name})
            server.http.get(f"/{name}")
        assert len(scrape()) == before
