"""Phi-3, Phi-3.5 and Phi-4: fused matrices in the file, longrope, perhaps a partial rotation."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, window, windowed
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a Phi-3 or Phi-4 model."""
    config = config.of_family(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    return windowed(decoder(config), window(config))


FAMILY = Family(
    ("Phi3ForCausalLM",),
    translate,
    llama_names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
)
