"""GPT-NeoX and Pythia: attention and MLP side by side, queries, keys and values fused by head."""

from __future__ import annotations

from typing import Any

from octavo.models.family import Arrange, Family, Names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import activation, decoder
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a GPT-NeoX model."""
    aliases = {"num_key_value_heads": "", "head_dim": ""}
    for ours, older in (("partial_rotary_factor", "rotary_pct"), ("rope_theta", "rotary_emb_base")):
        if config.has(older):
            aliases[ours] = older
    config = config.of_family(aliases, partial_rotary_factor=0.25, hidden_act="gelu")
    parallel = config.flag("use_parallel_residual", default=True)
    bias = config.flag("attention_bias", default=True)
    return decoder(
        config,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", above=0, default=1e-5),
        placement="parallel" if parallel else "pre",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        activation=activation(config),
        gated=False,
    )


def _by_kind(spec: DecoderSpec, tensor: Any) -> Any:
    """Rows of each head's query, key and value become all queries, all keys, all values."""
    by_head = tensor.view(spec.num_heads, 3, spec.head_dim, *tensor.shape[1:])
    return by_head.transpose(0, 1).reshape(tensor.shape)


_BY_HEAD = Arrange(lambda _spec, shape: shape, _by_kind)

FAMILY = Family(
    ("GPTNeoXForCausalLM",),
    translate,
    Names(
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        lm_head="embed_out",
        layer="gpt_neox.layers.{}.",
        parts={
            "input_norm": ("input_layernorm",),
            "mlp_norm": ("post_attention_layernorm",),
            "qkv": ("attention.query_key_value",),
            "output": ("attention.dense",),
            "up": ("mlp.dense_h_to_4h",),
            "down": ("mlp.dense_4h_to_h",),
        },
        arrange={"qkv": _BY_HEAD, "qkv.bias": _BY_HEAD},
    ),
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)
