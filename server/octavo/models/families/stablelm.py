"""StableLM: layer norms, a quarter of each head turns, perhaps attention and MLP side by side."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, require
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a StableLM model; those with normed heads (12B) are refused."""
    require(config, "qk_layernorm", False)
    config = config.of_family(partial_rotary_factor=0.25)
    parallel = config.flag("use_parallel_residual", default=False)
    return decoder(
        config,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", above=0, default=1e-5),
        placement="parallel" if parallel else "pre",
        shared_norm=parallel,
        qkv_bias=config.flag("use_qkv_bias", default=False),
    )


FAMILY = Family(("StableLmForCausalLM",), translate, llama_names())
