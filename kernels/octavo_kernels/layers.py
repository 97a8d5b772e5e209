"""All layers of a decode step at once, where a kernel does that.

The meaning is that of the operations which they are made of, each rounded as it is: linear with a
norm, qk_norm_rope_write, paged_attention, linear_add, gated_linear with a norm, linear_add.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_kernels.dispatch import implementation, run
from octavo_kernels.layer_stack import DecoderLayer, Ends, LayerStack
from octavo_kernels.match import Arg, checks, match
from octavo_kernels.native import profile
from octavo_kernels.reference import Function

__all__ = ["DecoderLayer", "Ends", "LayerStack", "decode_layers", "decode_logits", "layer_stack"]


def layer_stack(
    layers: Sequence[DecoderLayer],
    *,
    heads: int,
    function: Function,
    norm_eps: float,
    norm_offset: float,
    scale: float,
    cos_sin: torch.Tensor,
    ends: Ends | None = None,
) -> LayerStack | None:
    """What `decode_layers` takes, and `decode_logits` if the kernel serves `ends`; None where none
    serves these layers. All share one table of cosines and sines, and their heads turn as a whole.

    It keeps the addresses of all tensors, but not them, and waits for the GPU once.
    """
    for layer in layers:
        _match_layer(layer, heads, cos_sin)
    if ends is not None:
        match(
            "layer_stack",
            Arg("qkv", layers[0].qkv, "columns hidden"),
            Arg("embedding", ends.embedding, "vocab hidden"),
            Arg("norm", ends.norm, "hidden"),
            Arg("head", ends.head, "vocab hidden"),
        )
    like = layers[0].qkv
    if implementation(like.device, like.dtype) != "cuda" or profile.deterministic:
        return None
    args = (layers, heads, function, norm_eps, norm_offset, scale, cos_sin, ends)
    stack: LayerStack | None = run("layer_stack", like, *args)
    return stack


def decode_layers(
    stack: LayerStack,
    residual: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """One token of each of up to `stack.rows` sequences through all layers: `residual`
    [rows, hidden] becomes what the last one gives. Sequence lengths count the new token, whose key
    and value go to its slot; slot -1 stores nothing, length 0 is a row of padding.
    """
    if checks.on:
        match(
            "decode_layers",
            Arg("residual", residual, "rows hidden"),
            Arg("positions", positions, "rows", torch.int64),
            Arg("slots", slots, "rows", torch.int64),
            Arg("seq_lens", seq_lens, "rows", torch.int32),
            Arg("block_tables", block_tables, "rows max_blocks", torch.int32),
        )
    run("decode_layers", residual, stack, residual, positions, slots, seq_lens, block_tables)


def decode_logits(
    stack: LayerStack,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """All of such a step: `embed`, `decode_layers`, and the head with the last norm, to `out`
    [rows, vocab] in the layers' type. For stacks with a `vocab`.
    """
    if checks.on:
        size = match(
            "decode_logits",
            Arg("token_ids", token_ids, "rows", torch.int64),
            Arg("positions", positions, "rows", torch.int64),
            Arg("slots", slots, "rows", torch.int64),
            Arg("seq_lens", seq_lens, "rows", torch.int32),
            Arg("block_tables", block_tables, "rows max_blocks", torch.int32),
            Arg("out", out, "rows vocab"),
        )
        if size["vocab"] != stack.vocab:
            raise ValueError(f"decode_logits: out has {size['vocab']} columns, not {stack.vocab}")
    args = (token_ids, positions, slots, seq_lens, block_tables, out)
    run("decode_logits", out, stack, *args)


def _match_layer(layer: DecoderLayer, heads: int, cos_sin: torch.Tensor) -> None:
    op = "layer_stack"
    args = [
        Arg("qkv", layer.qkv, "columns hidden"),
        Arg("output", layer.output, "hidden query"),
        Arg("gate_up", layer.gate_up, "2*inner hidden"),
        Arg("down", layer.down, "hidden inner"),
        Arg("input_norm", layer.input_norm, "hidden"),
        Arg("mlp_norm", layer.mlp_norm, "hidden"),
        Arg("keys", layer.keys, "blocks block_size kv_heads dim"),
        Arg("values", layer.values, "blocks block_size kv_heads dim"),
        Arg("cos_sin", cos_sin, "max_positions rotary", torch.float32),
    ]
    for name, weight in (("query_norm", layer.query_norm), ("key_norm", layer.key_norm)):
        if weight is not None:
            args.append(Arg(name, weight, "dim"))
    size = match(op, *args)
    wanted = {
        "columns": (heads + 2 * size["kv_heads"]) * size["dim"],
        "query": heads * size["dim"],
        "2*inner": 2 * size["inner"],
        "rotary": size["dim"],
    }
    for name, count in wanted.items():
        if size[name] != count:
            raise ValueError(f"{op}: {name} is {size[name]}, but {heads} heads ask for {count}")
