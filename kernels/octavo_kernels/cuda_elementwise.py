"""Norms, activations, embedding, heads and block copies on a GPU; shapes were matched.

The kernels take 16 bytes at a time: widths and strides are multiples of 8 elements.
"""

from __future__ import annotations

from typing import Literal

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import FUNCTIONS, Unserved, address, stream_of, type_code
from octavo_kernels.reference import Function, HeadNorm, Rotation

_PACK = 8  # elements in 16 bytes
_MAX_NORM_WIDTH = 16384
_MAX_HEAD_DIM = 256


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    offset: float,
) -> torch.Tensor:
    _require_width(x.shape[1], _MAX_NORM_WIDTH)
    _require_aligned(x, weight, residual)
    out = torch.empty_like(x)
    _cuda.rms_norm(
        dtype=type_code("rms_norm", x),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        residual=address(residual),
        out=out.data_ptr(),
        tokens=x.shape[0],
        width=x.shape[1],
        eps=eps,
        offset=offset,
        stream=stream_of(x),
    )
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    _require_width(x.shape[1], _MAX_NORM_WIDTH)
    _require_aligned(x, weight, bias, residual)
    out = torch.empty_like(x)
    _cuda.layer_norm(
        dtype=type_code("layer_norm", x),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=address(bias),
        residual=address(residual),
        out=out.data_ptr(),
        tokens=x.shape[0],
        width=x.shape[1],
        eps=eps,
        stream=stream_of(x),
    )
    return out


def act(x: torch.Tensor, function: Function) -> torch.Tensor:
    out = torch.empty_like(x)
    _activation("act", x, function, out)
    return out


