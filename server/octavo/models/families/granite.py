"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a Granite model."""
    bias = config.flag("attention_bias", default=False)
    return decoder(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        attention_scale=config.number("attention_multiplier", above=0, default=1.0),
        embedding_scale=config.number("embedding_multiplier", above=0, default=1.0),
        residual_scale=config.number("residual_multiplier", above=0, default=1.0),
        logit_scale=1.0 / config.number("logits_scaling", above=1e-30, default=1.0),
    )


FAMILY = Family(("GraniteForCausalLM",), translate, llama_names())
