"""The Llama family: Llama 2, 3, 3.1, 3.2 and everything published as LlamaForCausalLM."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a Llama model as a `DecoderSpec`; raises for what is not served."""
    bias = config.flag("attention_bias", default=False)
    return decoder(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


FAMILY = Family(("LlamaForCausalLM",), translate, llama_names())
