"""What each operation means, in a few lines of torch: documentation, oracle and fallback.

Reductions are done in float32 and rounded to the tensor's type once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn import functional

from octavo_kernels.reference_batch import apply_updates as apply_updates
from octavo_kernels.reference_batch import build_inputs as build_inputs
from octavo_kernels.reference_batch import record_tokens as record_tokens
from octavo_kernels.reference_sampling import restart_marks as restart_marks
from octavo_kernels.reference_sampling import sample as sample
from octavo_kernels.reference_sampling import token_logprobs as token_logprobs

Function = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(slots=True, frozen=True)
class Variant:
    """What an attention does besides causal softmax; 0 and None are nothing.

    A query sees the last `window` tokens, its own included. `softcap` bounds the scores smoothly.
    `sinks` [heads] are scores that take their share of the softmax and give no value.
    """

    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None


PLAIN = Variant()


@dataclass(slots=True, frozen=True)
class Norm:
    """An RMS norm that something goes through first; see `rms_norm`."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(slots=True, frozen=True)
class Experts:
    """The weights of a mixture, of all experts one under the other: `gate_up` [experts * 2 * inner,
    hidden], of each all gates, then all ups, and `down` [experts * hidden, inner].

    Of a token's `top_k` experts the weights sum to one where they are `normalized`. Gate and up
    become function(gate) * up, or, with a `swiglu_limit`, gate * sigmoid(alpha * gate) * (up + 1)
    after both were cut off there.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    top_k: int
    normalized: bool
    function: Function = "silu"
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0


@dataclass(slots=True, frozen=True)
class HeadNorm:
    """An RMS norm of each head of the queries and of the keys: weights [dim]; see `rms_norm`."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float
    offset: float = 0.0


@dataclass(slots=True, frozen=True)
class Rotation:
    """Rotary position embedding of some tokens; see `rope`."""

    positions: torch.Tensor
    cos_sin: torch.Tensor
    interleaved: bool = False


_FUNCTIONS: dict[Function, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    variant: Variant,
    *_hints: object,
) -> torch.Tensor:
    """Causal attention of each sequence's newest queries over its paged keys and values.

    Sequence s owns rows query_start[s]..query_start[s+1] of `query`; the last of them stands at
    position seq_lens[s] - 1. Entries of a block table beyond the sequence's length, and cache
    slots that no sequence owns, are never read; nor are those that lie behind all windows.
    """
    window, softcap, sinks = variant.window, variant.softcap, variant.sinks
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block_size, kv_heads = key_cache.shape[1:3]
    queries, tables = query.float().unflatten(1, (kv_heads, -1)), block_tables.long()
    bounds = torch.cat((query_start, seq_lens)).tolist()  # the host waits for a device once
    starts, lengths = bounds[: len(query_start)], bounds[len(query_start) :]
    for s, length in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        first = length - (end - begin)
        behind = max(0, first + 1 - window) // block_size * block_size if window else 0
        table = tables[s, behind // block_size : -(-length // block_size)]
        keys = key_cache[table].flatten(0, 1)[: length - behind].float()
        values = value_cache[table].flatten(0, 1)[: length - behind].float()
        scores = torch.einsum("qhgd,khd->hgqk", queries[begin:end], keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if end - begin > 1 or window:
            position = torch.arange(first, length, device=query.device)[:, None]
            of_key = torch.arange(behind, length, device=query.device)[None, :]
            unseen = of_key > position
            if window:
                unseen |= of_key <= position - window
                values = values.masked_fill(unseen.all(0)[:, None, None], 0)
            scores = scores.masked_fill(unseen, float("-inf"))
        if sinks is not None:
            column = sinks.view(kv_heads, -1, 1, 1).expand(-1, -1, end - begin, 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(dim=-1)[..., : length - behind]
        out[begin:end] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2)
    return out


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store each token at its slot, block * block_size + offset; slot -1 stores nothing."""
    kept = (slots >= 0).nonzero()[:, 0]
    at = slots[kept].long()
    key_cache.flatten(0, 1)[at] = key[kept]
    value_cache.flatten(0, 1)[at] = value[kept]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    offset: float,
) -> torch.Tensor:
    """Root-mean-square norm of each row; with `residual`, of residual + x, which it becomes.

    Without an offset to the weight the normed row is rounded before the weight is applied, with
    one only after: as the models that have it were trained.
    """
    if residual is not None:
        residual += x
        x = residual
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if offset:
        return (scaled * (offset + weight.float())).to(x.dtype)
    return scaled.to(x.dtype) * weight


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Layer norm of each row; with `residual`, of residual + x, which it becomes."""
    if residual is not None:
        residual += x
        x = residual
    wide_bias = None if bias is None else bias.float()
    normed = functional.layer_norm(x.float(), x.shape[-1:], weight.float(), wide_bias, eps)
    return normed.to(x.dtype)


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
) -> None:
    """Rotate the first elements of each head, as many as `cos_sin` has columns, in place.

    Row p of `cos_sin` holds the cosines of position p, then its sines. Of n elements number i
    pairs with i + n/2, or, `interleaved`, 2i with 2i + 1.
    """
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    for tensor in (query, key):
        turning = tensor[..., : 2 * half]
        low, high = (
            (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
        )
        a, b = low.float(), high.float()
        turned = a * cos - b * sin, b * cos + a * sin
        low.copy_(turned[0])
        high.copy_(turned[1])


def act(x: torch.Tensor, function: Function) -> torch.Tensor:
    """The function of each element; "gelu" is the exact one, "gelu_tanh" its approximation."""
    return _FUNCTIONS[function](x.float()).to(x.dtype)


def act_and_mul(x: torch.Tensor, function: Function) -> torch.Tensor:
    """function(left half) * right half of each row."""
    gate, up = x.float().chunk(2, dim=-1)
    return (_FUNCTIONS[function](gate) * up).to(x.dtype)


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """In every plane (a layer's keys or values) copy block pair[0] over block pair[1], in order."""
    for source, destination in pairs.tolist():
        cache[:, destination] = cache[:, source]


def swap_blocks(
    cache: torch.Tensor, host: torch.Tensor, pairs: torch.Tensor, direction: Literal["out", "in"]
) -> None:
    """Copy block pair[0] of one to block pair[1] of the other, all planes of a block at once.

    "out" is from `cache` [planes, blocks, ...] to `host` [host_blocks, planes, ...], "in" back.
    The order is open: no block may be named twice.
    """
    for source, destination in pairs.tolist():
        if direction == "out":
            host[destination].copy_(cache[:, source])
        else:
            cache[:, destination].copy_(host[source])


def embed(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None,
    position_table: torch.Tensor | None,
) -> torch.Tensor:
    """The table's row of each token times `scale`, plus the position's row where there is one.

    An id below 0 stands for no token, and its row is zeros: what a failed draw left behind.
    """
    x = functional.embedding(token_ids.clamp(min=0), table)
    x = x.masked_fill((token_ids < 0)[:, None], 0)
    if scale != 1.0:
        x = x * torch.tensor(scale, dtype=x.dtype)
    if positions is not None and position_table is not None:
        x = x + functional.embedding(positions, position_table)
    return x
