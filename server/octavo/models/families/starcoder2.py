"""StarCoder2: layer norms, biases everywhere, a plain MLP, a window."""

from __future__ import annotations

from octavo.models.family import Family, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import activation, decoder, window, windowed
from octavo.models.spec import DecoderSpec


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a StarCoder2 model."""
    config = config.of_family(
        tie_word_embeddings=True, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh"
    )
    bias = config.flag("use_bias", default=True)
    spec = decoder(
        config,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("norm_epsilon", above=0, default=1e-5),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        activation=activation(config),
        gated=False,
    )
    return windowed(spec, window(config))


FAMILY = Family(
    ("Starcoder2ForCausalLM",), translate, llama_names(up=("mlp.c_fc",), down=("mlp.c_proj",))
)
