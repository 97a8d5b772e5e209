"""Gemma 1, 2 and 3 (text): norms of 1 + weight, scaled embeddings, gelu; then softcaps, windows."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import (
    activation,
    decoder,
    require,
    rope,
    sliding_layers,
    window,
    windowed,
)
from octavo.models.spec import DecoderSpec, RopeSpec


def translate_gemma(config: HfConfig) -> DecoderSpec:
    """Gemma 1. Early configs say "gelu" and mean its approximation."""
    require(config, "use_bidirectional_attention", False)
    key = "hidden_activation" if config.has("hidden_activation") else "hidden_act"
    name = config.text(key, default="gelu")
    config = _of_family(config)
    return _gemma(config, "gelu_tanh" if name == "gelu" else activation(config, key))


def translate_gemma2(config: HfConfig) -> DecoderSpec:
    """Gemma 2: norms on both sides, softcaps, a window in every other layer."""
    require(config, "use_bidirectional_attention", False)
    config = _of_family(config, sliding_window=4096)
    spec = _both_norms(config)
    return windowed(spec, window(config), sliding_layers(config, lambda layer: layer % 2 == 0))


def translate_gemma3(config: HfConfig) -> DecoderSpec:
    """Gemma 3: heads are normed; five layers of six have a window and a rope of their own."""
    require(config, "use_bidirectional_attention", False)
    sections = config.section("rope_parameters")
    config = _of_family(config, sliding_window=4096, rope_theta=1e6, rope_local_base_freq=1e4)
    every = config.integer("sliding_window_pattern", low=1, high=1 << 10, default=6)
    sliding = sliding_layers(config, lambda layer: (layer + 1) % every != 0)
    by_type = sections is not None and (
        sections.has("full_attention") or sections.has("sliding_attention")
    )
    spec = _both_norms(config.without("rope_parameters") if by_type else config)
    far = spec.layers[0].rope
    near: RopeSpec | None = RopeSpec(theta=config.number("rope_local_base_freq", above=0))
    if sections is not None and by_type:
        far, near = (
            rope(config, spec.rotary_dim, sections.section(kind)) if sections.has(kind) else usual
            for kind, usual in (("full_attention", far), ("sliding_attention", near))
        )
    layers = zip(spec.layers, sliding, strict=True)
    spec = replace(
        spec,
        qk_norm="head",
        layers=tuple(replace(layer, rope=near if on else far) for layer, on in layers),
    )
    return windowed(spec, window(config), sliding)


def _of_family(config: HfConfig, **more: float) -> HfConfig:
    return config.of_family(
        tie_word_embeddings=True, head_dim=256, hidden_activation="gelu_pytorch_tanh", **more
    )


def _gemma(config: HfConfig, function: str, **changes: object) -> DecoderSpec:
    bias = config.flag("attention_bias", default=False)
    spec = decoder(config, activation=function, qkv_bias=bias, output_bias=bias, **changes)
    return replace(spec, norm_offset=1.0, embedding_scale=spec.hidden_size**0.5)


def _both_norms(config: HfConfig) -> DecoderSpec:
    caps = {
        field: config.number(key, above=0, default=None) if config.has(key) else 0.0
        for field, key in (
            ("attention_softcap", "attn_logit_softcapping"),
            ("logit_softcap", "final_logit_softcapping"),
        )
    }
    scalar = config.number("query_pre_attn_scalar", above=0, default=256)
    function = activation(config, "hidden_activation")
    return _gemma(config, function, placement="both", attention_scale=scalar**-0.5, **caps)


_BOTH_NORMS = llama_names(
    attention_out_norm=("post_attention_layernorm",),
    mlp_norm=("pre_feedforward_layernorm",),
    mlp_out_norm=("post_feedforward_layernorm",),
)
GEMMA = Family(("GemmaForCausalLM",), translate_gemma, llama_names())
GEMMA2 = Family(("Gemma2ForCausalLM",), translate_gemma2, _BOTH_NORMS)
GEMMA3 = Family(("Gemma3ForCausalLM",), translate_gemma3, _BOTH_NORMS)