def act_and_mul(x: torch.Tensor, function: Function) -> torch.Tensor:
    out = x.new_empty((x.shape[0], x.shape[1] // 2))
    _activation("act_and_mul", x, function, out)
    return out


def _activation(op: str, x: torch.Tensor, function: Function, out: torch.Tensor) -> None:
    _require_width(out.shape[1])
    _require_aligned(x)
    _cuda.activation(
        dtype=type_code(op, x),
        function=FUNCTIONS.index(function),
        gated=op == "act_and_mul",
        x=x.data_ptr(),
        out=out.data_ptr(),
        tokens=out.shape[0],
        width=out.shape[1],
        stream=stream_of(x),
    )


def embed(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    positions: torch.Tensor | None,
    position_table: torch.Tensor | None,
) -> torch.Tensor:
    _require_width(table.shape[1])
    _require_aligned(table, position_table)
    out = table.new_empty((token_ids.shape[0], table.shape[1]))
    _cuda.embed(
        dtype=type_code("embed", table),
        token_ids=token_ids.data_ptr(),
        table=table.data_ptr(),
        scale=scale,
        positions=address(positions),
        position_table=address(position_table),
        out=out.data_ptr(),
        tokens=token_ids.shape[0],
        vocabulary=table.shape[0],
        max_positions=0 if position_table is None else position_table.shape[0],
        width=table.shape[1],
        stream=stream_of(table),
    )
    return out


# Of heads.h's HeadGroup: from, from_stride, to, to_stride, weight, heads, rotated, at_slot.
_Group = tuple[int, int, int, int, int, int, bool, bool]


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
) -> None:
    _heads(
        query,
        [_in_place(query), _in_place(key)],
        rotation=Rotation(positions, cos_sin, interleaved),
    )


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    groups = [_to_cache(key, key_cache), _to_cache(value, value_cache)]
    _heads(key, groups, slots=slots, num_slots=key_cache.shape[0] * key_cache.shape[1])


def qk_norm_rope_write(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    norm: HeadNorm | None,
    rotation: Rotation | None,
) -> torch.Tensor:
    blocks, block_size, kv_heads, dim = key_cache.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query = qkv.new_empty((qkv.shape[0], heads, dim))
    of_query, of_key = (0, 0) if norm is None else (norm.query.data_ptr(), norm.key.data_ptr())
    turns = rotation is not None
    row, of_head = qkv.stride(0), dim * qkv.element_size()
    q = qkv.data_ptr()
    k = q + heads * of_head
    v = k + kv_heads * of_head
    slot, keys, values = kv_heads * dim, key_cache.data_ptr(), value_cache.data_ptr()
    groups = [
        (q, row, query.data_ptr(), heads * dim, of_query, heads, turns, False),
        (k, row, keys, slot, of_key, kv_heads, turns, True),
        (v, row, values, slot, 0, kv_heads, False, True),
    ]
    _heads(qkv, groups, norm, rotation, slots, blocks * block_size, dim=dim)
    return query


def _heads(
    like: torch.Tensor,
    groups: list[_Group],
    norm: HeadNorm | None = None,
    rotation: Rotation | None = None,
    slots: torch.Tensor | None = None,
    num_slots: int = 0,
    *,
    dim: int | None = None,
) -> None:
    dim = like.shape[-1] if dim is None else dim
    _require_width(dim, _MAX_HEAD_DIM)
    cos_sin = None if rotation is None else rotation.cos_sin
    rotary = 0 if cos_sin is None else cos_sin.shape[1]
    interleaved = rotation is not None and rotation.interleaved
    step = _PACK if interleaved else 2 * _PACK
    if rotary % step != 0:
        raise Unserved(f"its kernel turns a multiple of {step} elements of a head, not {rotary}")
    for start, row, to, to_row, weight, *_ in groups:
        if (start | to | weight) % 16 or (row | to_row) % _PACK:
            raise Unserved("its kernel needs weights and rows that are aligned to 16 bytes")
    _cuda.heads(
        dtype=type_code("heads", like),
        groups=groups,
        tokens=like.shape[0],
        dim=dim,
        eps=0.0 if norm is None else norm.eps,
        offset=0.0 if norm is None else norm.offset,
        positions=0 if rotation is None else rotation.positions.data_ptr(),
        cos_sin=address(cos_sin),
        max_positions=0 if cos_sin is None else cos_sin.shape[0],
        rotary=rotary,
        interleaved=interleaved,
        slots=address(slots),
        num_slots=num_slots,
        stream=stream_of(like),
    )


def _group(
    x: torch.Tensor,
    to: torch.Tensor,
    to_stride: int,
    *,
    rotated: bool = False,
    at_slot: bool = False,
) -> _Group:
    """Heads x [tokens, heads, dim] on their way to `to`, whose rows are to_stride apart."""
    place, row = to.data_ptr(), x.stride(0)
    return x.data_ptr(), row, place, to_stride, 0, x.shape[1], rotated, at_slot


def _in_place(x: torch.Tensor) -> _Group:
    return _group(x, x, x.stride(0), rotated=True)


def _to_cache(x: torch.Tensor, cache: torch.Tensor) -> _Group:
    """To the cache [blocks, block_size, kv_heads, dim], a row of which is a slot."""
    return _group(x, cache, cache.stride(1), at_slot=True)


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    _cuda.copy_blocks(
        cache=cache.data_ptr(),
        planes=cache.shape[0],
        blocks=cache.shape[1],
        block_bytes=_block_bytes(cache),
        pairs=pairs.data_ptr(),
        num_pairs=pairs.shape[0],
        stream=stream_of(cache),
    )


def swap_blocks(
    cache: torch.Tensor, host: torch.Tensor, pairs: torch.Tensor, direction: Literal["out", "in"]
) -> None:
    if not host.is_pinned():
        raise Unserved("its kernel reaches pinned host memory only, and `host` is not pinned")
    _cuda.swap_blocks(
        cache=cache.data_ptr(),
        planes=cache.shape[0],
        blocks=cache.shape[1],
        block_bytes=_block_bytes(cache),
        pairs=pairs.data_ptr(),
        num_pairs=pairs.shape[0],
        host=host.data_ptr(),
        host_blocks=host.shape[0],
        out=direction == "out",
        stream=stream_of(cache),
    )


def _block_bytes(cache: torch.Tensor) -> int:
    """Of one block [block_size, kv_heads, dim] in one plane."""
    block_bytes = cache.shape[2:].numel() * cache.element_size()
    if block_bytes % 16:
        raise Unserved(f"its kernel copies blocks of a multiple of 16 bytes, not {block_bytes}")
    return block_bytes


def _require_width(width: int, most: int | None = None) -> None:
    if width % _PACK or (most is not None and width > most):
        limit = "" if most is None else f" up to {most}"
        raise Unserved(f"its kernel takes rows of a multiple of {_PACK} elements{limit}: {width}")


def _require_aligned(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % 16:
            raise Unserved("its kernel needs tensors that are aligned to 16 bytes")
