"""Products with a model's weights: one decode step's, by rows, beside copy bandwidth and torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from kernel_timing import Machine, graph_seconds

from octavo.bench.workloads import SHAPES
from octavo_kernels import _cuda, cuda_gemm, ops

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 2048)
FUSED_ROWS = (1, 2, 4, 8)
DETERMINISTIC_ROWS = (1, 16, 64, 256)
# Milliseconds for one row that are to be met on a GPU that copies at 4.3 TB/s.
BARS, BARS_AT = {"llama-8b": 3.70, "qwen3-0.6b": 0.53}, 4.28e12
SHARED_LIMITS = tuple(1024 * k for k in (40, 56, 72, 96, 113, 144, 200))


@dataclass(frozen=True, slots=True)
class Model:
    """Weights as the decoder holds them: of each layer qkv, output, gate_up and down."""

    name: str
    query_size: int
    layers: list[tuple[torch.Tensor, ...]]
    head: torch.Tensor

    @property
    def weights(self) -> list[torch.Tensor]:
        return [weight for layer in self.layers for weight in layer] + [self.head]

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


def model_of(name: str) -> Model:
    config = SHAPES[name]
    hidden, inner, dim = (
        config["hidden_size"], config["intermediate_size"], config["head_dim"]
    )  # fmt: skip
    query, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def noise(n: int, k: int) -> torch.Tensor:
        return torch.empty((n, k), device="cuda", dtype=torch.bfloat16).normal_(std=k**-0.5)

    layers = [
        (
            noise(query + 2 * kv, hidden),
            noise(hidden, query),
            noise(2 * inner, hidden),
            noise(hidden, inner),
        )
        for _ in range(config["num_hidden_layers"])
    ]
    model = Model(name, query, layers, noise(config["vocab_size"], hidden))
    torch.cuda.synchronize()
    return model


def inputs_of(model: Model, rows: int) -> dict[int, torch.Tensor]:
    """An input for each width that a weight takes."""
    return {
        k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        for k in {weight.shape[1] for weight in model.weights}
    }


def step(model: Model, rows: int, product: Callable[..., object]) -> Callable[[], None]:
    """All products of a decode step, none waiting for another's result."""
    x, weights = inputs_of(model, rows), model.weights

    def run() -> None:
        for weight in weights:
            product(x[weight.shape[1]], weight)

    return run


def fused_step(
    model: Model, norm: ops.Norm, residual: torch.Tensor, ahead: bool = True
) -> torch.Tensor:
    """A step as the decoder makes it, but for attention: each product needs the one before."""
    following = [layer[0] for layer in model.layers[1:]] + [None]
    for (qkv, output, gate_up, down), after in zip(model.layers, following, strict=True):
        then = (output, gate_up, down, after) if ahead else (None,) * 4
        mixed = ops.linear(residual, qkv, norm=norm, ahead=then[0])[:, : model.query_size]
        ops.linear_add(mixed, output, residual, ahead=then[1])
        inner = ops.gated_linear(residual, gate_up, "silu", norm=norm, ahead=then[2])
        ops.linear_add(inner, down, residual, ahead=then[3])
    return ops.linear(residual, model.head, norm=norm)


def relative_error(model: Model, rows: int) -> float:
    """Distance of the first layers' result from torch's, the worst of single and fused products."""
    part = Model(model.name, model.query_size, model.layers[:2], model.head[:4096])
    start = torch.randn(rows, model.head.shape[1], device="cuda", dtype=torch.bfloat16)
    norm = ops.Norm(torch.ones_like(start[0]), 1e-6)
    torch.cuda.synchronize()
    got = fused_step(part, norm, start.clone()).double()
    with ops.forced("reference"):
        right = fused_step(part, norm, start.clone()).double()
    worst = float((got - right).norm() / right.norm())
    for weight in (*model.layers[0], model.head):
        x = torch.randn(rows, weight.shape[1], device="cuda", dtype=torch.bfloat16)
        wanted = x.double() @ weight[:4096].double().T
        off = ops.linear(x, weight)[:, :4096].double() - wanted
        worst = max(worst, float(off.norm() / wanted.norm()))
    return round(worst, 5)


