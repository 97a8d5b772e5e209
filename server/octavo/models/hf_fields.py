"""The parts of config.json that families share: heads, rotary positions, windows, types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from octavo.models.hf_config import HfConfig
from octavo.models.spec import Activation, DecoderSpec, LayerSpec, MoeSpec, RopeKind, RopeSpec

# Kinds of rope in a config; "su" is longrope's first name.
_ROPE_KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
_ROPE_NAMES = "default, linear, llama3, yarn, longrope"
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
MAX_POSITIONS = 1 << 27


def decoder(config: HfConfig, **changes: Any) -> DecoderSpec:
    """The spec that the usual keys describe; a family gives what it has otherwise by name."""
    hidden = config.integer("hidden_size", low=1, high=1 << 17)
    heads = config.integer("num_attention_heads", low=1, high=1 << 12)
    count = config.integer("num_hidden_layers", low=1, high=1 << 10)
    dim = head_dim(config, hidden, heads)
    usual: dict[str, Any] = {
        "vocab_size": config.integer("vocab_size", low=1, high=1 << 24),
        "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size", low=1, high=1 << 20),
        "num_heads": heads,
        "num_kv_heads": kv_heads(config, heads),
        "head_dim": dim,
        "max_positions": max_positions(config),
        "attention_scale": float(dim**-0.5),
        "tied_embeddings": config.flag("tie_word_embeddings", default=False),
        "activation": activation(config),
        "checkpoint_dtype": dtype(config),
    }
    if "norm_eps" not in changes:
        usual["norm_eps"] = config.number("rms_norm_eps", above=0, default=1e-6)
    if "rotary_dim" not in changes:
        usual["rotary_dim"] = rotary_dim(config, dim)
    if "layers" not in changes:
        usual["layers"] = (LayerSpec(rope=rope(config, usual["rotary_dim"])),) * count
    return DecoderSpec(**(usual | changes))


def max_positions(config: HfConfig) -> int:
    """Positions that the model was made for."""
    return config.integer("max_position_embeddings", low=1, high=MAX_POSITIONS, default=2048)


def num_layers(config: HfConfig) -> int:
    """How many layers there are."""
    return config.integer("num_hidden_layers", low=1, high=1 << 10)


def kv_heads(config: HfConfig, heads: int) -> int:
    """Key heads, a divisor of the attention heads."""
    count = config.integer("num_key_value_heads", low=1, high=heads, default=heads)
    if heads % count != 0:
        raise config.wrong(
            "num_key_value_heads", f"({count}) must divide num_attention_heads ({heads})"
        )
    return count


def head_dim(config: HfConfig, hidden: int, heads: int) -> int:
    """Elements of a head; even, as rotary positions pair them."""
    if not config.has("head_dim") and hidden % heads != 0:
        raise config.wrong("hidden_size", f"({hidden}) is no multiple of {heads} attention heads")
    dim = config.integer("head_dim", low=2, high=1024, default=hidden // heads)
    if dim % 2 != 0:
        raise config.wrong("head_dim", f"must be even for rotary positions, not {dim}")
    return dim


def rotary_dim(config: HfConfig, dim: int) -> int:
    """Elements of a head that turn: all, or a part that configs name in one of two places."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    source = config
    if section is not None and section.has("partial_rotary_factor"):
        source = section
    share = source.number("partial_rotary_factor", above=0, default=1.0)
    if share > 1:
        raise source.wrong("partial_rotary_factor", f"must be at most 1, not {share}")
    turning = int(dim * share)
    if turning < 2 or turning % 2 != 0:
        raise source.wrong(
            "partial_rotary_factor", f"({share}) of a head of {dim} must be an even number above 0"
        )
    return turning


def rope(config: HfConfig, turning: int, section: HfConfig | None = None) -> RopeSpec:
    """`rope_parameters` of newer configs, else `rope_theta` with `rope_scaling` of older ones."""
    scaling = section or config.section("rope_parameters") or config.section("rope_scaling")
    theta = config.number("rope_theta", above=0, default=10_000.0)
    if scaling is None:
        return RopeSpec(theta=theta)
    theta = scaling.number("rope_theta", above=0, default=theta)
    key = "rope_type" if scaling.has("rope_type") else "type"
    name = scaling.text(key, default="default")
    if name not in _ROPE_KINDS:
        raise scaling.unsupported(key, name, _ROPE_NAMES)
    kind = _ROPE_KINDS[name]
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "longrope":
        return _longrope(config, scaling, theta, turning)
    factor = scaling.number("factor", above=0)
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=factor)
    if kind == "yarn":
        return _yarn(config, scaling, theta, factor)
    low = scaling.number("low_freq_factor", above=0)
    high = scaling.number("high_freq_factor", above=0)
    if high <= low:
        raise scaling.wrong("high_freq_factor", f"({high}) must be above low_freq_factor ({low})")
    return RopeSpec(theta, kind, factor, low, high, _original(scaling))


