"""A sitting's machinery: time boxes, servers under one client, checkpoints, tables."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import peer_transformers
import pytest
import sitting_parts
import sitting_serve
import torch
import transformers
from sitting import Model, PartError, Serving, Sitting, json_lines
from sitting_parts import Part, Rows, measured, run_part
from sitting_serve import (
    Server,
    cold_start,
    free_port,
    poisson_count,
    poisson_rate,
    under_load,
)
from sitting_table import CLAIMS, ratio, table, tables
from sitting_weights import shards, write_weights

from octavo.checkpoint import read_checkpoint
from octavo.engine.process import PREPARED
from octavo.engine.runner import Runner

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from api_server import eventually

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "e2e/tinymodel/model"
FAKE = ROOT / "tests/support/serve_with_fake_engine.py"


@pytest.fixture
def sitting(tmp_path: Path) -> Sitting:
    stamp = {"sitting": "s", "device": None, "commit": "c"}
    limit = time.perf_counter() + 60
    serving = Serving(settle_s=0.1)
    rows = tmp_path / "rows"
    return Sitting(rows, stamp, tmp_path, requests=5, deadline=limit, serving=serving)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Processes in time boxes.


def test_lines_of_a_child_come_as_they_are_printed() -> None:
    code = "import time; print('{\"a\": 1}', flush=True); print('talk'); time.sleep(60)"
    lines = json_lines(python(code), os.environ, 5)
    begin = time.perf_counter()
    assert next(lines) == {"a": 1}
    assert time.perf_counter() - begin < 4
    lines.close()  # type: ignore[attr-defined]


def test_a_child_that_fails_says_its_last_words() -> None:
    with pytest.raises(PartError, match="exit code 3: no GPU here"):
        list(json_lines(python("print('no GPU here'); raise SystemExit(3)"), os.environ, 20))


def test_a_child_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "print('{}', flush=True)\ntime.sleep(60)"
    )
    begin = time.perf_counter()
    with pytest.raises(PartError, match="killed after its 2 s"):
        list(json_lines(python(code), os.environ, 2))
    assert time.perf_counter() - begin < 10
    assert eventually(lambda: not alive(int(pid.read_text())))


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that whoever inherited it has not seen yet."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_part_that_fails_keeps_its_rows_and_the_rest_goes_on(sitting: Sitting) -> None:
    def broken(_: Sitting) -> Rows:
        yield {"metric": "m", "value": 1}
        raise ValueError("lost the device")

    now = time.perf_counter()
    run_part(sitting, "a", Part(10, 1, broken), now + 100)
    run_part(sitting, "b", Part(10, 200, broken), now + 100)
    rows = [json.loads(line) for line in sitting.out.read_text().splitlines()]
    assert [(row["part"], row["metric"]) for row in rows] == [
        ("a", "m"), ("a", "failed"), ("a", "part"), ("b", "skipped"),
    ]  # fmt: skip
    assert "lost the device" in rows[1]["why"]
    assert "needs 200" in rows[3]["why"]
    assert all(row["sitting"] == "s" for row in rows)


def test_what_was_skipped_or_failed_is_yet_to_be_measured(sitting: Sitting) -> None:
    def good(_: Sitting) -> Rows:
        yield {"metric": "m", "value": 1}

    def bad(_: Sitting) -> Rows:
        raise PartError("no room")
        yield {}

    end = time.perf_counter() + 100
    for name, run in (("a", good), ("b", bad)):
        run_part(sitting, name, Part(10, 1, run), end)
    for name in ("c", "d"):
        run_part(sitting, name, Part(10, 200, good), end)
    assert measured(sitting.rows) == {"a"}
    assert "**skipped** c" in table(sitting.rows)
    run_part(sitting, "c", Part(10, 1, good), end)
    run_part(sitting, "b", Part(10, 1, good), end)
    assert measured(sitting.rows) == {"a", "b", "c"}
    run_part(sitting, "b", Part(10, 1, bad), end)
    assert measured(sitting.rows) == {"a", "c"}
    assert "**skipped** c" not in table(sitting.rows)
    assert "**skipped** d" in table(sitting.rows)


def test_a_part_has_what_is_left_of_the_budget(sitting: Sitting) -> None:
    left = []

    def look(running: Sitting) -> Rows:
        left.append(running.left)
        yield from ()

    run_part(sitting, "a", Part(1000, 1, look), time.perf_counter() + 50)
    run_part(sitting, "a", Part(20, 1, look), time.perf_counter() + 50)
    assert left == [pytest.approx(50, abs=1), pytest.approx(20, abs=1)]


def test_what_is_for_both_engines_comes_before_what_is_ours_alone() -> None:
    names = list(sitting_parts.parts())
    alone = min(names.index(name) for name in names if name.startswith(("cold", "sharing", "idle")))
    assert set(names[:alone]) == {"weights"} | {
        f"{what}-{who}"
        for what, who in (
            *itertools.product(("octavo", "vllm"), ("8b", "0.6b")),
            *itertools.product(("serve",), ("octavo", "vllm")),
        )
    }
    assert names.index("serve-vllm") < names.index("serve-octavo")  # whose rate is the other's


def test_parts_run_in_the_order_in_which_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks/gpu.py"))
    words = ["--out", "x", "--part", "idle", "octavo-8b", "--no-cost", "--sharing", "--kind beam"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    assert list(script["chosen"](script["parse"]())) == ["idle", "octavo-8b"]


def test_the_readme_names_all_parts() -> None:
    readme = (ROOT / "benchmarks/README.md").read_text()
    assert all(f"`{name}`" in readme for name in sitting_parts.parts())


# Servers.


@pytest.fixture
def fake_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and one in the peer's place that is twice as slow."""

    def command(step_ms: str) -> Any:
        def words(model: Model, port: int) -> list[str]:
            serve = sitting_serve.octavo_command(model, port)
            at = serve.index("serve") + 1
            engine = ["--step-ms", step_ms, "--context", "2048", "--max-num-seqs", "512"]
            return [sys.executable, str(FAKE), *engine, "--", *serve[at:]]

        return words

    monkeypatch.setattr(sitting_serve, "COMMANDS", {"octavo": command("0.5"), "vllm": command("2")})
    monkeypatch.setattr(sitting_serve, "WARM_UP_REQUESTS", 2)


