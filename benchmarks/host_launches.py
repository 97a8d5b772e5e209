"""What a GPU's step costs the host: a whole step of a thin model, whose kernels have little to do.

Without a GPU tensors lie in host memory and `_cuda`'s functions return at once: what is left is
Python's and torch's share, without that of a graph's replay. With one it is all that `submit`
takes, and what the parts of a quiet step take of it.
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

import numpy as np
import torch

from octavo.core.step import Rows, ScheduledSequence, StepPlan
from octavo.engine.device import DeviceSteps
from octavo.engine.gpu import Gpu
from octavo.engine.graphs import CudaGraphs, Direct, Part
from octavo.engine.lane import HostLane
from octavo.engine.rows import StateLayout
from octavo.engine.workspace import Workspace
from octavo.models.decoder import Decoder, empty_parameters
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo.params import SamplingParams
from octavo_kernels import _cuda, cuda, cuda_lt, dispatch, ops
from octavo_kernels.attention_settings import DecodeSetting

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
    compiled: Any = _cuda
    compiled.DecodeWork = launches.work("DecodeWork")
    compiled.PrefillStep = launches.work("PrefillStep")
    dispatch._back_ends["cpu"] = cuda
    python: Any = torch._C
    python._cuda_getCurrentRawStream = lambda _device: 0
    products: Any = cuda_lt
    products.algorithm_of = lambda _size: b""
    return launches


def _answering(answer: object) -> Callable[..., object]:
    return lambda *_args, **_named: answer


def model_on(device: torch.device) -> Decoder:
    """A thin decoder with weights of any kind."""
    parameters = empty_parameters(SPEC, dtype=torch.bfloat16, device=device)
    for weight in parameters.values():
        weight.fill_(0.01)
    return Decoder(SPEC, parameters, max_positions=2048, device=device)


def cache_on(device: torch.device, model: Decoder) -> torch.Tensor:
    """A cache for the plans below."""
    shape = (model.layout.layers_per_group, 2, 512, BLOCK_SIZE, SPEC.num_kv_heads, SPEC.head_dim)
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def steps_without_gpu(*, captured: bool) -> DeviceSteps:
    """A decoder's steps on the device that is none, as graphs, which do nothing, or one by one."""
    device = torch.device("cpu")
    model = model_on(device)
    model._product = ops.linear
    space = Workspace(model, StateLayout(MAX_ROWS + 1, 128, MAX_TOKENS), BLOCK_SIZE, device)
    space.attention.settings = (DecodeSetting(64, 1),) * (MAX_ROWS + 2)  # a CPU has none
    nothing = Part(*[lambda _size: None] * 3)

    def graphs(decodes: Part, chunks: Part) -> tuple[Direct, Direct]:
        if captured:  # a graph's replay is one launch, and not the host's work
            return Direct(nothing, MAX_ROWS), Direct(nothing, MAX_TOKENS)
        return Direct(decodes, MAX_ROWS), Direct(chunks, 0)

    return DeviceSteps(
        model, cache_on(device, model), space, HostLane(), graphs, eos_token_ids=(), seed=0
    )


def steps_on_gpu(*, captured: bool) -> DeviceSteps:
    """A decoder's steps as they are served, all graphs prepared, or without any."""
    device = torch.device("cuda", 0)
    model = model_on(device)
    gpu = Gpu(
        model, device=device, block_size=BLOCK_SIZE, max_model_len=2048, max_num_seqs=MAX_ROWS,
        max_num_tokens=MAX_TOKENS, eager=not captured,
    )  # fmt: skip
    steps = gpu.steps(cache_on(device, model), (), 0)
    while steps.prepare_one():
        pass
    return steps


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


def measure(steps: DeviceSteps, plans: list[StepPlan], launches: Launches | None) -> None:
    """Print the median of `submit`; the first few steps fill tables and are not counted."""
    seconds, counted = [], 0
    for plan in plans:
        before = ops.calls.total()
        if launches is not None:
            launches.calls.clear()
        begin = time.perf_counter()
        step = steps.submit(plan)
        seconds.append(time.perf_counter() - begin)
        step.result()
        counted = ops.calls.total() - before if launches is None else launches.calls.total()
    median = statistics.median(seconds[5:])
    each = f", {1e6 * median / counted:.1f} us each" if counted else ""
    print(f"{1e3 * median:.3f} ms, {counted} operations{each}")


def parts_of_a_quiet_step(steps: DeviceSteps) -> None:
    """Print what its parts take, each in microseconds, on a GPU that idles or that is busy."""
    lane, tokens = steps._lane, steps._space.drawn[0, :MAX_ROWS]
    graphs = steps._graphs
    assert isinstance(graphs, CudaGraphs)
    this, other = graphs._graphs.pop(MAX_ROWS), graphs._graphs[MAX_ROWS - 8]
    with lane.scope(), torch.inference_mode():
        _cuda.set_overlap(False)
        graphs.ready(MAX_ROWS)
        _cuda.set_overlap(True)
        torch.cuda.synchronize()
    apart = graphs._graphs[MAX_ROWS]
    graphs._graphs[MAX_ROWS] = this
    small = np.zeros(64, dtype=np.int32)

    def fetch() -> None:
        lane.fetch(tokens).wait()

    def in_scope() -> None:
        with lane.scope(), torch.inference_mode():
            pass

    with lane.scope(), torch.inference_mode():
        print_part("scope", in_scope, lambda: None)
        print_part("send", lambda: lane.send(small), lambda: None)
        print_part("fetch and wait", fetch, lambda: None)
        print_part("replay, GPU idle", this.replay, lambda: None)
        print_part("replay behind the same graph", this.replay, this.replay)
        print_part("replay behind another graph", this.replay, other.replay)
        print_part("replay of kernels that do not overlap", apart.replay, lambda: None)
        print_part("wait for a replay", torch.cuda.synchronize, this.replay)


def print_part(name: str, part: Callable[[], object], first: Callable[[], object]) -> None:
    """Time `part` right after `first`, each time on a GPU that had nothing to do."""
    seconds = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        first()
        begin = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - begin)
    print(f"  {name}: {1e6 * statistics.median(seconds):.0f} us")


def main() -> None:
    """Steps with prompts, quiet steps, and a profile where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    profiled = parser.parse_args().profile
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    launches = None if on_gpu else pretend()
    kinds = {
        "with prompts, one operation after the other": (
            [chunk_plan(i) for i in range(STEPS)],
            False,
        ),
        "with prompts, by a graph": ([chunk_plan(i) for i in range(STEPS)], True),
        "quiet": (decode_plans(), True),
    }
    for name, (plans, captured) in kinds.items():
        make = steps_on_gpu if on_gpu else steps_without_gpu
        steps = make(captured=captured)
        print(name, end=": ", flush=True)
        if not profiled:
            measure(steps, plans, launches)
            if on_gpu and name == "quiet":
                parts_of_a_quiet_step(steps)
            continue
        with cProfile.Profile() as profile:
            for plan in plans:
                steps.submit(plan).result()
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
