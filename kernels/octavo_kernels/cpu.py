"""Operations on tensors in host memory, by the compiled module `_core`; shapes were matched.

What each means is in `reference.py`, under the same name and with the same arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import octavo_kernels._core as _core
from octavo_kernels.native import FUNCTIONS, address, type_code
from octavo_kernels.reference import Function, Variant


def instruction_sets() -> tuple[str, ...]:
    """What this host can run, best first; the first is used."""
    return tuple(_core.isas())


@contextlib.contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """Within the block the named instruction set is used (tests, measurements)."""
    before = _core.isa()
    _core.use_isa(name)
    try:
        yield
    finally:
        _core.use_isa(before)


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
    out = torch.empty(query.shape, dtype=query.dtype)
    blocks, block_size, kv_heads, dim = key_cache.shape
    _core.paged_attention(
        dtype=type_code("paged_attention", query),
        query=query.data_ptr(),
        query_stride=query.stride(0),
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        block_tables=block_tables.data_ptr(),
        query_start=query_start.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        out=out.data_ptr(),
        tokens=query.shape[0],
        seqs=block_tables.shape[0],
        max_blocks=block_tables.shape[1],
        blocks=blocks,
        block_size=block_size,
        heads=query.shape[1],
        kv_heads=kv_heads,
        dim=dim,
        scale=scale,
        window=variant.window,
        softcap=variant.softcap,
        sinks=address(variant.sinks),
        threads=torch.get_num_threads(),
    )
    return out


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    blocks, block_size, kv_heads, dim = key_cache.shape
    _core.write_kv(
        key=key.data_ptr(),
        key_stride=key.stride(0) * key.element_size(),
        value=value.data_ptr(),
        value_stride=value.stride(0) * value.element_size(),
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        slots=slots.data_ptr(),
        tokens=key.shape[0],
        num_slots=blocks * block_size,
        row_bytes=kv_heads * dim * key.element_size(),
    )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    offset: float,
) -> torch.Tensor:
    out = torch.empty_like(x)
    _core.rms_norm(
        dtype=type_code("rms_norm", x),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        residual=address(residual),
        out=out.data_ptr(),
        tokens=x.shape[0],
        width=x.shape[1],
        eps=eps,
        offset=offset,
        threads=torch.get_num_threads(),
    )
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.empty_like(x)
    _core.layer_norm(
        dtype=type_code("layer_norm", x),
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=address(bias),
        residual=address(residual),
        out=out.data_ptr(),
        tokens=x.shape[0],
        width=x.shape[1],
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return out


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
) -> None:
    for x in (query, key):
        _core.rope(
            dtype=type_code("rope", x),
            x=x.data_ptr(),
            stride=x.stride(0),
            positions=positions.data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            max_positions=cos_sin.shape[0],
            tokens=x.shape[0],
            heads=x.shape[1],
            dim=x.shape[2],
            rotary=cos_sin.shape[1],
            interleaved=interleaved,
            threads=torch.get_num_threads(),
        )


def act(x: torch.Tensor, function: Function) -> torch.Tensor:
    out = torch.empty_like(x)
    _activation("act", x, function, out)
    return out


def act_and_mul(x: torch.Tensor, function: Function) -> torch.Tensor:
    out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype)
    _activation("act_and_mul", x, function, out)
    return out


def _activation(op: str, x: torch.Tensor, function: Function, out: torch.Tensor) -> None:
    _core.activation(
        dtype=type_code(op, x),
        function=FUNCTIONS.index(function),
        gated=op == "act_and_mul",
        x=x.data_ptr(),
        out=out.data_ptr(),
        tokens=out.shape[0],
        width=out.shape[1],
        threads=torch.get_num_threads(),
    )


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    planes, blocks = cache.shape[:2]
    _core.copy_blocks(
        cache=cache.data_ptr(),
        planes=planes,
        blocks=blocks,
        block_bytes=cache[0, 0].numel() * cache.element_size() if blocks else 0,
        pairs=pairs.data_ptr(),
        num_pairs=pairs.shape[0],
    )
