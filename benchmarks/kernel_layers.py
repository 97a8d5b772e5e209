"""A prefill step's layers but for attention: by tokens, and by where the residual is added."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from kernel_gemm import Model, model_of
from kernel_timing import Machine

from octavo_kernels import cuda_gemm, ops

TOKENS = (1024, 2048, 4096, 8192)
LAYERS = 8
# So long each is run at a time: a GPU's clocks follow the load of some tens of milliseconds.
TURN_S, TURNS = 0.12, 3


def layers(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """TFLOP/s of the products alone and of all, for llama-8b; is a larger step better?"""
    model = model_of("llama-8b")
    part = Model(model.name, model.query_size, model.layers[:LAYERS], model.head[:1])
    del model
    torch.cuda.empty_cache()
    for tokens in TOKENS if sweep else (2048,):
        runs = {
            "products": products(part, tokens),
            "norms add": norms_add(part, tokens),
            "products add": products_add(part, tokens),
            "products add and gate": products_gate(part, tokens),
        }
        flop = 2 * tokens * sum(w.numel() for layer in part.layers for w in layer)
        for name, each in in_turns(runs).items():
            yield {
                "shape": part.name,
                "tokens": tokens,
                "layer": name,
                "us": round(each / LAYERS * 1e6, 1),
                "TFLOP_s": round(flop / each / 1e12, 1),
                "of_a_large_product": round(flop / each / machine.product_flop_s, 3),
            }


def products(model: Model, tokens: int) -> Callable[[], None]:
    x = {w.shape[1]: noise(tokens, w.shape[1]) for w in model.layers[0]}

    def run() -> None:
        for weight in itertools.chain.from_iterable(model.layers):
            ops.linear(x[weight.shape[1]], weight)

    return run


def norms_add(model: Model, tokens: int) -> Callable[[], None]:
    """As the decoder does it below MANY_ROWS."""
    residual, mixed, weight = state(model, tokens)

    def run() -> None:
        x = mixed
        for qkv, output, gate_up, down in model.layers:
            ops.linear(ops.rms_norm(x, weight, 1e-6, residual), qkv)
            normed = ops.rms_norm(ops.linear(mixed, output), weight, 1e-6, residual)
            x = ops.linear(ops.act_and_mul(ops.linear(normed, gate_up), "silu"), down)

    return run


def products_add(model: Model, tokens: int) -> Callable[[], None]:
    """As the decoder does it from MANY_ROWS on."""
    residual, mixed, weight = state(model, tokens)
    norm = ops.Norm(weight, 1e-6)

    def run() -> None:
        for qkv, output, gate_up, down in model.layers:
            ops.linear(ops.rms_norm(residual, weight, 1e-6), qkv)
            ops.linear_add(mixed, output, residual)
            ops.linear_add(ops.gated_linear(residual, gate_up, "silu", norm=norm), down, residual)

    return run


def products_gate(model: Model, tokens: int) -> Callable[[], None]:
    """With the gate in the product too."""
    run = products_add(model, tokens)

    def gated() -> None:
        before, cuda_gemm.gated_from = cuda_gemm.gated_from, 1
        try:
            run()
        finally:
            cuda_gemm.gated_from = before

    return gated


def state(model: Model, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual, what attention gave, a norm's weight."""
    hidden = model.layers[0][0].shape[1]
    return (
        noise(tokens, hidden),
        noise(tokens, model.query_size),
        torch.ones_like(noise(1, hidden)[0]),
    )


def noise(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)


def in_turns(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each run, of graphs that take turns."""
    graphs = {}
    for name, run in runs.items():
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, graph in graphs.items():
            taken[name].append(turn(graph))
    return {name: statistics.median(times) for name, times in taken.items()}


def turn(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay, after as many again that are not counted."""
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    count = max(2, round(TURN_S / (time.perf_counter() - begin)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for i in range(2 * count + 1):
        if i == count:
            marks[0].record()
        graph.replay()
    marks[1].record()
    marks[1].synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3 / (count + 1)
