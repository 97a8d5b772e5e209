"""What single requests took, summed up as operators of a service ask for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from octavo.bench.workloads import Request, digest

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Timeline:
    """One streamed request: seconds since the run's start. `events` are arrivals of output."""

    due: float
    output: int
    events: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft(self) -> float:
        """From when it was due (not from when the client got round to it) to the first output."""
        return self.events[0] - self.due

    @property
    def tpot(self) -> float:
        """Mean seconds a token after the first one."""
        return (self.events[-1] - self.events[0]) / max(1, self.output - 1)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: always a value that occurred."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Percentiles, mean and maximum in milliseconds."""
    if not values:
        return {}
    row = {f"p{p}": round(percentile(values, p) * 1e3, 3) for p in PERCENTILES}
    row["mean"] = round(sum(values) / len(values) * 1e3, 3)
    row["max"] = round(max(values) * 1e3, 3)
    return row


def summarize(timelines: Sequence[Timeline], seconds: float) -> dict[str, Any]:
    """The figures of one load; times are in milliseconds, rates a second."""
    done = [t for t in timelines if t.error is None and t.events]
    failed = [t.error for t in timelines if t.error is not None]
    gaps = [b - a for t in done for a, b in pairwise(t.events)]
    return {
        "requests": len(timelines),
        "completed": len(done),
        "failed": len(failed),
        "first_errors": failed[:3],
        "s": round(seconds, 3),
        "req_s": round(len(done) / seconds, 3),
        "out_tok_s": round(sum(t.output for t in done) / seconds, 1),
        "ttft_ms": spread([t.ttft for t in done]),
        "tpot_ms": spread([t.tpot for t in done if t.output > 1]),
        "gap_ms": spread(gaps),
        "latency_ms": spread([t.events[-1] - t.due for t in done]),
    }


def throughput(
    name: str, repetition: int, requests: Sequence[Request], seconds: float
) -> dict[str, Any]:
    """The figures of one pass over a workload, without HTTP."""
    prompt = sum(len(request.prompt) for request in requests)
    output = sum(request.output for request in requests)
    return {
        "metric": "offline",
        "load": name,
        "digest": digest(list(requests)),
        "rep": repetition,
        "requests": len(requests),
        "s": round(seconds, 4),
        "out_tok_s": round(output / seconds, 1),
        "in_tok_s": round(prompt / seconds, 1),
        "req_s": round(len(requests) / seconds, 3),
    }
