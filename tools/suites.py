"""Runs named suites one after the other, each with a time budget printed beside what it took.

    python3 tools/suites.py test        # what `make test` runs
    python3 tools/suites.py check       # lint, types, unit

Standard library only. What it starts, it ends: a cluster that was down before is brought down
after, whatever happened between. The figures go to benchmarks/results/<name>.json.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
PYTHON = str(BIN / "python")
CLUSTER = [sys.executable, "e2e/cluster/cli.py"]
UNIT = [PYTHON, "-m", "pytest", "-q", "tests", "-m", "not slow and not apiserver and not gpu"]


@dataclass(frozen=True)
class Suite:
    """One command. `needs_cluster` suites are skipped once bringing the cluster up has failed."""

    name: str
    budget_s: int
    command: list[str]
    needs_cluster: bool = False


SETUP = Suite("setup", 300, [sys.executable, "tools/setup.py"])
CHECK = [
    SETUP,
    Suite("lint", 10, [str(BIN / "ruff"), "check", "."]),
    Suite("format", 10, [str(BIN / "ruff"), "format", "--check", "."]),
    Suite("types", 60, [PYTHON, "-m", "mypy"]),
    Suite("imports", 20, [str(BIN / "lint-imports"), "--no-cache"]),
]
# The inner loop takes both cores; `make test` takes one, for steadier times.
QUICK_UNIT = Suite("unit", 150, [*UNIT, "-n", "2"])
UNIT_SUITE = Suite("unit", 260, UNIT)
BINARIES = Suite("binaries", 60, [*CLUSTER, "binaries"])
CLUSTER_UP = Suite("cluster up", 60, [*CLUSTER, "up"])
E2E = [
    CLUSTER_UP,
    Suite("images", 120, [*CLUSTER, "images"], needs_cluster=True),
    Suite("e2e", 480, [PYTHON, "-m", "pytest", "-q", "e2e", "-m", "cluster and not slow"], True),
]
# On a machine with a GPU. So many processes share it; torch takes a gigabyte of it in each.
ON_GPU = [PYTHON, "-m", "pytest", "-q", "--timeout", "300", "-n"]
# In float32, most of which torch computes, a launch at a time: their number is what takes the time.
# Workers begin with neighbours, which share oracles and checkpoints, and then help each other out.
AS_ON_CPU = ["env", "OCTAVO_TEST_DEVICE=cuda", "OMP_NUM_THREADS=1", *ON_GPU, "10"]
REAL = [
    f"tests/server/test_{name}.py"
    for name in (
        "engine_real", "sampling_real", "groups_real", "kv_groups_real", "swap_real", "llm",
        "api_real",
    )
]  # fmt: skip
GPU = [
    Suite("kernels", 120, [*ON_GPU, "8", "tests/kernels"]),
    Suite("half precision", 120, [*ON_GPU, "8", "tests/server", "-k", "cuda"]),
    Suite("as on a CPU", 100, [*AS_ON_CPU, "--dist", "worksteal", *REAL]),
    Suite("sanitizer", 320, [PYTHON, "tools/sanitize.py"]),
]
APISERVER = Suite(
    "apiserver", 140, [PYTHON, "-m", "pytest", "-q", "tests", "-m", "apiserver and not slow"]
)
PLANS: dict[str, list[Suite]] = {
    "check": [*CHECK, QUICK_UNIT],
    "test": [*CHECK, UNIT_SUITE, BINARIES, APISERVER, *E2E],
    "test-gpu": [SETUP, *GPU],
    "test-apiserver": [SETUP, BINARIES, APISERVER],
    "test-e2e": [SETUP, BINARIES, *E2E],
    "test-long": [
        SETUP,
        Suite(
            "unit, full size",
            1800,
            [PYTHON, "-m", "pytest", "-q", "tests", "-m", "slow and not gpu"],
        ),
        BINARIES,
        CLUSTER_UP,
        Suite("images", 120, [*CLUSTER, "images"], needs_cluster=True),
        Suite(
            "e2e, full size",
            2400,
            [PYTHON, "-m", "pytest", "-q", "e2e", "-m", "cluster and slow", "--timeout", "1200"],
            True,
        ),
    ],
}


def run_suite(suite: Suite) -> tuple[float, int]:
    """Run one suite in the foreground; returns (seconds, exit code)."""
    print(f"\n── {suite.name} (budget {suite.budget_s} s) ── {' '.join(suite.command)}", flush=True)
    began = time.monotonic()
    # OpenMP's waiting threads spin by default, which on two busy cores costs more than the work.
    environment = {"OMP_WAIT_POLICY": "passive"} | dict(os.environ)
    code = subprocess.run(suite.command, cwd=ROOT, env=environment).returncode
    return time.monotonic() - began, code


def cluster_is_up() -> bool:
    """Whether our cluster ran before we came; then it is not ours to bring down."""
    return subprocess.run([*CLUSTER, "status"], cwd=ROOT, capture_output=True).returncode == 0


def run_plan(plan: list[Suite]) -> list[dict[str, object]]:
    """Run all suites in order; go on after a failure, except where it took the ground away."""
    rows: list[dict[str, object]] = []
    gone: str | None = None
    for suite in plan:
        if gone and (gone == "setup" or suite.needs_cluster):
            rows.append({"suite": suite.name, "budget_s": suite.budget_s, "skipped_after": gone})
            continue
        seconds, code = run_suite(suite)
        rows.append(
            {
                "suite": suite.name,
                "budget_s": suite.budget_s,
                "seconds": round(seconds, 1),
                "exit_code": code,
            }
        )
        if code and suite.name in {"setup", "binaries", "cluster up", "images"}:
            gone = suite.name
    return rows


def report(name: str, rows: list[dict[str, object]], seconds: float) -> bool:
    """Print the table, write the figures; true when every suite ran and passed."""
    print(f"\n{'suite':<18}{'took':>8}{'budget':>8}")
    for row in rows:
        took = row.get("seconds")
        state = (
            f"skipped: {row['skipped_after']} failed"
            if took is None
            else ("FAILED" if row["exit_code"] else "over budget" if took > row["budget_s"] else "")
        )  # type: ignore[operator]
        print(
            f"{row['suite']:<18}{'-' if took is None else f'{took:.0f} s':>8}"
            f"{row['budget_s']:>6} s  {state}"
        )
    print(f"{'total':<18}{seconds:>6.0f} s", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "command": f"make {name}",
        "commit": commit.stdout.strip(),
        "machine": {
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "seconds": round(seconds, 1),
        "suites": rows,
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return all(row.get("exit_code") == 0 for row in rows)


def main() -> int:
    """Exit 0 only when every suite of the plan ran and passed."""
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in PLANS:
        print(f"usage: suites.py {{{'|'.join(PLANS)}}}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` below runs
    ours = CLUSTER_UP in PLANS[name] and not cluster_is_up()
    began = time.monotonic()
    rows: list[dict[str, object]] = []
    try:
        rows = run_plan(PLANS[name])
    finally:
        if ours:
            subprocess.run([*CLUSTER, "down"], cwd=ROOT)
    return 0 if report(name, rows, time.monotonic() - began) else 1


if __name__ == "__main__":
    sys.exit(main())
