"""SmolLM3: every fourth layer knows no positions."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, num_layers, sliding_layers, window, windowed
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a SmolLM3 model."""
    config = config.of_family(tie_word_embeddings=True, rope_theta=2e6, num_key_value_heads=4)
    bias = config.flag("attention_bias", default=False)
    mlp_bias = config.flag("mlp_bias", default=False)
    spec = decoder(config, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)
    turning = _turning(config)
    layers = zip(spec.layers, turning, strict=True)
    spec = replace(
        spec, layers=tuple(layer if on else replace(layer, rope=None) for layer, on in layers)
    )
    if not config.flag("use_sliding_window", default=False):
        return spec
    return windowed(spec, window(config), sliding_layers(config, lambda layer: not turning[layer]))


def _turning(config: HfConfig) -> list[bool]:
    """Which layers have rotary positions: `no_rope_layers` says 1 for those that have."""
    count = num_layers(config)
    given = config.get("no_rope_layers")
    if given is None:
        every = config.integer("no_rope_layer_interval", low=1, high=1 << 10, default=4)
        return [(layer + 1) % every != 0 for layer in range(count)]
    if not isinstance(given, list) or len(given) != count or any(n not in (0, 1) for n in given):
        raise config.wrong("no_rope_layers", f"must be a list of {count} zeros and ones")
    return [bool(n) for n in given]


FAMILY = Family(("SmolLM3ForCausalLM",), translate, llama_names())
