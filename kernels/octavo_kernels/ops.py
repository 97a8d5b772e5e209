"""The operations of the engine: check the tensors, then let the device's back end do it.

Errors name the operation and the argument. What each operation means is in `reference.py`.
"""

from __future__ import annotations

from typing import Literal

import torch

from octavo_kernels.attention import AttentionWork, attention_work, paged_attention, plan_attention
from octavo_kernels.dispatch import (
    calls,
    device_report,
    forced,
    forced_instruction_set,
    implementation,
    implementations,
    instruction_sets,
    run,
)
from octavo_kernels.experts import Experts, mixture
from octavo_kernels.heads import HeadNorm, Rotation, check_rotary, qk_norm_rope_write
from octavo_kernels.layers import (
    DecoderLayer,
    Ends,
    LayerStack,
    decode_layers,
    decode_logits,
    layer_stack,
)
from octavo_kernels.match import Arg, checks, match, unchecked
from octavo_kernels.products import (
    deterministic,
    gated_linear,
    keep_tuning,
    linear,
    linear_add,
    tune_products,
)
from octavo_kernels.reference import PLAIN, Function, Norm, Variant
from octavo_kernels.sampling import sample, token_logprobs

__all__ = [
    "PLAIN", "AttentionWork", "DecoderLayer", "Ends", "Experts", "Function", "HeadNorm",
    "LayerStack", "Norm", "Rotation", "Variant", "act", "act_and_mul", "attention_work", "calls",
    "copy_blocks", "decode_layers", "decode_logits", "deterministic", "device_report", "embed",
    "forced", "forced_instruction_set", "gated_linear", "implementation", "implementations",
    "instruction_sets", "keep_tuning", "layer_norm", "layer_stack", "linear", "linear_add",
    "mixture", "paged_attention", "plan_attention", "qk_norm_rope_write", "rms_norm", "rope",
    "sample", "swap_blocks", "token_logprobs", "tune_products", "unchecked", "write_kv",
]  # fmt: skip


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store keys and values at their slots, -1 stores nothing; see `reference.write_kv`."""
    match(
        "write_kv",
        Arg("key", key, "tokens kv_heads dim", rows=True),
        Arg("value", value, "tokens kv_heads dim", rows=True),
        Arg("key_cache", key_cache, "blocks block_size kv_heads dim"),
        Arg("value_cache", value_cache, "blocks block_size kv_heads dim"),
        Arg("slots", slots, "tokens", torch.int64),
    )
    run("write_kv", key, key, value, key_cache, value_cache, slots)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
) -> torch.Tensor:
    """Norm of x, or of residual + x, which `residual` then holds; see `reference.rms_norm`."""
    if checks.on:
        _match_norm("rms_norm", x, weight=weight, residual=residual)
    out: torch.Tensor = run("rms_norm", x, x, weight, eps, residual, offset)
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Layer norm of x, or of residual + x, which `residual` then holds."""
    if checks.on:
        _match_norm("layer_norm", x, weight=weight, bias=bias, residual=residual)
    out: torch.Tensor = run("layer_norm", x, x, weight, bias, eps, residual)
    return out


def _match_norm(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    shapes = {"weight": "width", "bias": "width", "residual": "tokens width"}
    given = [Arg(name, t, shapes[name]) for name, t in others.items() if t is not None]
    match(op, Arg("x", x, "tokens width"), *given)


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate query and key in place by the table's row of each position; see `reference.rope`."""
    size = match(
        "rope",
        Arg("query", query, "tokens heads dim", rows=True),
        Arg("key", key, "tokens kv_heads dim", rows=True),
        Arg("positions", positions, "tokens", torch.int64),
        Arg("cos_sin", cos_sin, "max_positions rotary", torch.float32),
    )
    check_rotary("rope", size)
    run("rope", query, query, key, positions, cos_sin, interleaved)


def act(x: torch.Tensor, function: Function) -> torch.Tensor:
    """The function of each element."""
    if checks.on:
        match("act", Arg("x", x, "tokens width"))
    out: torch.Tensor = run("act", x, x, function)
    return out


def act_and_mul(x: torch.Tensor, function: Function) -> torch.Tensor:
    """function(left half) * right half of each row; see `reference.act_and_mul`."""
    if checks.on:
        width = match("act_and_mul", Arg("x", x, "tokens 2*width"))["2*width"]
        if width % 2 != 0:
            raise ValueError(f"act_and_mul: x has an odd width, {width}")
    out: torch.Tensor = run("act_and_mul", x, x, function)
    return out


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy whole blocks in every plane of the cache, in order; see `reference.copy_blocks`."""
    _match_copies("copy_blocks", cache, pairs)
    run("copy_blocks", pairs, cache, pairs)  # of elements of any type


def swap_blocks(
    cache: torch.Tensor, host: torch.Tensor, pairs: torch.Tensor, direction: Literal["out", "in"]
) -> None:
    """Copy whole blocks from the cache to host memory or back; see `reference.swap_blocks`.

    `host` is pinned where the cache is on a GPU, or the copy runs on torch.
    """
    blocks = "host_blocks planes block_size kv_heads dim"
    _match_copies("swap_blocks", cache, pairs, Arg("host", host, blocks, on_host=True))
    run("swap_blocks", pairs, cache, host, pairs, direction)


def _match_copies(op: str, cache: torch.Tensor, pairs: torch.Tensor, *others: Arg) -> None:
    size = match(
        op,
        Arg("cache", cache, "planes blocks block_size kv_heads dim"),
        Arg("pairs", pairs, "pairs two", torch.int64),
        *others,
    )
    if size["two"] != 2:
        raise ValueError(f"{op}: pairs must be [pairs, 2], got {tuple(pairs.shape)}")


def embed(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    *,
    scale: float = 1.0,
    positions: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The table's rows of the tokens, scaled, plus rows of their positions; see `reference`."""
    args = [
        Arg("table", table, "vocabulary width"),
        Arg("token_ids", token_ids, "tokens", torch.int64),
    ]
    if positions is not None and position_table is not None:
        args += [
            Arg("positions", positions, "tokens", torch.int64),
            Arg("position_table", position_table, "max_positions width"),
        ]
    match("embed", *args)
    x: torch.Tensor = run("embed", table, token_ids, table, scale, positions, position_table)
    return x
