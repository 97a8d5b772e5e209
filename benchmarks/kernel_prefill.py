"""Prefill attention: operations a second of our kernel and of torch's libraries, side by side.

A chunk of `q` queries stands after `prefix` cached tokens. Operations are those of the causal
triangle alone. `library` is torch's flash attention on dense keys and values, `gathered` the same
with the copy out of the pages, `cudnn` torch's cuDNN attention (without a prefix: its causal mask
begins with the first key). Every contender's result is compared with float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from kernel_timing import Machine, graph_seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from octavo_kernels.attention_settings import MIN_SPAN, PrefillSetting
from octavo_kernels.cuda_prefill import PrefillPlan, plan_prefill
from octavo_kernels.reference import PLAIN

BLOCK_SIZE = 16
CACHES = 3  # in turn, so that the L2 cache holds less of the next one
SHAPES = ((32, 8, 128), (16, 8, 128), (32, 8, 64), (16, 8, 256))  # heads, KV heads, dim
CHUNKS = (16, 64, 256, 1024, 2048, 8192)
PREFIXES = (0, 2048, 8192)
SPANS = (0, 256, 512, 1024, 2048)  # least keys of a span; 0: unsplit


@dataclass(frozen=True)
class Problem:
    """One sequence: a chunk after its prefix, in pages and dense."""

    q: int
    prefix: int
    query: torch.Tensor
    caches: list[torch.Tensor]
    table: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def operations(self) -> float:
        heads, dim = self.query.shape[1:]
        return 4.0 * heads * dim * (self.q * self.prefix + self.q * (self.q + 1) / 2)


def make(q: int, prefix: int, heads: int, kv_heads: int, dim: int) -> Problem:
    total = q + prefix
    blocks = -(-total // BLOCK_SIZE)
    table = torch.randperm(blocks, device="cuda")
    at = torch.arange(total, device="cuda")
    shape = (2, blocks, BLOCK_SIZE, kv_heads, dim)
    return Problem(
        q,
        prefix,
        torch.randn(q, heads, dim, dtype=torch.bfloat16, device="cuda"),
        [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(CACHES)],
        table.to(torch.int32)[None],
        table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE,
        torch.tensor([0, q], dtype=torch.int32, device="cuda"),
        torch.tensor([total], dtype=torch.int32, device="cuda"),
    )


def plan_of(problem: Problem, min_span: int, warpgroups: bool) -> PrefillPlan:
    """Made beforehand, as a step makes one for all its layers."""
    heads, dim = problem.query.shape[1:]
    return plan_prefill(
        problem.query_start,
        problem.seq_lens,
        tokens=problem.q,
        heads=heads,
        kv_heads=problem.caches[0].shape[3],
        dim=dim,
        max_query_len=problem.q,
        setting=PrefillSetting(min_span, warpgroups),
    )


def own(problem: Problem, plan: PrefillPlan) -> Callable[[torch.Tensor], torch.Tensor]:
    scale = problem.query.shape[2] ** -0.5
    out = torch.empty_like(problem.query)

    def attend(cache: torch.Tensor) -> torch.Tensor:
        plan.attend(problem.query, cache[0], cache[1], problem.table, scale, PLAIN, out)
        return out

    return attend


def library(problem: Problem, gather: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's flash attention; its causal mask ends with the last query and the last key."""
    total = problem.q + problem.prefix
    key_start = torch.tensor([0, total], dtype=torch.int32, device="cuda")
    dense = [cache.flatten(1, 2)[:, problem.slots] for cache in problem.caches]
    known = {id(cache): kv for cache, kv in zip(problem.caches, dense, strict=True)}

    def attend(cache: torch.Tensor) -> torch.Tensor:
        kv = cache.flatten(1, 2)[:, problem.slots] if gather else known[id(cache)]
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            problem.query, kv[0], kv[1], problem.query_start, key_start, problem.q, total, 0.0,
            True, False, scale=problem.query.shape[2] ** -0.5,
        )[0]  # fmt: skip
        return out

    return attend


