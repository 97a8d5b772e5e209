"""What a decoder is made of, free of any one family's configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.kv_layout import KvLayout, kv_layout

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(slots=True, frozen=True)
class RopeSpec:
    """Rotary position embedding; how far positions are stretched, and in which manner."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    # llama3: waves between these are blended
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # llama3, yarn, longrope: the length that the model was trained on at first
    original_max_positions: int = 8192
    # yarn, longrope: cosines and sines are multiplied by this
    magnitude: float = 1.0
    # yarn: turns over the original length below and above which a wave is stretched, or kept
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    # longrope: a factor for each wave, within the original length and beyond
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(slots=True, frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: RopeSpec | None = RopeSpec()
    window: int | None = None  # tokens that attention sees, a token's own included; None: all
    sparse: bool = False  # a mixture of experts takes the place of the MLP


@dataclass(slots=True, frozen=True)
class MoeSpec:
    """A mixture of experts: each token goes to the `top_k` that its router likes best."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalized: bool  # the chosen experts' weights sum to one
    shared_intermediate_size: int = 0  # an expert that every token goes to, through a gate
    bias: bool = False
    # gate * sigmoid(alpha * gate) * (up + 1), both clamped to the limit; 0: the usual activation
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0


@dataclass(slots=True, frozen=True)
class DecoderSpec:
    """A decoder-only transformer: embedding, layers of attention and MLP, norm, output matrix."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    checkpoint_dtype: str = "bfloat16"

    # Norms: before attention and MLP, after them, both, or once before both side by side.
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_offset: float = 0.0  # 1 where a weight of zero means "as it is"
    placement: Literal["pre", "post", "both", "parallel"] = "pre"
    shared_norm: bool = False  # parallel: the MLP takes the attention's normed input

    # Attention
    attention_scale: float = 1.0  # a query-key product is multiplied by this
    attention_softcap: float = 0.0
    qk_norm: Literal["none", "head", "whole"] = "none"
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False

    # MLP
    activation: Activation = "silu"
    gated: bool = True
    mlp_bias: bool = False
    moe: MoeSpec | None = None

    # Positions
    rotary_dim: int = 0  # elements of a head that turn
    rope_interleaved: bool = False
    learned_positions: int = 0  # rows of the table, 0: none
    position_offset: int = 0  # the row of position 0

    # Ends and scales
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def num_layers(self) -> int:
        """Layers, each with an attention and so with a share of the KV cache."""
        return len(self.layers)

    def kv_layout(self, max_model_len: int) -> KvLayout:
        """How the layers share the blocks of the KV cache, for sequences up to that length."""
        return kv_layout([layer.window for layer in self.layers], max_model_len)

    @property
    def query_size(self) -> int:
        """Columns of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim
