"""Qwen2, Qwen2.5 and Qwen3, dense and with experts."""

from __future__ import annotations

from collections.abc import Callable

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import (
    decoder,
    num_layers,
    numbers_of_layers,
    sliding_layers,
    window,
    windowed,
    with_experts,
)
from octavo.models.spec import DecoderSpec

_SIZES = {"low": 1, "high": 1 << 20}


def translate_qwen2(config: HfConfig) -> DecoderSpec:
    """Qwen2 and Qwen2.5: biases on query, key and value."""
    return _windowed(config, decoder(config, qkv_bias=True))


def translate_qwen3(config: HfConfig) -> DecoderSpec:
    """Qwen3: every head's query and key are normed."""
    config = config.of_family(head_dim=128)
    return _windowed(config, _qwen3(config))


def translate_qwen2_moe(config: HfConfig) -> DecoderSpec:
    """Qwen1.5-MoE and Qwen2-MoE: many small experts beside one that every token goes to."""
    config = config.of_family(num_experts=60, num_experts_per_tok=4)
    spec = decoder(config, qkv_bias=config.flag("qkv_bias", default=True))
    last = config.integer("max_window_layers", low=0, high=1 << 10, default=28)
    spec = _windowed(config, spec, lambda layer: layer % 2 == 0 and layer < last)
    shared = config.integer("shared_expert_intermediate_size", **_SIZES, default=5632)
    return _with_experts(config, spec, inner=1408, shared_intermediate_size=shared)


def translate_qwen3_moe(config: HfConfig) -> DecoderSpec:
    """Qwen3 with experts."""
    config = config.of_family(num_experts=128, num_experts_per_tok=8)
    spec = _windowed(config, _qwen3(config), lambda _layer: True)
    return _with_experts(config, spec, inner=768)


def _qwen3(config: HfConfig) -> DecoderSpec:
    bias = config.flag("attention_bias", default=False)
    return decoder(config, qk_norm="head", qkv_bias=bias, output_bias=bias)


def _windowed(
    config: HfConfig, spec: DecoderSpec, rule: Callable[[int], bool] | None = None
) -> DecoderSpec:
    if not config.flag("use_sliding_window", default=False):
        return spec
    first = config.integer("max_window_layers", low=0, high=1 << 10, default=28)
    sliding = sliding_layers(config, rule or (lambda layer: layer >= first))
    return windowed(spec, window(config), sliding)


def _with_experts(config: HfConfig, spec: DecoderSpec, *, inner: int, **more: int) -> DecoderSpec:
    dense = numbers_of_layers(config, "mlp_only_layers")
    step = config.integer("decoder_sparse_step", low=1, high=1 << 10, default=1)
    return with_experts(
        config,
        spec,
        inner=config.integer("moe_intermediate_size", **_SIZES, default=inner),
        normalized=config.flag("norm_topk_prob", default=False),
        sparse=[i not in dense and (i + 1) % step == 0 for i in range(num_layers(config))],
        **more,
    )


QWEN2 = Family(("Qwen2ForCausalLM",), translate_qwen2, llama_names())
QWEN3 = Family(("Qwen3ForCausalLM",), translate_qwen3, llama_names())
QWEN2_MOE = Family(("Qwen2MoeForCausalLM",), translate_qwen2_moe, llama_names())
QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), translate_qwen3_moe, llama_names())