def test_two_servers_get_the_same_load_at_the_peers_rate(
    sitting: Sitting, fake_servers: None
) -> None:
    model = Model.of(str(MODEL), sitting.scratch)
    for engine in ("vllm", "octavo"):
        for row in under_load(sitting, engine, model, 0):
            sitting.append({"shape": "llama-8b"} | row)
    first = [row for row in sitting.rows if row["metric"] == "first_token_s"]
    assert all(0 < row["value"] < 30 for row in first)
    (prepared,) = (row for row in sitting.rows if row["metric"] == "prepared_s")
    assert (prepared["engine"], prepared["value"]) == ("octavo", None)  # a fake has no graphs
    peer, ours = ([r for r in sitting.rows if r["engine"] == e] for e in ("vllm", "octavo"))
    capacity = next(r for r in peer if r["load"] == "capacity" and r["metric"] == "req_s")
    for rows in (peer, ours):
        loaded = [row for row in rows if row["load"] == "poisson"]
        assert {row["rate"] for row in loaded} == {round(0.7 * capacity["value"], 3)}
        assert {row["rate_from"] for row in loaded} == {"vllm"}
        assert all(row["completed"] == row["requests"] == 5 for row in loaded)
        assert {"tpot_p99_ms", "ttft_p50_ms", "gap_p90_ms"} <= {row["metric"] for row in loaded}
    assert len({row["digest"] for row in sitting.rows if row["load"] == "poisson"}) == 1
    assert "| goal |" in table(sitting.rows)  # half the peer's time per token


def test_a_server_is_waited_for_until_its_log_says_that_it_is_prepared(tmp_path: Path) -> None:
    code = f"import time; time.sleep(0.3); print({PREPARED!r}, flush=True); time.sleep(60)"
    with Server(python(code), free_port(), dict(os.environ), tmp_path / "log") as server:
        begin = time.perf_counter()
        assert server.says(sitting_serve.PREPARED["octavo"], 20)
        assert time.perf_counter() - begin < 10


def test_a_cold_start_is_timed_by_phase(sitting: Sitting, fake_servers: None) -> None:
    model = Model.of(str(MODEL), sitting.scratch)
    (row,) = cold_start(sitting, "octavo", model, 3)
    assert (row["load"], row["rep"], row["limit"]) == ("cold-start", 3, None)
    assert isinstance(row["detail"]["phases"], dict)


