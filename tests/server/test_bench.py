"""`octavo bench`: the workloads are the public ones, the limit adds up, the load is open-loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from octavo.bench.limits import Ceilings, least_seconds
from octavo.bench.load import Target, arrivals, run_load
from octavo.bench.passes import WARM_UP_TOKENS, passes
from octavo.bench.summary import Timeline, percentile, summarize
from octavo.bench.workloads import SHAPES, Request, digest, draw, write_shape, write_tokenizer
from octavo.cli import main
from octavo.errors import ConfigError, ExitCode
from octavo.text.loader import load_text_side

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "e2e/tinymodel/model"
H200 = Ceilings(4.286e12, 797e12)


@pytest.mark.parametrize(
    ("shape", "name", "count", "expected"),
    [
        ("llama-8b", "sharegpt", 1000, "5e1ceb5a5cbb870c7f9c8e339401727f"),
        ("llama-8b", "prefill", 64, "da9594e2c79aa05ab8c645de884fadec"),
        ("llama-8b", "single", 1, "8b21cbdfc1a9568b5caa093f8ab503d0"),
        ("qwen3-0.6b", "uniform", 256, "d23158c0c2d07959ec0248fabe06b91a"),
        ("qwen3-0.6b", "single", 1, "84cefb62d30b429a3f64c37f69425841"),
    ],
)
def test_requests_are_those_that_published_figures_were_taken_with(
    shape: str, name: str, count: int, expected: str
) -> None:
    requests = draw(name, SHAPES[shape]["vocab_size"])
    assert len(requests) == count
    assert digest(requests) == expected


@pytest.mark.parametrize(
    ("shape", "name", "output_per_s"),
    [
        ("llama-8b", "sharegpt", 22_843),
        ("llama-8b", "single", 281),
        ("qwen3-0.6b", "uniform", 36_244),
        ("qwen3-0.6b", "single", 3_353),
    ],
)
def test_limit_is_the_published_one(shape: str, name: str, output_per_s: float) -> None:
    requests = draw(name, SHAPES[shape]["vocab_size"])
    seconds = least_seconds(SHAPES[shape], requests, H200)
    assert sum(r.output for r in requests) / seconds == pytest.approx(output_per_s, rel=1e-3)


def test_a_prefix_of_a_workload_is_the_first_requests_of_it() -> None:
    assert draw("sharegpt", 5000, 3) == draw("sharegpt", 5000, 10)[:3]


def test_a_vocabulary_without_reserve_is_used_whole() -> None:
    ids = {i for request in draw("uniform", 300, 20) for i in request.prompt}
    assert min(ids) >= 10
    assert max(ids) == 299


def test_arrivals_are_a_seeded_poisson_process() -> None:
    due = arrivals(4000, 50.0, seed=3)
    assert due == arrivals(4000, 50.0, seed=3)
    assert due == sorted(due)
    assert 4000 / due[-1] == pytest.approx(50, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.1)  # exponential: deviation = mean
    assert arrivals(3, float("inf"), 0) == [0.0, 0.0, 0.0]


def test_percentiles_are_values_that_occurred() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (0, 20, 50, 90, 99, 100)] == [1, 1, 3, 5, 5, 5]


def test_a_request_that_waited_for_the_client_counts_from_when_it_was_due() -> None:
    late = Timeline(due=1.0, output=3, events=[3.0, 3.5, 4.0])
    broken = Timeline(due=1.0, output=3, error="503")
    row = summarize([late, broken], seconds=4.0)
    assert row["ttft_ms"]["p50"] == 2000
    assert row["tpot_ms"]["p50"] == 500
    assert row["gap_ms"]["max"] == 500
    assert (row["completed"], row["failed"], row["first_errors"]) == (1, 1, ["503"])
    assert row["out_tok_s"] == 0.8


class Endpoint:
    """Streams as many events as tokens were asked for; holds each back for `pause` seconds."""

    def __init__(self) -> None:
        self.pause, self.refuse, self.cut, self.missing = 0.0, False, False, 0
        self.most, self.open = 0, 0
        self.bodies: list[dict[str, object]] = []

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.refuse:
            return web.json_response({"error": {"message": "full"}}, status=429)
        self.open += 1
        self.most = max(self.most, self.open)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(self.pause)
            await response.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        usage = {"completion_tokens": body["max_tokens"] - self.missing}
        event = json.dumps({"choices": [], "usage": usage})
        await response.write(f"data: {event}\n\n".encode())
        if not self.cut:
            await response.write(b"data: [DONE]\n\n")
        self.open -= 1
        return response


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, str]]:
    """A server in a thread of its own: the load runs its own event loop."""
    served, started, found = Endpoint(), threading.Event(), {}

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", served.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found["url"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        found["loop"], found["stop"] = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await found["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(10)
    yield served, found["url"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join(10)


def test_requests_leave_when_due_whether_or_not_others_were_answered(
    endpoint: tuple[Endpoint, str],
) -> None:
    served, url = endpoint
    served.pause = 0.05
    requests = [Request([11, 12], 6)] * 20
    row = run_load(Target(url, "m"), requests, rate=200.0)
    assert row["completed"] == 20
    assert served.most > 10  # a closed loop would have had one open
    assert row["tpot_ms"]["p50"] >= 45
    assert served.bodies[0]["prompt"] == [11, 12]
    assert served.bodies[0]["ignore_eos"] is True


def test_refusals_and_cut_streams_are_failures(endpoint: tuple[Endpoint, str]) -> None:
    served, url = endpoint
    served.refuse = True
    assert run_load(Target(url, "m"), [Request([1], 2)], float("inf"))["first_errors"][0][:3] == (
        "429"
    )
    served.refuse, served.cut = False, True
    row = run_load(Target(url, "m"), [Request([1], 2)], float("inf"))
    assert (row["completed"], row["failed"]) == (0, 1)


def test_an_answer_of_another_length_is_a_failure(endpoint: tuple[Endpoint, str]) -> None:
    served, url = endpoint
    served.missing = 2
    row = run_load(Target(url, "m"), [Request([1], 5)], float("inf"))
    assert row["first_errors"] == ["3 tokens came of 5 that were asked for"]
    assert row["completed"] == 0


def test_the_event_with_the_count_is_no_output(endpoint: tuple[Endpoint, str]) -> None:
    served, url = endpoint
    served.pause = 0.02
    row = run_load(Target(url, "m"), [Request([1], 3)], float("inf"))
    assert row["gap_ms"]["max"] > 10
    assert row["gap_ms"]["mean"] > 10  # two gaps, not a third of nothing
    assert 0 <= row["client_cpu"] < 5


def test_the_command_loads_an_endpoint(
    endpoint: tuple[Endpoint, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = endpoint
    words = ["bench", "serve", url, "--model", "m", "--vocab-size", "2000", "--requests", "3"]
    words += ["--workload", "alpaca"]
    assert main([*words, "--json", str(tmp_path / "rows")]) == ExitCode.OK
    row = json.loads(capsys.readouterr().out)
    assert row["completed"] == 3
    assert row == json.loads((tmp_path / "rows").read_text())
    assert main([*words, "--rate", "0"]) == ExitCode.CONFIG
    assert "--rate must be above 0" in capsys.readouterr().err


def test_the_command_runs_a_model_offline(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "offline", str(MODEL), "--workload", "alpaca", "--requests", "4"]
    words += ["--repeat", "1", "--num-kv-blocks", "400", "--device", "cpu"]
    assert main(words) == ExitCode.OK
    start, warm_up, offline = map(json.loads, capsys.readouterr().out.splitlines())
    assert (start["metric"], warm_up["metric"]) == ("start", "warm_up")
    assert offline["requests"] == 4
    assert offline["out_tok_s"] > 0
    assert 0 < offline["step_ms"]["p50"] <= offline["step_ms"]["max"] < 1e3 * offline["s"]
    assert main([*words, "--repeat", "0"]) == ExitCode.CONFIG
    assert main([*words, "--seconds", "-1"]) == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("each", "most", "seconds", "taken"),
    [(0.2, 10, 8.0, 10), (1.5, 10, 8.0, 6), (20.0, 10, 8.0, 2), (20.0, 1, 8.0, 1)],
)
def test_short_passes_are_taken_more_often_and_the_warm_up_is_none(
    each: float, most: int, seconds: float, taken: int
) -> None:
    drawn: list[int] = []

    def generate(requests: list[Request]) -> float:
        drawn.append(sum(r.output for r in requests))
        return each

    rows = list(passes(generate, "x", [Request([1], 100), Request([1], 7)], most, seconds))
    gc.unfreeze()
    assert drawn == [WARM_UP_TOKENS + 7] + [107] * taken
    assert [row.get("rep") for row in rows] == [None, *range(taken)]
    assert all("out_tok_s" not in row for row in rows[:1])


def test_a_shape_has_a_tokenizer_that_streams_text(tmp_path: Path) -> None:
    write_shape("qwen3-0.6b", tmp_path)
    write_tokenizer(300, tmp_path)
    tokenizer = load_text_side(str(tmp_path), None).tokenizer
    assert tokenizer.encode("w17 w299 w5") == [17, 299, 5]
    with pytest.raises(ConfigError, match="no shape 'x'; there are llama-8b"):
        write_shape("x", tmp_path)
    with pytest.raises(ConfigError, match="no workload 'x'; there are sharegpt"):
        draw("x", 100)
