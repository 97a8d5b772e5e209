"""Command R and R7B: one layer norm before attention and MLP side by side, scaled logits."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, require, sliding_layers, window, windowed
from octavo.models.spec import DecoderSpec


def translate_cohere(config: HfConfig) -> DecoderSpec:
    """Command R; those with normed heads (R+) are refused."""
    require(config, "use_qk_norm", False)
    return _cohere(config.of_family(tie_word_embeddings=True, rope_theta=500_000.0))


def translate_cohere2(config: HfConfig) -> DecoderSpec:
    """Command R7B and A: three layers of four have a window; the others know no positions."""
    config = config.of_family(tie_word_embeddings=True, sliding_window=4096)
    every = config.integer("sliding_window_pattern", low=1, high=1 << 10, default=4)
    spec = _cohere(config)
    sliding = sliding_layers(config, lambda layer: (layer + 1) % every != 0)
    layers = zip(spec.layers, sliding, strict=True)
    spec = replace(
        spec, layers=tuple(layer if on else replace(layer, rope=None) for layer, on in layers)
    )
    return windowed(spec, window(config), sliding)


def _cohere(config: HfConfig) -> DecoderSpec:
    bias = config.flag("attention_bias", default=False)
    return decoder(
        config,
        norm="layer",
        norm_eps=config.number("layer_norm_eps", above=0, default=1e-5),
        placement="parallel",
        shared_norm=True,
        rope_interleaved=True,
        qkv_bias=bias,
        output_bias=bias,
        logit_scale=config.number("logit_scale", above=0, default=0.0625),
    )


COHERE = Family(("CohereForCausalLM",), translate_cohere, llama_names())
COHERE2 = Family(("Cohere2ForCausalLM",), translate_cohere2, llama_names())
