"""GPT-OSS: experts with biases and a clamped gate, sinks, a window in every other layer."""

from __future__ import annotations

from typing import Any

from octavo.models.family import Arrange, Family, Names, llama_names
from octavo.models.hf_config import HfConfig
from octavo.models.hf_fields import decoder, sliding_layers, window, windowed, with_experts
from octavo.models.spec import DecoderSpec, MoeSpec

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a GPT-OSS model in bfloat16; MXFP4 is refused as a quantization."""
    scaled = config.has("rope_parameters") or config.has("rope_scaling")
    config = config.of_family(
        num_local_experts=128,
        num_experts_per_tok=4,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        sliding_window=128,
        rope_theta=150_000.0,
        **({} if scaled else {"rope_scaling": _YARN}),
    )
    bias = config.flag("attention_bias", default=True)
    spec = decoder(config, sinks=True, qkv_bias=bias, output_bias=bias)
    spec = windowed(spec, window(config), sliding_layers(config, lambda layer: layer % 2 == 0))
    return with_experts(
        config,
        spec,
        inner=spec.intermediate_size,
        normalized=True,
        bias=True,
        swiglu_alpha=config.number("swiglu_alpha", above=0, default=1.702),
        swiglu_limit=config.number("swiglu_limit", above=0, default=7.0),
    )


def _moe(spec: DecoderSpec) -> MoeSpec:
    if spec.moe is None:
        raise ValueError("GPT-OSS has experts in every layer")
    return spec.moe


def _gate_up_shape(spec: DecoderSpec, _shape: tuple[int, ...]) -> tuple[int, ...]:
    moe = _moe(spec)
    return moe.num_experts, spec.hidden_size, 2 * moe.intermediate_size


def _gate_up(spec: DecoderSpec, tensor: Any) -> Any:
    """Columns gate, up, gate, up, … become rows: all gates, all ups, expert by expert."""
    moe = _moe(spec)
    apart = tensor.view(moe.num_experts, spec.hidden_size, moe.intermediate_size, 2)
    return apart.permute(0, 3, 2, 1).reshape(-1, spec.hidden_size)


def _gate_up_bias(spec: DecoderSpec, tensor: Any) -> Any:
    moe = _moe(spec)
    return tensor.view(moe.num_experts, moe.intermediate_size, 2).transpose(1, 2).reshape(-1)


def _down_shape(spec: DecoderSpec, _shape: tuple[int, ...]) -> tuple[int, ...]:
    return _moe(spec).num_experts, _moe(spec).intermediate_size, spec.hidden_size


def _down(spec: DecoderSpec, tensor: Any) -> Any:
    return tensor.transpose(1, 2).reshape(-1, _moe(spec).intermediate_size)


def _bias_shape(spec: DecoderSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    count = _moe(spec).num_experts
    return count, shape[0] // count


_LLAMA = llama_names(router=("mlp.router",))
_EXPERTS = "mlp.experts."
FAMILY = Family(
    ("GptOssForCausalLM",),
    translate,
    Names(
        parts=_LLAMA.parts,
        exact={
            "sinks": "self_attn.sinks",
            "experts.gate_up": _EXPERTS + "gate_up_proj",
            "experts.gate_up.bias": _EXPERTS + "gate_up_proj_bias",
            "experts.down": _EXPERTS + "down_proj",
            "experts.down.bias": _EXPERTS + "down_proj_bias",
        },
        arrange={
            "experts.gate_up": Arrange(_gate_up_shape, _gate_up),
            "experts.gate_up.bias": Arrange(_bias_shape, _gate_up_bias),
            "experts.down": Arrange(_down_shape, _down),
            "experts.down.bias": Arrange(_bias_shape, lambda _spec, tensor: tensor.reshape(-1)),
        },
    ),
)
