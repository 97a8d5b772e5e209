"""How busy a GPU is under a full batch, and what the host does meanwhile.

    python benchmarks/idle.py --model llama-8b --load sharegpt --after 150 350 --steps 50

Busy is the union of the times of all kernels and copies, as the profiler saw them, over the time
from the first one's begin to the last one's end. The profiler makes steps slower, never faster: so
the idle share it gives is from above, and the milliseconds of as many steps right before, without
it, are given beside it. Without a GPU there are the host's times alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from own_engine import HostTimes, fits, start

from octavo import LLM, SamplingParams, wire
from octavo.bench.workloads import SHAPES, WORKLOADS, draw

# The figure: at most this share of a saturated step without a kernel.
BAR = 0.03
TOP = 12
Interval = tuple[float, float, str]


@dataclass(slots=True)
class Busy:
    """Times on a device in microseconds, from intervals that may overlap; `span` is from the first
    begin to the last end.

    `exclusive` gives each moment to the kernel that began first of those that run: kernels that
    begin early and wait for the one before are not charged for that.
    """

    span: float = 0.0
    total: float = 0.0
    exclusive: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


def busy(intervals: Iterable[Interval]) -> Busy:
    """Add up (begin, end, name) in any order."""
    found, covered = Busy(), float("-inf")
    in_order = sorted(intervals)
    for begin, end, name in in_order:
        found.calls[name] += 1
        alone = end - max(begin, covered)
        if alone > 0:
            found.total += alone
            found.exclusive[name] += alone
            covered = end
    found.span = covered - in_order[0][0] if in_order else 0.0
    return found


def short(name: str) -> str:
    """A kernel's name without what all of them have in common."""
    for part in ("octavo::cuda::", "(anonymous namespace)::", "void "):
        name = name.replace(part, "")
    return name.replace("__nv_bfloat16", "bf16")[:80]


class Saturated:
    """An engine with a workload in it, stepped by hand."""

    def __init__(self, llm: LLM, load: str, count: int | None) -> None:
        self._llm = llm
        self._loop = llm._loop
        self.host = HostTimes(self._loop)
        most = self._loop.scheduler.limits.max_model_len
        self._requests = [fits(r, most) for r in draw(load, llm.vocab_size, count)]

    def fill(self) -> None:
        for number, request in enumerate(self._requests):
            asked = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=request.output)
            self._loop.add(wire.AddRequest(str(number), request.prompt, asked))

    def steps(self, count: int) -> int:
        """Take so many steps, or as many as there are; how many were taken."""
        for taken in range(count):
            if not self._loop.has_work:
                return taken
            self._loop.step()
        return count

    def window(self, count: int) -> dict[str, Any]:
        """As many steps without the profiler, then with it."""
        running = self._loop.scheduler.num_running
        self.host.seconds.clear()
        begin = time.perf_counter()
        plain = self.steps(count)
        seconds = time.perf_counter() - begin
        if not plain:
            raise SystemExit("the workload ended before the window: give a smaller --after")
        found: dict[str, Any] = {"running": running, "step_ms": round(1e3 * seconds / plain, 3)}
        found["host_ms"] = self.host.take(plain)
        return found | (self._profiled(count) if torch.cuda.is_available() else {})

    def _profiled(self, count: int) -> dict[str, Any]:
        cuda = torch.profiler.ProfilerActivity.CUDA
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[cuda]) as profile:
            taken = self.steps(count)
            torch.cuda.synchronize()
        events = (e for e in profile.events() or () if e.device_type.name == "CUDA")
        found = busy((e.time_range.start, e.time_range.end, short(e.name)) for e in events)
        top = [
            {
                "kernel": name,
                "ms": round(us / 1e3 / taken, 4),
                "calls": round(found.calls[name] / taken, 1),
            }
            for name, us in found.exclusive.most_common(TOP)
        ]
        return {
            "profiled_step_ms": round(found.span / 1e3 / taken, 3),
            "busy_ms": round(found.total / 1e3 / taken, 3),
            "idle": round(1 - found.total / found.span, 4),
            "bar": BAR,
            "kernels": round(found.calls.total() / taken, 1),
            "top": top,
        }

    def finish(self) -> None:
        self._loop.abort_all()
        while self._loop.has_work:
            self._loop.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-8b", help="a folder, or a shape's name")
    parser.add_argument("--load", choices=WORKLOADS, default="sharegpt")
    parser.add_argument("--requests", type=int, help="the first of them (default: all)")
    parser.add_argument("--after", type=int, nargs="+", default=[150, 350], help="steps before")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    args = parser.parse_args()
    own = {} if args.model in SHAPES else {"max_model_len": None}
    llm = start(args.model, **{"max_num_seqs": args.max_num_seqs} | own)
    llm.prepare()
    saturated = Saturated(llm, args.load, args.requests)
    saturated.fill()
    at = 0
    for after in sorted(args.after):
        at += saturated.steps(after - at)
        row = {"metric": "idle", "shape": args.model, "load": args.load, "after": at}
        print(json.dumps(row | saturated.window(args.steps)), flush=True)
        at += 2 * args.steps
    saturated.finish()


if __name__ == "__main__":
    main()
