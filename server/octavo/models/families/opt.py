"""OPT: learned positions that begin at row 2, layer norms, relu."""

from __future__ import annotations

from octavo.models.family import Family, Names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import activation, decoder, max_positions, num_layers, require
from octavo.models.spec import DecoderSpec, LayerSpec

_ALIASES = {"intermediate_size": "ffn_dim", "num_key_value_heads": "", "head_dim": ""}
_OFFSET = 2


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of an OPT model; the 350M one norms after its layers and is refused."""
    require(config, "do_layer_norm_before", True)
    require(config, "_remove_final_layer_norm", False)
    require(config, "layer_norm_elementwise_affine", True)
    require(config, "word_embed_proj_dim", config.integer("hidden_size", low=1, high=1 << 17))
    config = config.of_family(_ALIASES, tie_word_embeddings=True, activation_function="relu")
    bias = config.flag("enable_bias", default=True)
    return decoder(
        config,
        layers=(LayerSpec(rope=None),) * num_layers(config),
        norm="layer",
        norm_bias=True,
        norm_eps=1e-5,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        activation=activation(config, "activation_function"),
        gated=False,
        rotary_dim=0,
        learned_positions=max_positions(config) + _OFFSET,
        position_offset=_OFFSET,
    )


FAMILY = Family(
    ("OPTForCausalLM",),
    translate,
    Names(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        norm="model.decoder.final_layer_norm",
        layer="model.decoder.layers.{}.",
        parts={
            "input_norm": ("self_attn_layer_norm",),
            "mlp_norm": ("final_layer_norm",),
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "output": ("self_attn.out_proj",),
            "up": ("fc1",),
            "down": ("fc2",),
        },
    ),
    prefix="model.",
)
