"""All layers of a decode step of few rows in one kernel; see `csrc/cuda/persistent_layers.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.layer_stack import DecoderLayer, Ends, LayerStack
from octavo_kernels.native import FUNCTIONS, address, stream_of, type_code
from octavo_kernels.reference import Function

_ALIGNMENT = 16  # bytes
_UNIT = 8  # rows of a matrix that are taken at a time


def layer_stack(
    layers: Sequence[DecoderLayer],
    heads: int,
    function: Function,
    norm_eps: float,
    norm_offset: float,
    scale: float,
    cos_sin: torch.Tensor,
    ends: Ends | None,
) -> LayerStack | None:
    first = layers[0]
    blocks, block_size, kv_heads, dim = first.keys.shape
    device = first.qkv.device
    addresses = [[address(tensor) for tensor in layer.tensors()] for layer in layers]
    if any(at % _ALIGNMENT for of_layer in addresses for at in of_layer):
        return None
    table = torch.tensor(addresses, dtype=torch.int64, device=device)
    vocab, around = _around(ends)
    native = _cuda.LayerStack(
        dtype=type_code("layer_stack", first.qkv),
        layers=table.data_ptr(),
        num_layers=len(layers),
        hidden=first.qkv.shape[1],
        inner=first.down.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        function=FUNCTIONS.index(function),
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        scale=scale,
        cos_sin=cos_sin.data_ptr(),
        max_positions=cos_sin.shape[0],
        num_blocks=blocks,
        block_size=block_size,
        vocab=vocab,
        embedding=around[0],
        final_norm=around[1],
        head=around[2],
    )
    rows = native.rows()
    if rows == 0:
        return None
    workspace = torch.zeros(native.workspace_bytes(), dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # the table is read ahead of the stream, as weights are
    return LayerStack(rows, vocab, native, table, workspace)


def _around(ends: Ends | None) -> tuple[int, list[int]]:
    """The vocabulary's size and the addresses of `ends`, or zeros where the kernel takes none."""
    if ends is not None:
        addresses = [tensor.data_ptr() for tensor in ends.tensors()]
        vocab = ends.head.shape[0]
        if vocab % _UNIT == 0 and not any(at % _ALIGNMENT for at in addresses):
            return vocab, addresses
    return 0, [0, 0, 0]


def decode_layers(
    stack: LayerStack,
    residual: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    _decode(stack, residual, None, None, positions, slots, seq_lens, block_tables)


def decode_logits(
    stack: LayerStack,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
) -> None:
    _decode(stack, None, token_ids, out, positions, slots, seq_lens, block_tables)


def _decode(
    stack: LayerStack,
    residual: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    logits: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    cast(_cuda.LayerStack, stack.native).decode(
        residual=address(residual),
        tokens=address(token_ids),
        logits=address(logits),
        rows=positions.shape[0],
        positions=positions.data_ptr(),
        slots=slots.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        block_tables=block_tables.data_ptr(),
        max_blocks=block_tables.shape[1],
        workspace=stack.workspace.data_ptr(),
        stream=stream_of(positions),
    )
