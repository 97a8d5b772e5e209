"""GLM-4: neighbours in a head turn together, half of the head; GLM-4-0414 norms on both sides."""

from __future__ import annotations

from typing import Any

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder
from octavo.models.spec import DecoderSpec


def translate_glm(config: HfConfig) -> DecoderSpec:
    """GLM-4 9B, GLM-Edge."""
    return _glm(config)


def translate_glm4(config: HfConfig) -> DecoderSpec:
    """GLM-4-0414."""
    return _glm(config, placement="both")


def _glm(config: HfConfig, **changes: Any) -> DecoderSpec:
    config = config.of_family(
        partial_rotary_factor=0.5,
        num_key_value_heads=2,
        rms_norm_eps=1.5625e-07,
        head_dim=128,
    )
    bias = config.flag("attention_bias", default=True)
    return decoder(config, rope_interleaved=True, qkv_bias=bias, **changes)


_FUSED = {"gate_up": ("mlp.gate_up_proj",)}
GLM = Family(("GlmForCausalLM",), translate_glm, llama_names(**_FUSED))
GLM4 = Family(
    ("Glm4ForCausalLM",),
    translate_glm4,
    llama_names(
        attention_out_norm=("post_self_attn_layernorm",),
        mlp_out_norm=("post_mlp_layernorm",),
        **_FUSED,
    ),
)
