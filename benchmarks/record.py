"""Figures beside their bars: printed, and kept in a JSON file, part by part."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
# Of processes that want to run while nothing of ours does; beyond it no time is to be believed.
QUIET_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. With a bar it is met or missed: `better` says on which side of it."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    better: str = "lower"

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "value": round(self.value, 5), "unit": self.unit}
        if self.bar is not None:
            sign = "at most" if self.better == "lower" else "at least"
            row |= {"bar": f"{sign} {self.bar:g}", "met": self.met}
        return row


@dataclass(slots=True)
class Part:
    """What one part of the benchmark found; `details` are what the figures were made of."""

    name: str
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def interleaved(
    contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Measure each of them once a round, in turn and in turned order; one value for each round.

    What slows the machine for a while then slows all of them.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds):
        names = list(contenders) if index % 2 == 0 else list(contenders)[::-1]
        for name in names:
            found[name].append(contenders[name]())
    return found


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def circumstances(threads: int) -> dict[str, Any]:
    """Where and on what the numbers were taken; called before anything runs."""
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "command": shlex.join(["python", *_own_path(sys.argv)]),
        "commit": _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": _machine() | {"threads": threads},
        "load": load,
        "quiet": load[0] < QUIET_LOAD,
    }


def _own_path(argv: list[str]) -> list[str]:
    return [str(Path(argv[0]).resolve().relative_to(ROOT)), *argv[1:]]


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.split(":", 1)[1] for line in cpuinfo.splitlines() if "model name" in line]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": models[0].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # a machine that only measures
        return "unknown"
    return done.stdout.strip() or "unknown"


def show(part: Part) -> None:
    print(f"\n{part.name}")
    for figure in part.figures:
        row = figure.as_json()
        verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
        bar = f"  (bar: {row['bar']})" if "bar" in row else ""
        print(f"  {figure.name:<54} {figure.value:>10.4g} {figure.unit:<10}{bar} {verdict}")


def keep(part: Part, stamp: dict[str, Any], path: Path) -> None:
    """Replace this part in the file; the others stay as they were measured."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[part.name] = stamp | {
        "figures": [figure.as_json() for figure in part.figures],
        "details": part.details,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
