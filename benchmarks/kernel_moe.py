"""Mixtures of experts: a layer's time by tokens, beside reading the chosen experts' weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kernel_timing import Machine, graph_seconds, rotations

from octavo_kernels import ops

TOKENS = (1, 2, 8, 32, 128, 512, 2048, 8192)


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def bytes_of_one(self) -> int:
        return 3 * self.hidden * self.inner * 2


SHAPES = [
    Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
    Shape("mixtral-8x7b", 8, 2, 4096, 14336),
    Shape("gpt-oss-20b", 32, 4, 2880, 2880),
]


def experts_of(shape: Shape) -> ops.Experts:
    def noise(n: int, k: int) -> torch.Tensor:
        return torch.empty((n, k), device="cuda", dtype=torch.bfloat16).normal_(std=k**-0.5)

    return ops.Experts(
        gate_up=noise(shape.experts * 2 * shape.inner, shape.hidden),
        down=noise(shape.experts * shape.hidden, shape.inner),
        gate_up_bias=None,
        down_bias=None,
        top_k=shape.top_k,
        normalized=True,
    )


def error(x: torch.Tensor, logits: torch.Tensor, experts: ops.Experts) -> float:
    """Relative distance from one expert after the other in torch."""
    got = ops.mixture(x, logits, experts).double()
    with ops.forced("reference"):
        wanted = ops.mixture(x, logits, experts).double()
    return round(float((got - wanted).norm() / wanted.norm()), 5)


def moe(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """One layer; nothing to sweep."""
    del sweep
    for shape in SHAPES:
        layers = [experts_of(shape) for _ in range(rotations(shape.experts * shape.bytes_of_one))]
        for tokens in TOKENS:
            x = torch.randn((tokens, shape.hidden), device="cuda", dtype=torch.bfloat16)
            logits = torch.randn((tokens, shape.experts), device="cuda", dtype=torch.bfloat16)
            chosen = len(set(logits.topk(shape.top_k, dim=-1).indices.flatten().tolist()))
            with ops.forced("cuda"):
                each = graph_seconds(
                    [lambda of=of: ops.mixture(x, logits, of) for of in layers]  # type: ignore[misc]  # noqa: B023
                )
            read = chosen * shape.bytes_of_one
            yield {
                "shape": shape.name,
                "tokens": tokens,
                "experts_chosen": chosen,
                "us": round(each * 1e6, 1),
                "of_copy": round(read / each / machine.copy_bytes_s, 3),
                "TFLOP_s": round(tokens * shape.top_k * shape.bytes_of_one / each / 1e12, 1),
                "error": error(x[:64], logits[:64], layers[0]),
            }
        del layers
        torch.cuda.empty_cache()
