"""What a GPU's step costs the host before the driver: a whole step, with kernels that do nothing.

Runs anywhere: tensors lie in host memory, and `_cuda`'s functions return at once. What is left is
Python's and torch's share of each launch; the driver's own, some 3 to 5 µs each, comes on top.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from octavo.core.step import Rows, ScheduledSequence, StepPlan
from octavo.engine.device import DeviceSteps
from octavo.engine.graphs import Direct
from octavo.engine.lane import HostLane
from octavo.engine.rows import StateLayout
from octavo.engine.workspace import Workspace
from octavo.models.decoder import Decoder, empty_parameters
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo.params import SamplingParams
from octavo_kernels import _cuda, cuda, cuda_lt, dispatch, ops

BLOCK_SIZE, MAX_ROWS, MAX_TOKENS = 16, 64, 512
STEPS = 60
# The layers of Qwen3-0.6B, but thin: the host does not feel how wide they are.
SPEC = DecoderSpec(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    layers=(LayerSpec(),) * 28,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=2048,
    qk_norm="head",
    rotary_dim=64,
    tied_embeddings=True,
)


class Launches:
    """In the place of the compiled functions: counts, and says that all is served."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def function(self, name: str) -> Callable[..., Any]:
        """A function that does nothing."""

        def launch(*_args: object, **_named: object) -> bool:
            self.calls[name] += 1
            return True

        return launch

    def work(self, name: str) -> type:
        """A class all of whose methods do nothing."""
        members = {method: self.function(f"{name}.{method}") for method in ("plan", "attend")}
        sizes = {"list_words": 64, "partial_floats": 64, "splits": False, "warpgroups": False}
        return type(name, (), {"__init__": lambda *_a, **_n: None, **members, **sizes})


def pretend() -> Launches:
    """Give tensors in host memory to the back end of GPUs, and have its kernels do nothing."""
    launches = Launches()
    questions = {
        "decode_serves": True,
        "prefill_serves": True,
        "skinny_gemm_serves": False,
        "sample_workspace": 64,
    }
    for name, value in vars(_cuda).items():
        if callable(value) and not isinstance(value, type):
            answer = questions.get(name)
            fake = launches.function(name) if answer is None else _answering(answer)
            setattr(_cuda, name, fake)
    _cuda.DecodeWork = launches.work("DecodeWork")  # type: ignore[misc]
    _cuda.PrefillStep = launches.work("PrefillStep")  # type: ignore[misc]
    dispatch._back_ends["cpu"] = cuda
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    cuda_lt._algorithm = lambda _size: b""
    return launches


def _answering(answer: object) -> Callable[..., object]:
    return lambda *_args, **_named: answer


def device_steps() -> DeviceSteps:
    """A decoder's steps on the device that is none."""
    device = torch.device("cpu")
    parameters = empty_parameters(SPEC, dtype=torch.bfloat16, device=device)
    model = Decoder(SPEC, parameters, max_positions=2048, device=device)
    space = Workspace(model, StateLayout(MAX_ROWS, 128, MAX_TOKENS), BLOCK_SIZE, device)
    shape = (model.layout.layers_per_group, 2, 512, BLOCK_SIZE, SPEC.num_kv_heads, SPEC.head_dim)
    cache = torch.zeros(shape, dtype=torch.bfloat16)
    model._product = ops.linear
    return DeviceSteps(
        model, cache, space, HostLane(), lambda step, _: Direct(step, MAX_ROWS),
        eos_token_ids=(), seed=0,
    )  # fmt: skip


def chunk_plan(number: int) -> StepPlan:
    """Eight new sequences, each with a prompt of its own length."""
    tokens = list(range(40))
    table = list(range(1, 9))
    shares = (
        ScheduledSequence(
            100 + number * 8 + i, tokens[: 20 + (number + i) % 20], 0, table, True,
            SamplingParams(temperature=0), 0,
        )
        for i in range(8)
    )  # fmt: skip
    return StepPlan(tuple(shares))


def decode_plans() -> list[StepPlan]:
    """Rows that only decode, from their first step on."""
    joined = tuple(
        ScheduledSequence(i, [5], 40, list(range(1, 9)), True, SamplingParams(temperature=0), 1)
        for i in range(MAX_ROWS)
    )
    first = StepPlan(rows=Rows(MAX_ROWS, joined=joined))
    return [first, *[StepPlan(rows=Rows(MAX_ROWS))] * STEPS]


def measure(steps: DeviceSteps, plans: list[StepPlan], launches: Launches) -> None:
    """Print the median step; the first few fill tables and are not counted."""
    seconds, counted = [], 0
    for plan in plans:
        launches.calls.clear()
        begin = time.perf_counter()
        steps.submit(plan).result()
        seconds.append(time.perf_counter() - begin)
        counted = launches.calls.total()
    median = statistics.median(seconds[5:])
    each = f", {1e6 * median / counted:.1f} us each" if counted else ""
    print(f"{1e3 * median:.2f} ms, {counted} launches{each}")


def main() -> None:
    """Steps with prompts, quiet steps whose graph does nothing, and a profile where it is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    profiled = parser.parse_args().profile
    torch.set_num_threads(1)
    launches = pretend()
    kinds = {
        "with prompts": [chunk_plan(i) for i in range(STEPS)],
        "quiet": decode_plans(),
    }
    for name, plans in kinds.items():
        steps = device_steps()
        if name == "quiet":
            steps._decode = lambda _size: None
            steps._graphs = Direct(steps._decode, MAX_ROWS)
        print(name, end=": ", flush=True)
        if not profiled:
            measure(steps, plans, launches)
            continue
        with cProfile.Profile() as profile:
            for plan in plans:
                steps.submit(plan).result()
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
