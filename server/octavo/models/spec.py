"""What a decoder is made of, free of any one family's configuration names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(slots=True, frozen=True)
class RopeSpec:
    """Rotary position embedding. The fields after `factor` are llama3's."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(slots=True, frozen=True)
class DecoderSpec:
    """A decoder: pre-norm, rotary positions, gated MLP, grouped-query attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    rope: RopeSpec = field(default_factory=RopeSpec)
    checkpoint_dtype: str = "bfloat16"

    @property
    def attention_scale(self) -> float:
        """What a query-key product is multiplied by before the softmax."""
        return float(self.head_dim**-0.5)

    @property
    def query_size(self) -> int:
        """Columns of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim
