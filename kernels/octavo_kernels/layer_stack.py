"""What all layers of a decoder are, for the kernel that runs them at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, frozen=True, eq=False)
class DecoderLayer:
    """A plain layer's weights, matrices [n, k], and where its keys and values are kept:
    [blocks, block_size, kv_heads, dim]. Norms are RMS norms, `query_norm` and `key_norm` [dim] of
    each head, if there are any.
    """

    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of persistent_layers.h's DecoderLayer."""
        return (
            self.qkv, self.output, self.gate_up, self.down, self.input_norm, self.mlp_norm,
            self.query_norm, self.key_norm, self.keys, self.values,
        )  # fmt: skip


@dataclass(slots=True, frozen=True, eq=False)
class Ends:
    """What is around the layers: the embedding and the head, [vocab, hidden], which may be one, and
    the last norm, of the layers' kind.
    """

    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All of them, in the order in which a step takes them."""
        return self.embedding, self.norm, self.head


@dataclass(slots=True, frozen=True, eq=False)
class LayerStack:
    """The layers as the kernel takes them, for steps of up to `rows` rows, as long as their tensors
    are there: it has only their addresses. Steps follow each other on one stream: they share the
    workspace. With a `vocab` above 0 it takes tokens and gives logits, too.
    """

    rows: int
    vocab: int
    native: object
    table: torch.Tensor
    workspace: torch.Tensor
