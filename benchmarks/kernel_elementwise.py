"""Norms, activations and heads of one layer by rows, and copies of blocks, beside bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernel_timing import Machine, graph_seconds, rotations

from octavo.bench.workloads import SHAPES
from octavo_kernels import ops

ROWS = (1, 64, 256, 2048, 8192)
BLOCK_SIZE = 16
BLOCKS = 1024


def elementwise(machine: Machine, _sweep: bool) -> Iterator[dict[str, object]]:
    """`share` is of copy bandwidth; at few rows a launch's time is all there is."""
    for shape in ("llama-8b", "qwen3-0.6b"):
        for rows in ROWS:
            for op, (bytes_, make) in _layer(shape, rows).items():
                calls = [make() for _ in range(rotations(bytes_))]
                seconds = graph_seconds(calls * 4)
                yield {
                    "op": op, "shape": shape, "rows": rows, "us": round(seconds * 1e6, 2),
                    "share": round(bytes_ / seconds / machine.copy_bytes_s, 3),
                }  # fmt: skip
    yield from _copies(machine)


Call = Callable[[], object]


def _layer(shape: str, rows: int) -> dict[str, tuple[int, Callable[[], Call]]]:
    """For each operation the bytes that it must move, and a maker of calls on buffers of their own.

    The KV cache, the weights and the table of angles are shared by all calls.
    """
    config = SHAPES[shape]
    hidden, inner, dim = (
        config["hidden_size"], config["intermediate_size"], config["head_dim"]
    )  # fmt: skip
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    weight, head_weight = noise(hidden), noise(dim)
    cache = torch.zeros(2, BLOCKS, BLOCK_SIZE, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(rows, dim, device="cuda")
    positions = torch.arange(rows, device="cuda")
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, device="cuda")[:rows]
    head_norm = ops.HeadNorm(head_weight, head_weight, 1e-6) if shape.startswith("qwen3") else None
    rotation = ops.Rotation(positions, angles)

    def norm() -> Call:
        x, residual = noise(rows, hidden), noise(rows, hidden)
        return lambda: ops.rms_norm(x, weight, 1e-5, residual)

    def gate() -> Call:
        x = noise(rows, 2 * inner)
        return lambda: ops.act_and_mul(x, "silu")

    def store() -> Call:
        qkv = noise(rows, (heads + 2 * kv_heads) * dim)
        return lambda: ops.qk_norm_rope_write(qkv, cache[0], cache[1], slots, head_norm, rotation)

    qkv_bytes = 2 * rows * (heads + 2 * kv_heads) * dim
    return {
        "rms_norm+residual": (4 * 2 * rows * hidden, norm),
        "act_and_mul": (3 * 2 * rows * inner, gate),
        "qk_norm_rope_write": (2 * qkv_bytes + 4 * rows * dim, store),
    }


def _copies(machine: Machine) -> Iterator[dict[str, object]]:
    """Blocks of llama-8b: 64 planes of 32 KiB."""
    count = 256
    cache = torch.zeros(64, BLOCKS, BLOCK_SIZE, 8, 128, device="cuda", dtype=torch.bfloat16)
    host = torch.zeros(
        count, *cache.shape[:1], *cache.shape[2:], dtype=cache.dtype, pin_memory=True
    )
    order = torch.randperm(BLOCKS, device="cuda")[: 2 * count]
    there = torch.stack((order[:count], torch.arange(count, device="cuda")), dim=1)
    back = there.flip(1).contiguous()
    moved = count * cache[:, 0].numel() * cache.element_size()
    for op, factor, call in (
        ("copy_blocks", 2, lambda: ops.copy_blocks(cache, order.view(count, 2))),
        ("swap_blocks out", 1, lambda: ops.swap_blocks(cache, host, there, "out")),
        ("swap_blocks in", 1, lambda: ops.swap_blocks(cache, host, back, "in")),
    ):
        seconds = graph_seconds([call] * 2)
        yield {
            "op": op, "blocks": count, "us": round(seconds * 1e6, 1),
            "GB_s": round(factor * moved / seconds / 1e9, 1),
            "share": round(factor * moved / seconds / machine.copy_bytes_s, 3),
        }  # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    """Random, and there when this returns: weights are read ahead of the stream."""
    made = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    return made
