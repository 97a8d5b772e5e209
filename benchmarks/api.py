"""Tokens a second through one API process: an engine that costs nothing, one client, streams.

    .venv/bin/python benchmarks/api.py

Client, API process and engine are a process each and share the machine's cores. The engine gives
each of 256 requests a token every step: first at a pace that the API should keep up with, an event
for each token, then faster than anybody reads. Where the API falls behind, one event carries
several tokens; how many is part of the figures. The processor time of the API process alone says
what a token costs, whoever else runs.

Then 64 streams alone, and beside others' long prompts, one after another: what one arrival costs
everybody else.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import ROOT, Figure, Part, circumstances, keep, show

sys.path.insert(0, str(ROOT / "tests" / "support"))

from api_server import ApiServer, running

from octavo.bench.load import Target, run_load
from octavo.bench.workloads import Request

STREAMS, TOKENS, ROUNDS = 256, 512, 3
BAR = 20_000
# Milliseconds: 256 tokens every 5 ms are 51,200 a second.
PACE, FLOOD = 5.0, 2.0
# Streams that long prompts come to disturb, and the pace of a model of some size.
FEW, STEADY = 64, 8.0
LONG_CHARS = 32_000  # a prompt of some thousand tokens


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used, in the kernel and out of it (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_load(server: ApiServer, target: Target) -> dict[str, Any]:
    """All streams once."""
    requests = [Request([20 + i % 100, 21, 22], TOKENS) for i in range(STREAMS)]
    before = cpu_seconds(server.process.pid)
    row = run_load(target, requests, float("inf"))
    seconds = cpu_seconds(server.process.pid) - before
    if row["failed"]:
        raise SystemExit(f"{row['failed']} of {STREAMS} streams failed: {row['first_errors']}")
    # Of each stream the gaps add up to what lies between its first event and its last.
    gaps = (row["latency_ms"]["mean"] - row["ttft_ms"]["mean"]) / row["gap_ms"]["mean"]
    return row | {
        "tokens_per_event": round(TOKENS / (1 + gaps), 3),
        "api_cpu": round(seconds / row["s"], 3),
        "tokens_per_cpu_s": round(STREAMS * TOKENS / seconds, 1),
    }


def measured(step_ms: float) -> list[dict[str, Any]]:
    engine = ["--max-num-seqs", str(STREAMS), "--step-ms", str(step_ms), "--context", "4096"]
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), engine=engine) as server:
        target = Target(server.url, server.http.get("/v1/models").json()["data"][0]["id"])
        return [one_load(server, target) for _ in range(ROUNDS)]


def disturb(url: str, path: str, body: bytes) -> None:
    """Send the request again and again, each time a moment after it was answered."""
    while True:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{path} is answered with {answer.status}: {answer.read()[:200]!r}")
        answer.read()
        connection.close()
        time.sleep(0.1)


@contextlib.contextmanager
def disturbed(url: str, path: str, body: bytes) -> Iterator[None]:
    other = multiprocessing.get_context("spawn").Process(target=disturb, args=(url, path, body))
    other.start()
    try:
        time.sleep(1)  # a process's own start
        yield
        if not other.is_alive():
            raise SystemExit("whoever was to disturb the streams gave up")
    finally:
        other.kill()
        other.join()


def disturbances() -> dict[str, tuple[str, bytes]]:
    """By name: a path and a body."""
    rng = random.Random(7)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(LONG_CHARS)]
    text = " ".join(words)[:LONG_CHARS]
    few = {"max_tokens": 2, "ignore_eos": True, "stream": True}
    talk = [
        {"role": "assistant" if i % 2 else "user", "content": text[i * 100 : i * 100 + 100]}
        for i in range(301)
    ]
    long = [{"role": "user", "content": text}]
    bodies = {
        "a long chat": ("chat/completions", {"messages": long}),
        "a chat of 301 messages": ("chat/completions", {"messages": talk}),
        "20,000 token ids": ("completions", {"prompt": [20] * 20_000}),
    }
    return {n: (f"/v1/{p}", json.dumps(few | b).encode()) for n, (p, b) in bodies.items()}


def stalls() -> Part:
    """Gaps between a stream's events, alone and disturbed."""
    part = Part("api, arrivals")
    engine = ["--max-num-seqs", str(FEW + 8), "--step-ms", str(STEADY), "--context", "40000"]
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), engine=engine) as server:
        target = Target(server.url, server.http.get("/v1/models").json()["data"][0]["id"])
        requests = [Request([20 + i, 21, 22], TOKENS // 2) for i in range(FEW)]
        for name, what in {"nobody": None, **disturbances()}.items():
            with disturbed(server.url, *what) if what else contextlib.nullcontext():
                row = run_load(target, requests, float("inf"))
            part.details[name] = row
            part.figures += [
                Figure(f"99th of 100 gaps beside {name}", row["gap_ms"]["p99"], "ms"),
                Figure(f"longest gap beside {name}", row["gap_ms"]["max"], "ms"),
            ]
    return part


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/engine.json")
    args = parser.parse_args()
    stamp = circumstances(threads=1)
    part = Part("api, one process")
    for name, step_ms, bar in (("256 every 5 ms", PACE, BAR), ("flooded", FLOOD, None)):
        rows = measured(step_ms)

        def median(key: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.median(row[key] for row in rows)

        part.figures += [
            Figure(f"streamed tokens, {name}", median("out_tok_s"), "tokens/s", bar, "higher"),
            Figure(f"tokens an event, {name}", median("tokens_per_event"), "tokens"),
            Figure(f"a CPU second of the API, {name}", median("tokens_per_cpu_s"), "tokens"),
            Figure(
                f"99th of 100 gaps, {name}",
                statistics.median(row["gap_ms"]["p99"] for row in rows),
                "ms",
            ),
        ]
        part.details[name] = rows
    for done in (part, stalls()):
        show(done)
        keep(done, stamp, args.json)


if __name__ == "__main__":
    main()
