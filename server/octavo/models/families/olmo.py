"""OLMo-2 (norms after attention and MLP) and OLMoE (experts); both norm whole queries and keys."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, require, with_experts
from octavo.models.spec import DecoderSpec


def translate_olmo2(config: HfConfig) -> DecoderSpec:
    """config.json of an OLMo-2 model."""
    return _olmo(config, placement="post")


def translate_olmoe(config: HfConfig) -> DecoderSpec:
    """config.json of an OLMoE model."""
    require(config, "clip_qkv", None)
    config = config.of_family(num_experts=64, num_experts_per_tok=8)
    spec = _olmo(config)
    normalized = config.flag("norm_topk_prob", default=False)
    return with_experts(config, spec, inner=spec.intermediate_size, normalized=normalized)


def _olmo(config: HfConfig, **changes: object) -> DecoderSpec:
    bias = config.flag("attention_bias", default=False)
    eps = config.number("rms_norm_eps", above=0, default=1e-5)
    return decoder(
        config, qk_norm="whole", norm_eps=eps, qkv_bias=bias, output_bias=bias, **changes
    )


OLMO2 = Family(
    ("Olmo2ForCausalLM",),
    translate_olmo2,
    llama_names(
        attention_out_norm=("post_attention_layernorm",),
        mlp_out_norm=("post_feedforward_layernorm",),
    ),
)
OLMOE = Family(("OlmoeForCausalLM",), translate_olmoe, llama_names())
