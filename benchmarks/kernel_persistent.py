"""All layers of a decode step in one kernel: its time by rows and context, beside reading all that
it reads once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_gemm import Model, model_of
from kernel_timing import Machine, graph_seconds

from octavo.bench.workloads import SHAPES
from octavo_kernels import ops

ROWS = (1, 2, 4, 8)
CONTEXTS = (1, 600, 5000)
BLOCK_SIZE = 16
IN_A_ROW = 4  # steps of a replay


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
    kept.append(table)
    heads = config["num_attention_heads"]
    return ops.layer_stack(
        layers, heads=heads, function="silu", norm_eps=1e-6, norm_offset=0.0, scale=dim**-0.5,
        cos_sin=table,
    )  # fmt: skip


# A stack has its tensors' addresses only.
kept: list[torch.Tensor] = []


def persistent(machine: Machine, sweep: bool) -> Iterator[dict[str, object]]:
    """Each model by rows and context; `sweep` changes nothing."""
    del sweep
    for name, config in SHAPES.items():
        model = model_of(name)
        kv_heads, dim = config["num_key_value_heads"], config["head_dim"]
        width = -(-max(CONTEXTS) // BLOCK_SIZE)
        shape = (len(model.layers), 2, max(ROWS) * width, BLOCK_SIZE, kv_heads, dim)
        cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        stack = stack_of(model, cache)
        for rows in ROWS if stack is not None else ():
            for context in CONTEXTS if rows <= stack.rows else ():
                yield row_of(model, stack, rows, context, machine, cache)
        del stack, cache, model
        kept.clear()
        torch.cuda.empty_cache()


def row_of(
    model: Model,
    stack: ops.LayerStack,
    rows: int,
    context: int,
    machine: Machine,
    cache: torch.Tensor,
) -> dict[str, object]:
    order = torch.randperm(cache.shape[2], device="cuda").int()
    width = -(-context // BLOCK_SIZE)
    tables = order[: rows * width].view(rows, width).contiguous()
    positions = torch.full((rows,), context - 1, device="cuda")
    slots = tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    residual = torch.randn(rows, model.head.shape[1], device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        ops.decode_layers(stack, residual, positions, slots, lengths, tables)

    each = graph_seconds([run] * IN_A_ROW)
    of_cache = cache[:, :, 0, 0].nbytes * rows * context
    read = model.bytes - model.head.nbytes + of_cache
    return {
        "shape": model.name,
        "rows": rows,
        "context": context,
        "ms": round(each * 1e3, 4),
        "us_a_layer": round(each * 1e6 / len(model.layers), 2),
        "TB_s": round(read / each / 1e12, 3),
        "of_copy": round(read / each / machine.copy_bytes_s, 3),
    }
