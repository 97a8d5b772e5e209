"""What the scheduler does with blocks, and what it costs the host: no model, exact integers."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from record import ROUNDS, Figure, Part, interleaved
from simulation import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    Census,
    Size,
    make_scheduler,
    plain,
    run,
)
from workloads import ALPACA, SHAREGPT, Shape, draw, means

from octavo import wire
from octavo.core.step import StepPlan, StepResult
from octavo.engine.batch import build_batch
from octavo.engine.eager import draw_of
from octavo.engine.loop import EngineLoop
from octavo.engine.rows import RowTable, StateLayout, messages
from octavo.params import SamplingParams

WIDTHS = (2, 4, 6)
# Memory saved by sharing in the PagedAttention paper (§6.3), least and most of its widths 2, 4, 6.
PAPER = {
    ("samples", "alpaca"): (0.061, 0.098),
    ("beam", "alpaca"): (0.376, 0.552),
    ("samples", "sharegpt"): (0.162, 0.305),
    ("beam", "sharegpt"): (0.443, 0.663),
}
RUNNING = (64, 256, 512)
HOST_STEPS = 40
MOST_TOKENS = 16_384


def waste(requests: int) -> Part:
    """Slots of held blocks without a token, added up over all steps."""
    work = draw(SHAREGPT, requests, VOCAB_SIZE)
    scheduler = make_scheduler(Size())
    census = Census(scheduler)
    run(scheduler, work, plain, census.look)
    # The same by arithmetic: each request alone, from its prompt to its last written token.
    slots = tokens = 0
    for one in work:
        for held in range(len(one.prompt), len(one.prompt) + one.output):
            slots += -(-held // BLOCK_SIZE) * BLOCK_SIZE
            tokens += held
    return Part(
        "waste",
        [
            Figure("allocated slots without a token", 1 - census.filled / census.slots, "", 0.025),
            Figure("the same, as the mean of the steps", census.sum_of_shares / census.steps, ""),
            Figure("what last blocks make inevitable", 1 - tokens / slots, ""),
        ],
        means(work)
        | dataclasses.asdict(Size())
        | {"steps": census.steps, "preemptions": scheduler.counters.preemptions},
    )


def sharing(requests: int) -> Part:
    """Blocks saved because branches hold the same ones, beside the most that can be saved."""
    part = Part("sharing")
    rows = []
    for shape_name, shape in (("alpaca", ALPACA), ("sharegpt", SHAREGPT)):
        for kind, params in (("samples", _samples), ("beam", _beam)):
            for width in WIDTHS:
                saved, most = _saved(shape, requests, width, params)
                name = f"{kind} {width}, {shape_name}: of the most that can be saved"
                part.figures.append(Figure(name, saved / most, "", 0.98, "higher"))
                low, high = PAPER[kind, shape_name]
                rows.append(
                    {
                        "lengths": shape_name,
                        "kind": kind,
                        "width": width,
                        "saved": round(saved, 4),
                        "most": round(most, 4),
                        "paper_widths_2_to_6": [low, high],
                    }
                )
                print(
                    f"  {shape_name:<9} {kind:<8} {width}  saved {saved:6.1%} of at most "
                    f"{most:6.1%}   (paper, widths 2..6: {low:.1%}..{high:.1%})",
                    flush=True,
                )
    part.details = {
        "table": rows,
        "alpaca": means(draw(ALPACA, requests, VOCAB_SIZE)),
        "sharegpt": means(draw(SHAREGPT, requests, VOCAB_SIZE)),
        "beams": "candidates of random probability; the saved share depends on them, its share "
        "of the most that can be saved does not",
    } | dataclasses.asdict(Size())
    return part


def _samples(width: int, output: int) -> SamplingParams:
    return SamplingParams(n=width, max_tokens=output, temperature=1.0, ignore_eos=True)


def _beam(width: int, output: int) -> SamplingParams:
    return SamplingParams(
        n=width, use_beam_search=True, max_tokens=output, temperature=0, ignore_eos=True
    )


def _saved(
    shape: Shape, requests: int, width: int, params: Callable[[int, int], SamplingParams]
) -> tuple[float, float]:
    scheduler = make_scheduler(Size())
    census = Census(scheduler, count_fewest=True)
    run(scheduler, draw(shape, requests, VOCAB_SIZE), partial(params, width), census.look)
    return 1 - census.held / census.tables, 1 - census.fewest / census.tables


class QuickDevice:
    """The least that can be had of a device, so that its own time is none."""

    depth = 1

    def submit(self, plan: StepPlan) -> StepResult:
        return StepResult([1] * plan.num_samples)

    def collect(self, step: StepResult) -> StepResult:
        return step


class HostArrays(QuickDevice):
    """Also makes a step's arrays and what its draws need, as the runner does for a CPU."""

    def submit(self, plan: StepPlan) -> StepResult:
        build_batch(plan, BLOCK_SIZE, torch.device("cpu"))
        for share in plan.sequences:
            draw_of(share, 0)
        return super().submit(plan)


