"""GPT-2: learned positions, layer norms, matrices that lie transposed in the file."""

from __future__ import annotations

from octavo.models.family import TRANSPOSED, Family, Names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import activation, decoder, max_positions, num_layers, require
from octavo.models.spec import DecoderSpec, LayerSpec

_ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    # these keys mean nothing here, whatever they hold
    "num_key_value_heads": "",
    "head_dim": "",
}


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a GPT-2 model."""
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    width = config.of_family(_ALIASES).integer("hidden_size", low=1, high=1 << 17)
    config = config.of_family(
        _ALIASES,
        intermediate_size=4 * width,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        activation_function="gelu_new",
    )
    return decoder(
        config,
        layers=(LayerSpec(rope=None),) * num_layers(config),
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", above=0, default=1e-5),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation=activation(config, "activation_function"),
        gated=False,
        rotary_dim=0,
        learned_positions=max_positions(config),
    )


FAMILY = Family(
    ("GPT2LMHeadModel",),
    translate,
    Names(
        embedding="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        layer="transformer.h.{}.",
        parts={
            "input_norm": ("ln_1",),
            "mlp_norm": ("ln_2",),
            "qkv": ("attn.c_attn",),
            "output": ("attn.c_proj",),
            "up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
        arrange=dict.fromkeys(("qkv", "output", "up", "down"), TRANSPOSED),
    ),
    ignored=(".attn.bias", ".attn.masked_bias", "lm_head.weight"),
    prefix="transformer.",
)
