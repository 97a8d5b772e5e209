"""Queries, keys and values between their projection and attention, in one pass where a kernel can.

`HeadNorm` and `Rotation` say what is done to each head; either may be absent.
"""

from __future__ import annotations

import torch

from octavo_kernels.dispatch import run
from octavo_kernels.match import Arg, checks, match
from octavo_kernels.reference import HeadNorm, Rotation

__all__ = ["HeadNorm", "Rotation", "qk_norm_rope_write"]


def qk_norm_rope_write(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    norm: HeadNorm | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """The queries [tokens, heads, dim] of a fused projection; keys and values go to their slots.

    A row of `qkv` holds a token's queries, keys and values, and may be overwritten. Queries and
    keys are normed, then rotated; slot -1 stores nothing. In terms of simpler operations:
    rms_norm over each head, rope, write_kv.
    """
    if checks.on:
        _check(qkv, key_cache, value_cache, slots, norm, rotation)
    args = (qkv, key_cache, value_cache, slots, norm, rotation)
    query: torch.Tensor = run("qk_norm_rope_write", qkv, *args, composed=_qk_norm_rope_write)
    return query


def _check(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    norm: HeadNorm | None,
    rotation: Rotation | None,
) -> None:
    op = "qk_norm_rope_write"
    args = [
        Arg("qkv", qkv, "tokens width", rows=True),
        Arg("key_cache", key_cache, "blocks block_size kv_heads dim"),
        Arg("value_cache", value_cache, "blocks block_size kv_heads dim"),
        Arg("slots", slots, "tokens", torch.int64),
    ]
    if norm is not None:
        args += [Arg("norm.query", norm.query, "dim"), Arg("norm.key", norm.key, "dim")]
    if rotation is not None:
        args += [
            Arg("rotation.positions", rotation.positions, "tokens", torch.int64),
            Arg("rotation.cos_sin", rotation.cos_sin, "max_positions rotary", torch.float32),
        ]
    size = match(op, *args)
    if size["width"] % size["dim"] != 0 or size["width"] <= 2 * size["kv_heads"] * size["dim"]:
        raise ValueError(
            f"{op}: qkv has rows of {size['width']} elements, which are not queries, keys and "
            f"values of {size['kv_heads']} KV heads of {size['dim']} elements"
        )
    if rotation is not None:
        check_rotary(op, size)


def check_rotary(op: str, size: dict[str, int]) -> None:
    """Refuse a table of cosines and sines that turns more than there is."""
    if size["rotary"] % 2 != 0 or size["rotary"] > size["dim"]:
        raise ValueError(
            f"{op}: cos_sin turns {size['rotary']} elements of a head; that must be even and at "
            f"most the {size['dim']} of query"
        )


def _qk_norm_rope_write(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    norm: HeadNorm | None,
    rotation: Rotation | None,
) -> torch.Tensor:
    kv_heads, dim = key_cache.shape[2:]
    by_head = qkv.view(qkv.shape[0], -1, dim)
    heads = by_head.shape[1] - 2 * kv_heads
    query, key, value = torch.split(by_head, [heads, kv_heads, kv_heads], dim=1)
    if norm is not None:
        query = _normed(query, norm.query, norm)
        key = _normed(key, norm.key, norm)
    if rotation is not None:
        turn = rotation.positions, rotation.cos_sin, rotation.interleaved
        run("rope", query, query, key, *turn)
    run("write_kv", key, key, value, key_cache, value_cache, slots)
    return query


def _normed(x: torch.Tensor, weight: torch.Tensor, norm: HeadNorm) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    normed: torch.Tensor = run("rms_norm", rows, rows, weight, norm.eps, None, norm.offset)
    return normed.view(x.shape)