def test_a_server_that_ends_early_or_never_answers_is_no_measurement(tmp_path: Path) -> None:
    env = dict(os.environ)
    with Server(python("raise SystemExit('no room')"), free_port(), env, tmp_path / "a") as server:
        with pytest.raises(PartError, match=r"exit code 1: (.|\n)*no room"):
            server.first_token(20)
    with Server(python("import time; time.sleep(60)"), free_port(), env, tmp_path / "b") as server:
        with pytest.raises(PartError, match="no token within 1 s"):
            server.first_token(1)
        assert not server.says("prepared", 0.1)
        with pytest.raises(PartError, match="4 s are left, too few"):
            server.target(4.0)


def test_the_rate_is_the_peers_and_else_our_own() -> None:
    ours = {"engine": "octavo", "load": "capacity", "metric": "req_s", "value": 40.0}
    peer = ours | {"engine": "vllm", "value": 30.0}
    again = peer | {"value": 99.0}
    assert poisson_rate([ours, peer, again]) == (21.0, "vllm")
    assert poisson_rate([ours]) == (28.0, "octavo")
    with pytest.raises(PartError, match="no rate to send at"):
        poisson_rate([])


def test_ours_waits_for_the_rate_that_a_peer_sets(sitting: Sitting) -> None:
    """At a rate of its own it would have to be measured again."""
    sitting.site = "/peers"
    model = Model("m", sitting.scratch, {})
    with pytest.raises(PartError, match="which sets the rate for both"):
        next(under_load(sitting, "octavo", model, 0))


# Checkpoints.


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"tie_word_embeddings": False}), ("qwen3", {"tie_word_embeddings": True})],
)
def test_a_checkpoint_is_what_transformers_and_we_would_load(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]],
        "model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "eos_token_id": 1, **changes,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    total = write_weights(config, tmp_path, "cpu", shard_bytes=40_000)
    entries = read_checkpoint(tmp_path)
    assert len({entry.file for entry in entries.values()}) == len(shards(config, 40_000)) > 3
    assert total == sum(entry.num_bytes for entry in entries.values())
    with torch.device("meta"):
        oracle = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    wanted = {name: tuple(value.shape) for name, value in oracle.named_parameters()}
    assert {name: entry.shape for name, entry in entries.items()} == wanted
    Runner(str(tmp_path), device="cpu", max_model_len=64)


# transformers' static batches.


def test_a_batch_that_was_cut_off_is_carried_on_along_a_straight_line() -> None:
    steps = [0.1 + 0.001 * i for i in range(200)]  # a step's time grows with the length
    ends = [2.0 + sum(steps[: i + 1]) for i in range(200)]
    assert peer_transformers.whole_batch_s(ends, steps[-1], 200) == ends[-1]
    found = peer_transformers.whole_batch_s(ends[:40], steps[-1], 200)
    assert found == pytest.approx(ends[-1], rel=0.05)
    assert peer_transformers.whole_batch_s(ends[:1], 0.5, 11) == pytest.approx(ends[0] + 5)


# Tables.


def row(engine: str, value: float, **changes: Any) -> dict[str, Any]:
    made = {
        "sitting": "s", "engine": engine, "shape": "llama-8b", "load": "sharegpt", "digest": "d",
        "metric": "out_tok_s", "value": value, "limit": 200.0,
    }  # fmt: skip
    return made | changes


def test_a_ratio_comes_with_the_least_and_the_most_of_two_repetitions() -> None:
    assert ratio([110, 120, 130], [100, 80]) == pytest.approx((120 / 90, 1.1, 130 / 80))


def test_verdicts_follow_the_medians() -> None:
    rows = [row("octavo", 120), row("octavo", 122), row("vllm", 100)]
    rows += [row("octavo", 13.0, load="cold-start", metric="first_token_s", limit=None)]
    text = table(rows)
    assert "| 1.21 (1.20–1.22) | ≥ 1 | ≥ 1.3 | bar |" in text
    assert "| ≤ 12 | ≤ 6 | **missed** |" in text
    assert "| octavo | 121.0 (120.0–122.0; 2) | 200 | 60% |" in text
    lower = next(claim for claim in CLAIMS if claim.metric == "tpot_p99_ms")
    assert lower.met(0.8, lower.goal)
    assert not lower.met(1.1, lower.bar)


