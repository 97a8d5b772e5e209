"""Tokens a second through one API process: an engine that costs nothing, one client, streams.

    .venv/bin/python benchmarks/api.py

Client, API process and engine are a process each and share the machine's cores. The engine gives
each of 256 requests a token every step; where the API falls behind, one event carries several.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from record import ROOT, Figure, Part, circumstances, keep, show

sys.path.insert(0, str(ROOT / "tests" / "support"))

from api_server import running

from octavo.bench.load import Target, run_load
from octavo.bench.workloads import Request

STREAMS, TOKENS = 256, 512
BAR = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/engine.json")
    parser.add_argument("--step-ms", default="5")
    args = parser.parse_args()
    stamp = circumstances(threads=1)
    engine = ["--max-num-seqs", str(STREAMS), "--step-ms", args.step_ms, "--context", "4096"]
    part = Part("api, one process")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), engine=engine) as server:
        requests = [Request([20 + i % 100, 21, 22], TOKENS) for i in range(STREAMS)]
        target = Target(server.url, server.http.get("/v1/models").json()["data"][0]["id"])
        rows = [run_load(target, requests, float("inf")) for _ in range(3)]
    best = sorted(rows, key=lambda row: row["out_tok_s"])[len(rows) // 2]
    part.figures.append(
        Figure("streamed tokens, median of 3", best["out_tok_s"], "tokens/s", BAR, "higher")
    )
    part.details["runs"] = rows
    show(part)
    keep(part, stamp, args.json)


if __name__ == "__main__":
    main()
