"""Mistral and Mixtral: Llama with a window in every layer, and with experts."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, window, windowed, with_experts
from octavo.models.spec import DecoderSpec


def translate_mistral(config: HfConfig) -> DecoderSpec:
    """Mistral 7B, NeMo, Small: where `sliding_window` is null, there is none."""
    config = config.of_family(num_key_value_heads=8)
    return windowed(decoder(config), window(config))


def translate_mixtral(config: HfConfig) -> DecoderSpec:
    """Mixtral 8x7B and 8x22B: eight experts, two for each token."""
    config = config.of_family(
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    spec = windowed(decoder(config), window(config))
    return with_experts(config, spec, inner=spec.intermediate_size, normalized=True)


MISTRAL = Family(("MistralForCausalLM",), translate_mistral, llama_names())
MIXTRAL = Family(
    ("MixtralForCausalLM",),
    translate_mixtral,
    llama_names(
        **{
            "router": ("block_sparse_moe.gate",),
            "experts.gate_up": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
            "experts.down": ("block_sparse_moe.experts.{}.w2",),
        }
    ),
)
