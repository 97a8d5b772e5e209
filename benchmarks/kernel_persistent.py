"""All layers of a decode step in one kernel, and all of the step: times by rows and context, beside
reading all that is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from kernel_gemm import Model, model_of
from kernel_timing import Machine, graph_seconds

from octavo.bench.workloads import SHAPES
from octavo_kernels import _cuda, ops

ROWS = (1, 2, 4, 8)
CONTEXTS = (1, 600, 5000)
BLOCK_SIZE = 16
IN_A_ROW = 4  # steps of a replay
EPS = 1e-6
# Stages under way, and the longest chunk that the copy engine brings.
AHEAD, ENGINE_TOKENS = (1, 2, 3, 5), (0, 64, 128, 1 << 20)


def stack_of(model: Model, cache: torch.Tensor) -> ops.LayerStack | None:
    config = SHAPES[model.name]
    dim, hidden = config["head_dim"], config["hidden_size"]

    def ones(width: int) -> torch.Tensor:
        return torch.ones(width, device="cuda", dtype=torch.bfloat16)

    table = torch.rand((max(CONTEXTS), dim), device="cuda")
    norms = {name: ones(dim) if "qwen3" in model.name else None for name in ("query", "key")}
    layers = [
        ops.DecoderLayer(
            *weights,
            ones(hidden),
            ones(hidden),
            norms["query"],
            norms["key"],
            *planes,
        )
        for weights, planes in zip(model.layers, cache, strict=True)
    ]
    kept.extend(tensor for layer in layers for tensor in layer.tensors() if tensor is not None)
    ends = ops.Ends(model.head, ones(hidden), model.head)
    kept.extend((table, *ends.tensors()))
    heads = config["num_attention_heads"]
    return ops.layer_stack(
        layers, heads=heads, function="silu", norm_eps=EPS, norm_offset=0.0, scale=dim**-0.5,
        cos_sin=table, ends=ends,
    )  # fmt: skip


# A stack has its tensors' addresses only.
kept: list[torch.Tensor] = []


def persistent(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """Each model by rows and context; `sweep` also asks memory in other ways."""
    for name, config in SHAPES.items():
        model = model_of(name)
        kv_heads, dim = config["num_key_value_heads"], config["head_dim"]
        width = -(-max(CONTEXTS) // BLOCK_SIZE)
        shape = (len(model.layers), 2, max(ROWS) * width, BLOCK_SIZE, kv_heads, dim)
        cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        stack = stack_of(model, cache)
        for rows in ROWS if stack is not None else ():
            for context in CONTEXTS if rows <= stack.rows else ():
                step = Step(model, stack, rows, context, cache)
                yield step.row(machine)
                if sweep:
                    yield from step.other_ways(machine)
        step = stack = cache = model = None
        kept.clear()
        torch.cuda.empty_cache()


class Step:
    """A decode of `rows` sequences of `context` tokens, in blocks scattered over the cache."""

    def __init__(
        self, model: Model, stack: ops.LayerStack, rows: int, context: int, cache: torch.Tensor
    ) -> None:
        self.model, self.stack, self.rows, self.context = model, stack, rows, context
        width = -(-context // BLOCK_SIZE)
        order = torch.randperm(cache.shape[2], device="cuda").int()
        tables = order[: rows * width].view(rows, width).contiguous()
        slots = tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
        self.where = torch.full((rows,), context - 1, device="cuda"), slots, lengths, tables
        vocab, hidden = model.head.shape
        self.residual = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        self.tokens = torch.arange(rows, device="cuda")
        self.logits = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.of_cache = cache[:, :, 0, 0].nbytes * rows * context

    def layers(self) -> None:
        """From residual to residual."""
        ops.decode_layers(self.stack, self.residual, *self.where)

    def whole(self) -> None:
        """From tokens to logits."""
        ops.decode_logits(self.stack, self.tokens, *self.where, self.logits)

    def in_parts(self) -> None:
        """The same by several kernels."""
        x = ops.embed(self.tokens, self.model.head)
        ops.decode_layers(self.stack, x, *self.where)
        ops.linear(ops.rms_norm(x, self.norm, EPS), self.model.head, out=self.logits)

    def row(self, machine: Machine, **more: int) -> dict[str, object]:
        """Times of all of them; shares are of the layers alone, and of the whole step."""
        runs: tuple[Callable[[], None], ...] = (self.layers, self.whole, self.in_parts)
        layers, whole, parts = (graph_seconds([run] * IN_A_ROW) for run in runs)
        of_layers = self.model.bytes - self.model.head.nbytes + self.of_cache
        of_whole = self.model.bytes + self.of_cache
        return {
            "shape": self.model.name,
            "rows": self.rows,
            "context": self.context,
            **more,
            "ms": round(layers * 1e3, 4),
            "us_a_layer": round(layers * 1e6 / len(self.model.layers), 2),
            "of_copy": round(of_layers / layers / machine.copy_bytes_s, 3),
            "whole_ms": round(whole * 1e3, 4),
            "in_parts_ms": round(parts * 1e3, 4),
            "whole_of_copy": round(of_whole / whole / machine.copy_bytes_s, 3),
        }

    def other_ways(self, machine: Machine) -> Iterator[dict[str, object]]:
        """The same with memory asked in other ways than by rule."""
        native = cast("_cuda.LayerStack", self.stack.native)
        usual = native.ahead, native.engine_tokens
        for ahead in AHEAD:
            native.ahead = ahead
            yield self.row(machine, ahead=ahead)
        native.ahead = usual[0]
        for engine_tokens in ENGINE_TOKENS:
            native.engine_tokens = engine_tokens
            yield self.row(machine, engine_tokens=engine_tokens)
        native.engine_tokens = usual[1]