class DeviceRows(QuickDevice):
    """Also makes the message that tells a GPU what has changed; two steps are in flight."""

    depth = 2

    def __init__(self) -> None:
        layout = StateLayout(RUNNING[-1], MAX_MODEL_LEN // BLOCK_SIZE, MOST_TOKENS)
        self._rows = RowTable(layout, BLOCK_SIZE, 0)

    def submit(self, plan: StepPlan) -> StepResult:
        messages(self._rows.advance(plan).sent, MOST_TOKENS)
        return super().submit(plan)


class HostTime:
    """A full batch that decodes; a call takes some steps and gives seconds for each."""

    def __init__(self, running: int, device: QuickDevice) -> None:
        size = Size(max_num_seqs=running, max_num_batched_tokens=MOST_TOKENS, num_blocks=65_536)
        self._loop = EngineLoop(make_scheduler(size), device, depth=device.depth)
        # Far from their ends for the whole measurement, and out of step with each other.
        for index, one in enumerate(draw(SHAREGPT, running, VOCAB_SIZE)):
            self._loop.add(wire.AddRequest(str(index), one.prompt, plain(2048)))
        while any(not s.decoding for s in self._loop.scheduler.running) or not self._full(running):
            self._loop.step()

    def _full(self, running: int) -> bool:
        return self._loop.scheduler.num_running == running

    def __call__(self) -> float:
        seconds = []
        for _ in range(HOST_STEPS):
            begin = time.perf_counter()
            self._loop.step()
            seconds.append(time.perf_counter() - begin)
        return statistics.fmean(seconds)


# What is measured: a name, and the device whose share of the host's work is counted.
CONTENDERS = {"loop": QuickDevice, "gpu": DeviceRows, "cpu": HostArrays}
NAMES = {
    "loop": "loop alone",
    "gpu": "loop, two deep, and a GPU's rows",
    "cpu": "loop and a CPU's arrays",
}
HOST_BARS = {("gpu", 256): 0.3, ("cpu", 256): 1.0}


def host(_requests: int) -> Part:
    """Milliseconds of the host in a step that decodes, by the number of running sequences."""
    contenders: dict[str, Callable[[], float]] = {
        f"{running} {kind}": HostTime(running, device())
        for running in RUNNING
        for kind, device in CONTENDERS.items()
    }
    found = interleaved(contenders)
    ms = {name: statistics.median(values) * 1000 for name, values in found.items()}
    figures = [
        Figure(
            f"{running} running: {NAMES[kind]}",
            ms[f"{running} {kind}"],
            "ms",
            HOST_BARS.get((kind, running)),
        )
        for running in RUNNING
        for kind in CONTENDERS
    ]
    first, last = RUNNING[0], RUNNING[-1]
    for kind in ("gpu", "cpu"):
        growth = math.log(ms[f"{last} {kind}"] / ms[f"{first} {kind}"]) / math.log(last / first)
        name = f"{NAMES[kind]}: growth from {first} to {last}, as an exponent"
        figures.append(Figure(name, growth, "", 1.05))
    details = {
        "loop": "plan, commit and outputs of EngineLoop.step",
        "gpu": "with RowTable.advance and messages, all that the host does before a step's graph",
        "cpu": "with build_batch and the keys of the draws, as in EagerSteps",
        "steps": HOST_STEPS,
        "rounds": ROUNDS,
        "ms_by_round": {name: [round(v * 1000, 4) for v in vs] for name, vs in found.items()},
    }
    return Part("host", figures, details)
