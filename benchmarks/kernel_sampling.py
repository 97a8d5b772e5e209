"""Draws and log-probabilities: times of whole batches, beside the time to read their logits.

Flat logits are what random weights give, and the worst case for a draw; "model" ones are as
language models have them, a few tokens with most of the probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from kernel_timing import Machine, graph_seconds, rotations

from octavo_kernels import ops, sampling

QWEN, LLAMA = 151936, 128256
LOGITS = ("model", "flat")


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    bar: float | None = None  # times the reading of the logits


KINDS = [
    Kind("greedy", temperature=0.0, bar=1.15),
    Kind("temperature", bar=1.15),
    Kind("temperature 0.6", temperature=0.6, bar=1.15),
    Kind("top-k 50", top_k=50),
    Kind("top-p 0.9", top_p=0.9),
    Kind("top-k 20, top-p 0.95", temperature=0.6, top_k=20, top_p=0.95),
    Kind("min-p 0.05", min_p=0.05),
]


def rows_of(kind: str, rows: int, vocab: int, seed: int) -> torch.Tensor:
    random = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn((rows, vocab), generator=random, device="cuda")
    if kind == "model":
        order = torch.randperm(vocab, generator=random, device="cuda")
        logits = 1.5 * logits + 20 - 1.5 * torch.log1p(order)
    return logits.to(torch.bfloat16)


def sampling_of(kind: Kind, rows: int) -> sampling.Sampling:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    return sampling.Sampling(
        temperature=full(kind.temperature, torch.float32),
        top_k=full(kind.top_k, torch.int32),
        top_p=full(kind.top_p, torch.float32),
        min_p=full(kind.min_p, torch.float32),
        stream=torch.randint(-(2**62), 2**62, (rows,), device="cuda"),
        count=full(7, torch.int64),
    )


def draws(machine: Machine, batch: int, vocab: int, logits: str) -> Iterator[dict[str, object]]:
    read = batch * vocab * 2 / machine.copy_bytes_s
    sets = [rows_of(logits, batch, vocab, s) for s in range(rotations(batch * vocab * 2, most=16))]
    for kind in KINDS:
        wanted = sampling_of(kind, batch)
        taken = graph_seconds([partial(ops.sample, x, wanted) for x in sets])
        row: dict[str, object] = {"batch": batch, "vocab": vocab, "logits": logits}
        row |= {
            "draw": kind.name,
            "us": round(taken * 1e6, 1),
            "of_reading": round(taken / read, 2),
        }
        if kind.bar is not None and batch >= 128:
            row["bar"] = kind.bar
        if batch == 1 and kind.bar is not None:
            row["bar_us"] = 5 if kind.temperature == 0 else 6
        yield row
    tokens = torch.zeros(batch, dtype=torch.int32, device="cuda")
    for top in (0, 20):
        wanted_top = torch.full((batch,), top, dtype=torch.int32, device="cuda")
        taken = graph_seconds(
            [partial(ops.token_logprobs, x, tokens, wanted_top, 20) for x in sets]
        )
        yield {
            "batch": batch, "vocab": vocab, "logits": logits, "logprobs": top,
            "us": round(taken * 1e6, 1), "of_reading": round(taken / read, 2),
        }  # fmt: skip


def sample(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """All kinds of draws; `sweep` adds batch sizes."""
    for batch in (1, 8, 32, 64, 128, 256, 512) if sweep else (1, 32, 256):
        for logits in LOGITS:
            yield from draws(machine, batch, QWEN, logits)
    yield from draws(machine, 256, LLAMA, "model")