def cudnn(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    dense = [cache.flatten(1, 2)[:, problem.slots] for cache in problem.caches]
    known = {id(cache): kv for cache, kv in zip(problem.caches, dense, strict=True)}

    def attend(cache: torch.Tensor) -> torch.Tensor:
        query, (key, value) = problem.query, known[id(cache)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            mixed = scaled_dot_product_attention(
                query.transpose(0, 1)[None], key.transpose(0, 1)[None],
                value.transpose(0, 1)[None], is_causal=True, enable_gqa=True,
            )  # fmt: skip
        return mixed[0].transpose(0, 1)

    return attend


def exact(problem: Problem, rows: slice) -> torch.Tensor:
    """Some rows of the result over the first cache, in float64."""
    keys, values = problem.caches[0].flatten(1, 2)[:, problem.slots].double()
    group = problem.query.shape[1] // keys.shape[1]
    position = torch.arange(problem.q, device="cuda")[rows, None] + problem.prefix
    scores = torch.einsum(
        "qhd,khd->hqk", problem.query[rows].double(), keys.repeat_interleave(group, dim=1)
    )
    unseen = torch.arange(len(keys), device="cuda")[None] > position
    weights = (scores * problem.query.shape[2] ** -0.5).masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, dim=1))


def check(name: str, got: torch.Tensor, problem: Problem) -> None:
    for rows in (slice(0, 8), slice(problem.q - 8, problem.q)):
        wanted = exact(problem, rows)
        error = float((got[rows].double() - wanted).norm() / wanted.norm())
        if not error < 1e-2:
            raise SystemExit(
                f"{name} is wrong: relative error {error} at q={problem.q}, "
                f"prefix={problem.prefix}, rows {rows}"
            )


def seconds(attend: Callable[[torch.Tensor], torch.Tensor], problem: Problem) -> float:
    rounds = 4 if problem.operations < 1e11 else 1
    return graph_seconds([partial(attend, cache) for cache in problem.caches] * rounds)


def measure(problem: Problem, spans: tuple[int, ...], machine: Machine) -> dict[str, object]:
    """TFLOP/s of each contender; a library that does not take the shape says why."""
    contenders = {"library": library(problem, False), "gathered": library(problem, True)}
    if problem.prefix == 0:
        contenders["cudnn"] = cudnn(problem)
    for name, warpgroups in (("own", False), ("warpgroups", True)):
        for span in spans:
            plan = plan_of(problem, span, warpgroups)
            label = f"{name}, spans of {span}" if span else f"{name}, unsplit"
            if plan.warpgroups == warpgroups and plan.splits == (span > 0):
                contenders[label] = own(problem, plan)
    found: dict[str, object] = {
        "least_us": round(problem.operations / machine.product_flop_s * 1e6, 1)
    }
    for name, attend in contenders.items():
        try:
            got = attend(problem.caches[0])
        except RuntimeError as error:
            if name.startswith(("own", "warpgroups")):
                raise
            found[name] = str(error).splitlines()[0][:80]
            continue
        check(name, got, problem)
        took = seconds(attend, problem)
        found[name] = {
            "us": round(took * 1e6, 1),
            "TFLOP_s": round(problem.operations / took / 1e12, 1),
        }
    return found


def prefill(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """Each shape with and without a prefix; `sweep` adds head dims and lengths of spans."""
    torch.manual_seed(0)
    for heads, kv_heads, dim in SHAPES if sweep else SHAPES[:1]:
        for q in CHUNKS:
            for prefix in PREFIXES:
                problem = make(q, prefix, heads, kv_heads, dim)
                row = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "q": q, "prefix": prefix}
                # Long chunks fill the device without spans.
                spans = SPANS if sweep and q <= 1024 else (0, MIN_SPAN)
                yield row | measure(problem, spans, machine)