def _yarn(config: HfConfig, scaling: HfConfig, theta: float, factor: float) -> RopeSpec:
    original = _original(scaling, default=max_positions(config))
    fast = scaling.number("beta_fast", above=1e-6, default=32.0)
    slow = scaling.number("beta_slow", above=1e-6, default=1.0)
    if theta <= 1.0:
        raise scaling.wrong("rope_theta", f"must be above 1 for yarn, not {theta}")
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        magnitude=_yarn_magnitude(scaling, factor),
        beta_fast=fast,
        beta_slow=slow,
        truncate=scaling.flag("truncate", default=True),
    )


def _yarn_magnitude(scaling: HfConfig, factor: float) -> float:
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor", above=0)

    def magnitude(share: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        share = scaling.number("mscale", above=-1)
        of_all = scaling.number("mscale_all_dim", above=-1)
        if share and of_all:
            return magnitude(share) / magnitude(of_all)
    return magnitude(1.0)


def _longrope(config: HfConfig, scaling: HfConfig, theta: float, turning: int) -> RopeSpec:
    source = scaling if scaling.has("original_max_position_embeddings") else config
    original = _original(source)
    factor = max_positions(config) / original
    if scaling.has("factor"):
        factor = scaling.number("factor", above=0)
    magnitude = 1.0
    if scaling.has("attention_factor"):
        magnitude = scaling.number("attention_factor", above=0)
    elif factor > 1:
        if original < 2:
            raise source.wrong("original_max_position_embeddings", "must be at least 2")
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        theta=theta,
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        magnitude=magnitude,
        short_factor=scaling.numbers("short_factor", turning // 2),
        long_factor=scaling.numbers("long_factor", turning // 2),
    )


def _original(config: HfConfig, **default: int) -> int:
    key = "original_max_position_embeddings"
    return config.integer(key, low=1, high=MAX_POSITIONS, **default)


def window(config: HfConfig, key: str = "sliding_window") -> int | None:
    """Tokens that a windowed layer sees; None where that is no bound."""
    if not config.has(key):
        return None
    size = config.integer(key, low=1, high=MAX_POSITIONS)
    return size if size < max_positions(config) else None


def sliding_layers(config: HfConfig, by_rule: Callable[[int], bool]) -> list[bool]:
    """Which layers have a window: what `layer_types` says, in older configs the family's rule."""
    count = num_layers(config)
    types = config.get("layer_types")
    if types is None:
        return [by_rule(layer) for layer in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise config.wrong("layer_types", f"must be a list of {count} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise config.unsupported("layer_types", name, "full_attention, sliding_attention")
    return [name == "sliding_attention" for name in types]


def activation(config: HfConfig, key: str = "hidden_act") -> Activation:
    """The function within the MLP."""
    name = config.text(key, default="silu")
    if name not in _ACTIVATIONS:
        raise config.unsupported(key, name, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def dtype(config: HfConfig) -> str:
    """The type the weights were saved in: `dtype`, in older configs `torch_dtype`."""
    key = "dtype" if config.has("dtype") else "torch_dtype"
    name = config.text(key, default="float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise config.unsupported(key, name, "float32, bfloat16, float16")
    return name


def require(config: HfConfig, key: str, wanted: Any) -> None:
    """Refuse any other value of a switch than the one that is implemented; absent is fine."""
    value = config.get(key)
    if value is not None and value != wanted:
        raise config.unsupported(key, value, str(wanted).lower())


def numbers_of_layers(config: HfConfig, key: str) -> set[int]:
    """A list of layer numbers, perhaps absent."""
    value = config.get(key)
    if value is None:
        return set()
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise config.wrong(key, "must be a list of layer numbers")
    return set(value)


def windowed(spec: DecoderSpec, size: int | None, sliding: list[bool] | None = None) -> DecoderSpec:
    """The spec with a window of `size` in its sliding layers, which are all unless given."""
    which = sliding or [True] * spec.num_layers
    layers = zip(spec.layers, which, strict=True)
    return replace(
        spec, layers=tuple(replace(layer, window=size) if on else layer for layer, on in layers)
    )


def with_experts(
    config: HfConfig, spec: DecoderSpec, *, inner: int, normalized: bool, **more: Any
) -> DecoderSpec:
    """The spec with a mixture of experts for an MLP, in every layer or in those of `sparse`."""
    sparse: list[bool] = more.pop("sparse", [True] * spec.num_layers)
    key = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    count = config.integer(key, low=1, high=1 << 12)
    moe = MoeSpec(
        num_experts=count,
        top_k=config.integer("num_experts_per_tok", low=1, high=count),
        intermediate_size=inner,
        normalized=normalized,
        **more,
    )
    layers = zip(spec.layers, sparse, strict=True)
    return replace(spec, moe=moe, layers=tuple(replace(layer, sparse=on) for layer, on in layers))