def deterministic_seconds(model: Model, rows: int) -> float:
    """A step by one algorithm a weight whatever the rows."""
    ops.deterministic(True)
    try:
        step(model, rows, ops.linear)()
        return graph_seconds([step(model, rows, ops.linear)])
    finally:
        ops.deterministic(False)


def tuning_of(model: Model) -> dict[str, object]:
    """Search for the algorithms, as at start; what it took."""
    begin = time.perf_counter()
    sizes = ops.tune_products(((w, None) for w in model.weights), ROWS)
    seconds = time.perf_counter() - begin
    return {"shape": model.name, "tuned_sizes": sizes, "tuning_s": round(seconds, 2)}


def row_of(model: Model, rows: int, machine: Machine) -> dict[str, object]:
    """Our products beside torch's, and beside reading the weights at copy bandwidth."""
    products = [torch.nn.functional.linear, ops.linear]
    # In turns, so that none is measured with the clocks that another left behind.
    rounds = [[graph_seconds([step(model, rows, by)]) for by in products] for _ in range(2)]
    torchs, ours = (min(times) for times in zip(*rounds, strict=True))
    of_copy = model.bytes / ours / machine.copy_bytes_s
    row: dict[str, object] = {
        "shape": model.name,
        "rows": rows,
        "ms": round(ours * 1e3, 4),
        "torch_ms": round(torchs * 1e3, 4),
        "speedup": round(torchs / ours, 3),
        "TB_s": round(model.bytes / ours / 1e12, 3),
        "of_copy": round(of_copy, 3),
        "TFLOP_s": round(model.bytes * rows / ours / 1e12, 1),
    }
    if rows == 1:
        bar = BARS[model.name] * BARS_AT / machine.copy_bytes_s
        row |= {"bar_ms": round(bar, 3), "met": ours * 1e3 <= bar}
    if rows in FUSED_ROWS:
        residual = torch.randn(rows, model.head.shape[1], device="cuda", dtype=torch.bfloat16)
        norm = ops.Norm(torch.ones_like(residual[0]), 1e-6)
        fused, apart = (
            graph_seconds([lambda ahead=ahead: fused_step(model, norm, residual, ahead)])  # type: ignore[misc]
            for ahead in (True, False)
        )
        row |= {"fused_ms": round(fused * 1e3, 4), "without_ahead_ms": round(apart * 1e3, 4)}
    if rows in DETERMINISTIC_ROWS:
        row |= {"deterministic_ms": round(deterministic_seconds(model, rows) * 1e3, 4)}
    if rows <= 16:
        row |= {"error": relative_error(model, rows)}
    return row


def sweep_of(model: Model, machine: Machine) -> Iterator[dict[str, object]]:
    """Shared memory of a block (so what is in flight), and kernels that overlap or do not."""
    for rows in (1, 8, 16):
        for limit in SHARED_LIMITS:
            for overlap in (True, False):
                _cuda.set_overlap(overlap)
                cuda_gemm.shared_limit = limit
                try:
                    each = graph_seconds([step(model, rows, ops.linear)])
                finally:
                    _cuda.set_overlap(True)
                    cuda_gemm.shared_limit = 0
                yield {
                    "shape": model.name,
                    "rows": rows,
                    "shared_kib": limit // 1024,
                    "overlap": overlap,
                    "ms": round(each * 1e3, 4),
                    "of_copy": round(model.bytes / each / machine.copy_bytes_s, 3),
                }


def gemm(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """A decode step's products for each model, by rows; or one kernel's settings."""
    for name in SHAPES:
        model = model_of(name)
        if sweep:
            yield from sweep_of(model, machine)
        else:
            yield tuning_of(model)
            for rows in ROWS:
                yield row_of(model, rows, machine)
        del model
        torch.cuda.empty_cache()
