"""What sharing blocks brings at equal memory: n samples and beams, against the same with none.

    python benchmarks/sharing_gpu.py --model qwen3-0.6b
    python benchmarks/sharing_gpu.py --model llama-8b --load sharegpt --kind beam --width 6

Both sides are this engine, with the same requests and the same pool of KV blocks, so small that
memory bounds the batch. `Unshared` is its scheduler without sharing: a branch that is to write
takes a copy of every block that another holds, not of the last alone, which makes it planned by
itself; and a group is let in when there is room for all of its branches' blocks. Requests never
run out: what is measured is a number of steps, after as many as a request mostly lives. One JSON
line a run, one a ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from own_engine import HostTimes, fits, start

from octavo import LLM, SamplingParams, wire
from octavo.bench.workloads import SHAPES, Request, draw
from octavo.core.block_pool import NO_BLOCK, BlockPool
from octavo.core.forecast import expected_growth
from octavo.core.group import Group
from octavo.core.policy import PolicyFactory
from octavo.core.prefix_cache import Prefix
from octavo.core.scheduler import Scheduler
from octavo.core.sequence import Sequence as Branch
from octavo.core.step import StepPlan
from octavo.engine.loop import EngineLoop

# The PagedAttention paper's table 1: a 13B model on a 40 GB A100 has room for 15,700 tokens.
PAPER_BLOCKS = 15_700 // 16
# Steps before the window and within it: a request's life is some hundred steps, or a few dozen.
WINDOWS = {"sharegpt": (250, 200), "alpaca": (60, 80)}
# What says most comes first, should time run out.
KINDS = ("beam", "samples")
WIDTHS = (6, 4, 2)
# Requests that wait at any time, so that only blocks decide how many run.
BACKLOG = 64
# A look at all block tables in every so many steps.
STEPS_BETWEEN_LOOKS = 8


class Unshared(Scheduler):
    """The scheduler, with no block held by two branches when they write."""

    def _to_copy(self, sequence: Branch) -> list[int]:
        if sequence.computed < sequence.written:
            return []
        return [
            entry
            for entry, block in enumerate(sequence.block_table)
            if block != NO_BLOCK and self.pool.references(block) > 1
        ]

    def _step_search(self, group: Group, draft: Any) -> bool:  # noqa: ARG002
        return False  # the one pass copies one block of a branch, not all that others hold

    def _admission_blocks(self, group: Group, found: Prefix) -> int:  # noqa: ARG002
        mean, chunk = self.output_lengths.mean, self.limits.max_num_batched_tokens
        return sum(
            self.kv.blocks([branch.length + expected_growth(branch, mean)], chunk=chunk)
            for branch in group.branches
        )


SCHEDULERS: dict[bool, type[Scheduler]] = {True: Scheduler, False: Unshared}


def params(kind: str, width: int, output: int) -> SamplingParams:
    """What a request asks for; it draws exactly `output` tokens in each branch."""
    if kind == "beam":
        return SamplingParams(
            n=width, use_beam_search=True, temperature=0, max_tokens=output, ignore_eos=True
        )
    return SamplingParams(n=width, temperature=1.0, max_tokens=output, ignore_eos=True)


@dataclass(slots=True)
class Looks:
    """Block tables, added up over some steps, as they are when a step has been planned."""

    looks: int = 0
    entries: int = 0
    held: int = 0
    branches: int = 0

    def look(self, scheduler: Scheduler) -> None:
        """Take in one moment."""
        self.looks += 1
        self.held += scheduler.pool.counts.active
        for branch in scheduler.running:
            self.branches += 1
            self.entries += len(branch.block_table) - branch.block_table.count(NO_BLOCK)

    @property
    def saved(self) -> float:
        """Blocks saved by holding the same ones, as a share of what would be held without."""
        return 1 - self.held / self.entries if self.entries else 0.0


@dataclass(slots=True)
class Run:
    """An engine that never runs out of requests of one kind."""

    loop: EngineLoop
    requests: Sequence[Request]
    kind: str
    width: int
    steps: int = 0
    looks: Looks = field(default_factory=Looks)
    _source: Iterator[tuple[int, Request]] = field(init=False)

    def __post_init__(self) -> None:
        self._source = enumerate(itertools.cycle(self.requests))
        scheduler = self.loop.scheduler
        plan = scheduler.plan

        def planned(budget: int | None = None) -> StepPlan:
            found = plan(budget)
            if found.num_sequences and self.steps % STEPS_BETWEEN_LOOKS == 0:
                self.looks.look(scheduler)
            return found

        scheduler.plan = planned  # type: ignore[method-assign]

    def step(self) -> None:
        """One step, with a backlog behind it."""
        while self.loop.scheduler.waiting_totals.count < BACKLOG:
            number, request = next(self._source)
            asked = params(self.kind, self.width, request.output)
            self.loop.add(wire.AddRequest(str(number), request.prompt, asked))
        for output in self.loop.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id}: {output.error}")
        self.steps += 1

    def finish(self) -> None:
        """End everything; the books must balance."""
        self.loop.abort_all()
        while self.loop.has_work:
            self.loop.step()
        self.loop.scheduler.check_integrity()


def measure(run: Run, before: int, steps: int) -> dict[str, Any]:
    """Tokens a second and blocks within so many steps, after `before` of the same."""
    counters = run.loop.scheduler.counters
    host = HostTimes(run.loop)
    for _ in range(before):
        run.step()
    run.looks = Looks()
    host.seconds.clear()
    preempted, copies = counters.preemptions, counters.copies
    tokens, begin = counters.generation_tokens, time.perf_counter()
    for _ in range(steps):
        run.step()
    seconds = time.perf_counter() - begin
    found = {
        "s": round(seconds, 3),
        "tok_s": round((counters.generation_tokens - tokens) / seconds, 1),
        "blocks_saved": round(run.looks.saved, 4),
        "branches": round(run.looks.branches / max(1, run.looks.looks), 1),
        "blocks_held": round(run.looks.held / max(1, run.looks.looks), 1),
        "steps": steps,
        "step_ms": round(1e3 * seconds / steps, 3),
        "host_ms": host.take(steps),
        "preemptions": counters.preemptions - preempted,
        "copies": counters.copies - copies,
    }
    run.finish()
    return found


def check_room(requests: Iterable[Request], width: int, num_blocks: int, block_size: int) -> None:
    """Without sharing a group must fit into the pool alone, or it would wait for ever."""
    longest = max(len(request.prompt) + request.output for request in requests)
    needed = width * -(-longest // block_size)
    if needed > num_blocks:
        raise SystemExit(
            f"{width} branches of {longest} tokens take {needed} blocks without sharing, and the "
            f"pool has {num_blocks}; give --blocks {needed} or more"
        )


def engine(llm: LLM, num_blocks: int, *, sharing: bool) -> EngineLoop:
    """The loop of an `LLM` over again, with a pool and a scheduler of its own."""
    limits, policy = llm._loop.scheduler.limits, PolicyFactory.get_policy("fcfs")
    scheduler = SCHEDULERS[sharing](BlockPool(num_blocks), policy, limits)
    return EngineLoop(scheduler, _Bare(llm._loop._runner), depth=llm._loop.depth)


class _Bare:
    """The runner in a shell, whose methods can be measured and thrown away with it."""

    def __init__(self, runner: Any) -> None:
        self.submit, self.collect = runner.submit, runner.collect
        self.prepare_one = runner.prepare_one


def compare(
    llm: LLM, load: str, kind: str, width: int, num_blocks: int, scale: float
) -> Iterator[dict[str, Any]]:
    """With sharing, without, and what the one is over the other."""
    limits = llm._loop.scheduler.limits
    requests = [fits(r, limits.max_model_len) for r in draw(load, llm.vocab_size)]
    check_room(requests, width, num_blocks, limits.block_size)
    before, steps = (math.ceil(scale * count) for count in WINDOWS[load])
    what = {"load": load, "kind": kind, "width": width, "blocks": num_blocks}
    found = {}
    for sharing in (True, False):
        run = Run(engine(llm, num_blocks, sharing=sharing), requests, kind, width)
        found[sharing] = measure(run, before, steps)
        yield {"metric": "sharing", "sharing": sharing} | what | found[sharing]
    yield {
        "metric": "sharing_ratio", **what, "blocks_saved": found[True]["blocks_saved"],
        "ratio": round(found[True]["tok_s"] / found[False]["tok_s"], 3),
        "most": round(1 / (1 - found[True]["blocks_saved"]), 3),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-0.6b", help="a folder, or a shape's name")
    parser.add_argument("--load", nargs="+", choices=WINDOWS, default=list(WINDOWS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--width", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--blocks", type=int, default=PAPER_BLOCKS, help="of 16 tokens")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all windows")
    return parser.parse_args()


def main() -> None:
    args = parse()
    own = {} if args.model in SHAPES else {"max_model_len": None}
    options = {"num_kv_blocks": args.blocks, "max_num_seqs": args.max_num_seqs} | own
    begin = time.perf_counter()
    llm = start(args.model, **options)
    llm.prepare()
    print(json.dumps({"metric": "start", "s": round(time.perf_counter() - begin, 2)}), flush=True)
    for load, kind, width in itertools.product(args.load, args.kind, args.width):
        for row in compare(llm, load, kind, width, args.blocks, args.scale):
            print(json.dumps({"shape": args.model} | row), flush=True)


if __name__ == "__main__":
    main()
