"""A decoder's layers for the kernel that runs a step of few decodes through all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from octavo.models.spec import DecoderSpec
from octavo_kernels import ops


def is_uniform(spec: DecoderSpec) -> bool:
    """True where plain layers are alike, and their attention is turned heads without any extra."""
    return (
        len({layer.rope for layer in spec.layers}) == 1
        and spec.layers[0].rope is not None
        and all(layer.window is None for layer in spec.layers)
        and spec.qk_norm in ("none", "head")
        and spec.rotary_dim == spec.head_dim
        and not (spec.rope_interleaved or spec.learned_positions or spec.sinks)
        and not (spec.qkv_bias or spec.output_bias or spec.mlp_bias or spec.attention_softcap)
    )


def new_stack(
    spec: DecoderSpec,
    parameters: Mapping[str, torch.Tensor],
    planes: Sequence[torch.Tensor],
    cos_sin: torch.Tensor,
) -> ops.LayerStack | None:
    """A uniform decoder's layers and what is around them; of each layer in turn keys and values are
    in `planes`. None where there is no such kernel.
    """
    layers = []
    for i in range(spec.num_layers):
        at = f"layers.{i}."
        layers.append(
            ops.DecoderLayer(
                qkv=parameters[at + "qkv"],
                output=parameters[at + "output"],
                gate_up=parameters[at + "gate_up"],
                down=parameters[at + "down"],
                input_norm=parameters[at + "input_norm"],
                mlp_norm=parameters[at + "mlp_norm"],
                query_norm=parameters.get(at + "q_norm"),
                key_norm=parameters.get(at + "k_norm"),
                keys=planes[2 * i],
                values=planes[2 * i + 1],
            )
        )
    return ops.layer_stack(
        layers,
        heads=spec.num_heads,
        function=spec.activation,
        norm_eps=spec.norm_eps,
        norm_offset=spec.norm_offset,
        scale=spec.attention_scale,
        cos_sin=cos_sin,
        ends=_ends(spec, parameters),
    )


def _ends(spec: DecoderSpec, parameters: Mapping[str, torch.Tensor]) -> ops.Ends | None:
    """What is around the layers, where that is nothing but an embedding, a norm and a product."""
    if spec.embedding_scale != 1.0:
        return None
    head = parameters["embedding" if spec.tied_embeddings else "lm_head"]
    return ops.Ends(parameters["embedding"], parameters["norm"], head)
