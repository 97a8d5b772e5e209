"""A sitting: engines side by side on one GPU, on the public workloads, beside the machine's limit.

    python benchmarks/gpu.py --out rows.jsonl --engine octavo --engine vllm --shape llama-8b
    python benchmarks/gpu.py --out rows.jsonl --table

Each engine runs in a process of its own, in the order given; a second `--engine octavo` after the
peer shows the drift. Rows are appended, one JSON line a measurement; only rows of one sitting (one
machine, one lifetime of it) may be compared. The machine's ceilings are measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.bench.limits import Ceilings, least_seconds
from octavo.bench.workloads import SHAPES, WORKLOADS, draw

HERE = Path(__file__).resolve().parent
# What of a workload is the figure: tokens that come out, but of long prompts those that go in.
FIGURE = {"prefill": "in_tok_s"}


def command(engine: str, shape: str, loads: list[str], max_num_seqs: int) -> list[str]:
    """What runs one engine over some workloads and prints a JSON line for each pass."""
    if engine == "octavo":
        return [
            sys.executable, "-m", "octavo.cli", "bench", "offline", shape, "--workload", *loads,
            "--max-model-len", "4096", "--max-num-seqs", str(max_num_seqs), "--dtype", "bfloat16",
        ]  # fmt: skip
    peer = HERE / f"peer_{engine}.py"
    return [sys.executable, str(peer), shape, ",".join(loads), str(max_num_seqs)]


def run(words: list[str], site: str | None) -> Iterator[dict[str, Any]]:
    """The JSON lines that a command prints, as they come; what else it says only if it fails."""
    env = dict(os.environ)
    if site:
        env["PYTHONPATH"] = site + os.pathsep + env.get("PYTHONPATH", "")
    begin, said = time.perf_counter(), deque[str](maxlen=60)
    with subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
            else:
                said.append(line)
    if process.returncode:
        print("".join(said), file=sys.stderr)
        yield {"metric": "failed", "exit_code": process.returncode}
    yield {"metric": "process", "s": round(time.perf_counter() - begin, 2)}


def measurement(row: dict[str, Any], shape: str, ceilings: Ceilings) -> dict[str, Any]:
    """What a line says, beside what the machine would allow."""
    if row["metric"] != "offline":
        return {"metric": row["metric"], "value": row.get("s"), "detail": row}
    requests = draw(row["load"], SHAPES[shape]["vocab_size"])
    figure = FIGURE.get(row["load"], "out_tok_s")
    limit = row[figure] * row["s"] / least_seconds(SHAPES[shape], requests, ceilings)
    found = {name: row[name] for name in ("load", "rep", "digest", "s")}
    share = round(row[figure] / limit, 4)
    found |= {"metric": figure, "value": row[figure], "limit": round(limit, 1), "share": share}
    return found


def measure_ceilings() -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and the rate of a large bf16 product, measured."""
    done = subprocess.run(
        [sys.executable, str(HERE / "ceilings.py")], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Medians of each engine beside each other, with the spread and the share of the limit."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    limits: dict[tuple[str, str], float] = {}
    for row in rows:
        if "load" in row:
            key = (row["shape"], row["load"])
            values[key][row["engine"]].append(row["value"])
            limits[key] = row["limit"]
    lines = ["| shape | load | engine | tok/s (min–max) | limit | share |", "|---|" + "---|" * 5]
    for (shape, load), engines in sorted(values.items()):
        for engine, found in engines.items():
            middle, limit = statistics.median(found), limits[shape, load]
            lines.append(
                f"| {shape} | {load} | {engine} | {middle:,.0f} ({min(found):,.0f}–"
                f"{max(found):,.0f}) | {limit:,.0f} | {middle / limit:.0%} |"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="rows are appended to this file")
    parser.add_argument("--engine", action="append", default=[])
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--load", nargs="+", choices=WORKLOADS)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--sitting", default=time.strftime("%Y-%m-%dT%H:%M"))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--site", help="folder with the peers' packages")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.engine:
        machine = measure_ceilings()
        ceilings = Ceilings(machine["copy_TB_s"] * 1e12, machine["bf16_TFLOP_s"] * 1e12)
        stamp = {"sitting": args.sitting, "device": machine["device"], "commit": args.commit}
        append(args.out, stamp | {"metric": "ceilings", "detail": machine})
        for shape in args.shape or list(SHAPES):
            for engine in args.engine:
                loads = args.load or ["sharegpt", "single", "prefill"]
                words = command(engine, shape, loads, args.max_num_seqs)
                own = {"engine": engine, "version": None, "shape": shape}
                for row in run(words, None if engine == "octavo" else args.site):
                    own["version"] = row.get("version", own["version"])
                    append(args.out, stamp | own | measurement(row, shape, ceilings))
    if args.table:
        print(table([json.loads(line) for line in args.out.read_text().splitlines()]))


def append(path: Path, row: dict[str, Any]) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
