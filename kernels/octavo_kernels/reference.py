"""What each operation means, in a few lines of torch: documentation, oracle and fallback.

Reductions are done in float32 and rounded to the tensor's type once, at the end.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of each sequence's newest queries over its paged keys and values.

    Sequence s owns rows query_start[s]..query_start[s+1] of `query`; the last of them stands at
    position seq_lens[s] - 1. Entries of a block table beyond the sequence's length, and cache
    slots that no sequence owns, are never read.
    """
    block_size = key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for s, length in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        table = block_tables[s, : -(-length // block_size)].long()
        keys = key_cache[table].flatten(0, 1)[:length].float()
        values = value_cache[table].flatten(0, 1)[:length].float()
        q = query[begin:end].float()
        scores = torch.einsum("qhd,khd->hqk", q, keys.repeat_interleave(group, dim=1)) * scale
        position = torch.arange(length - (end - begin), length, device=query.device)
        future = torch.arange(length, device=query.device)[None, :] > position[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, dim=1))
        out[begin:end] = mixed.to(out.dtype)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store each token at its slot, block * block_size + offset; slot -1 stores nothing."""
    kept = slots >= 0
    at = slots[kept].long()
    key_cache.flatten(0, 1)[at] = key[kept]
    value_cache.flatten(0, 1)[at] = value[kept]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Root-mean-square norm of each row; with `residual`, of residual + x, which it becomes."""
    if residual is not None:
        residual += x
        x = residual
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    out.copy_(scaled.to(x.dtype) * weight)


def rope(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> None:
    """Rotate query and key in place, neox style: element i pairs with element i + dim/2.

    Row p of `cos_sin` holds the cosines of position p, then its sines, dim/2 of each.
    """
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    for tensor in (query, key):
        low, high = tensor.float().chunk(2, dim=-1)
        tensor.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))


def silu_and_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """silu(left half) * right half of each row."""
    gate, up = x.float().chunk(2, dim=-1)
    out.copy_(silu(gate) * up)


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """In every plane (a layer's keys or values) copy block pair[0] over block pair[1], in order."""
    for source, destination in pairs.tolist():
        cache[:, destination] = cache[:, source]