def test_figures_of_different_requests_or_rates_are_not_compared() -> None:
    other = [row("octavo", 120), row("vllm", 100, digest="e")]
    assert "not comparable" in table(other)
    rates = {"load": "poisson", "metric": "tpot_p99_ms"}
    served = [row("octavo", 9, rate=20.0, **rates), row("vllm", 10, rate=21.0, **rates)]
    assert "not comparable" in table(served)


def test_the_best_static_batch_is_the_one_to_beat() -> None:
    static = [
        row("transformers", 50.0, batch=64, steps=1024, measured_s=11.0, digest="f"),
        row("transformers", 80.0, batch=128, steps=1024, measured_s=12.0, digest="g"),
        {"engine": "transformers", "load": "sharegpt", "batch": 256, "metric": "out_tok_s",
         "why": "out of memory: 2 GiB", "shape": "llama-8b", "value": None},
    ]  # fmt: skip
    text = table([row("octavo", 4000.0), *static])
    assert "| 50.00 (50.00–50.00) |" in text
    assert "| 256 | out of memory: 2 GiB |" in text


def test_tables_keep_sittings_apart() -> None:
    text = tables([row("octavo", 1.0), row("vllm", 2.0, sitting="t")])
    assert text.count("## ") == 2
    assert "not comparable" not in text


def test_the_second_server_gets_as_many_requests_as_the_first() -> None:
    earlier = [{"load": "capacity", "requests": 700}, {"load": "poisson", "requests": 662}]
    assert poisson_count(earlier[:1], 1146) == 1146
    assert poisson_count(earlier, 1146) == 662
    with pytest.raises(PartError, match="time for 500 requests; the other server got 662"):
        poisson_count(earlier, 500)


def of_script(metric: str, **detail: Any) -> dict[str, Any]:
    named = {key: detail[key] for key in ("shape", "engine", "load") if key in detail}
    return {"sitting": "s", "metric": metric, "value": None, "detail": detail} | named


def test_what_is_beside_the_headlines_has_tables_of_its_own() -> None:
    beams = {"shape": "llama-8b", "load": "sharegpt", "kind": "beam", "width": 6, "blocks": 981}
    fit = {"a_ms": 6.4, "b_us": 11.4, "c_ns": 45.7, "e_us": 20.6, "points": 12}
    fit |= {"median_error": 0.0138, "worst_error": 0.098}
    fit |= {"shape": "llama-8b", "method": "generate"}
    phases = {"import": 3.9, "weights": 2.35}
    served = {"digest": "d", "rate": 25.5, "load": "poisson", "metric": "tpot_p99_ms"}
    text = table(
        [
            of_script("sharing", **beams, sharing=True, tok_s=1920.9),
            of_script("sharing", **beams, sharing=False, tok_s=535.4),
            of_script("sharing_ratio", **beams, blocks_saved=0.7523, ratio=3.588, most=4.04),
            *(of_script("sharing", **beams | {"shape": "x"}, sharing=s, tok_s=1.0) for s in (0, 1)),
            of_script("idle", shape="llama-8b", load="sharegpt", after=150, running=512, idle=0.05,
                      bar=0.03, step_ms=12.5, profiled_step_ms=12.9, host_ms={"plan": 0.24}),
            *(of_script("cost_model", **fit, engine=e) for e in ("octavo", "vllm")),
            row("octavo", 5.9, load="cold-start", metric="first_token_s", part="cold-octavo",
                detail={"phases": phases}),
            row("octavo", 7.5, **served), row("vllm", 10.0, **served),
        ]
    )  # fmt: skip
    assert "| llama-8b | sharegpt | beam | 6 | 75.2% | 1,921 | 535 | 3.59 | 4.04 | goal |" in text
    assert (
        "| llama-8b | sharegpt | 150 | 512 | 12.5 | 12.9 | 5.0% | **missed** | plan 0.24 |" in text
    )
    assert "| llama-8b | vllm | generate | 6.4 | 11.4 | 45.7 | 20.6 | 1.4% | 9.8% | 12 |" in text
    assert "| cold-octavo | octavo | 5.90 | import 3.9, weights 2.35 |" in text
    assert "| Poisson, time per output token, p99, ms | 7.50 | 10.00 | 0.75 |" in text
    assert "Poisson arrivals a second: 25.5" in text
