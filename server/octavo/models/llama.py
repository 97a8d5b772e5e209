"""The Llama family: Llama 2, 3, 3.1, 3.2 and everything published as LlamaForCausalLM."""

from __future__ import annotations

from octavo.models.family import Family, Target
from octavo.models.hf_config import HfConfig
from octavo.models.spec import DecoderSpec, RopeKind, RopeSpec

_ROPE_KINDS: dict[str, RopeKind] = {"default": "default", "linear": "linear", "llama3": "llama3"}


def translate(config: HfConfig) -> DecoderSpec:
    """config.json of a Llama model as a `DecoderSpec`; raises for what is not served."""
    activation = config.text("hidden_act", default="silu")
    if activation != "silu":
        raise config.unsupported("hidden_act", activation, "silu")
    if config.values.get("quantization_config") is not None:
        method = config.values["quantization_config"]
        raise config.unsupported("quantization_config", method, "unquantized weights only")
    hidden = config.integer("hidden_size", low=1, high=1 << 17)
    heads = config.integer("num_attention_heads", low=1, high=1 << 12)
    attention_bias = config.flag("attention_bias", default=False)
    return DecoderSpec(
        vocab_size=config.integer("vocab_size", low=1, high=1 << 24),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size", low=1, high=1 << 20),
        num_layers=config.integer("num_hidden_layers", low=1, high=1 << 10),
        num_heads=heads,
        num_kv_heads=_kv_heads(config, heads),
        head_dim=_head_dim(config, hidden, heads),
        max_positions=config.integer("max_position_embeddings", low=1, high=1 << 27, default=2048),
        norm_eps=config.number("rms_norm_eps", above=0, default=1e-6),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        rope=_rope(config),
        checkpoint_dtype=_dtype(config),
    )


def targets(spec: DecoderSpec) -> dict[str, Target]:
    """Every tensor that a Llama checkpoint of this shape holds, with its place."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.query_size, spec.kv_size
    found = {
        "model.embed_tokens.weight": Target("embedding", (spec.vocab_size, hidden)),
        "model.norm.weight": Target("norm", (hidden,)),
    }
    if not spec.tied_embeddings:
        found["lm_head.weight"] = Target("lm_head", (spec.vocab_size, hidden))
    for layer in range(spec.num_layers):
        at, to = f"model.layers.{layer}.", f"layers.{layer}."
        found[at + "input_layernorm.weight"] = Target(to + "input_norm", (hidden,))
        found[at + "post_attention_layernorm.weight"] = Target(to + "post_norm", (hidden,))
        for name, parameter, row, rows, columns, bias in (
            ("self_attn.q_proj", "qkv", 0, q, hidden, spec.qkv_bias),
            ("self_attn.k_proj", "qkv", q, kv, hidden, spec.qkv_bias),
            ("self_attn.v_proj", "qkv", q + kv, kv, hidden, spec.qkv_bias),
            ("self_attn.o_proj", "output", 0, hidden, q, spec.output_bias),
            ("mlp.gate_proj", "gate_up", 0, inner, hidden, spec.mlp_bias),
            ("mlp.up_proj", "gate_up", inner, inner, hidden, spec.mlp_bias),
            ("mlp.down_proj", "down", 0, hidden, inner, spec.mlp_bias),
        ):
            found[f"{at}{name}.weight"] = Target(to + parameter, (rows, columns), row)
            if bias:
                found[f"{at}{name}.bias"] = Target(f"{to}{parameter}.bias", (rows,), row)
    return found


def _kv_heads(config: HfConfig, heads: int) -> int:
    kv_heads = config.integer("num_key_value_heads", low=1, high=heads, default=heads)
    if heads % kv_heads != 0:
        raise config.wrong(
            "num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})"
        )
    return kv_heads


def _head_dim(config: HfConfig, hidden: int, heads: int) -> int:
    if config.values.get("head_dim") is None and hidden % heads != 0:
        raise config.wrong("hidden_size", f"({hidden}) is no multiple of {heads} attention heads")
    head_dim = config.integer("head_dim", low=2, high=1024, default=hidden // heads)
    if head_dim % 2 != 0:
        raise config.wrong("head_dim", f"must be even for rotary positions, not {head_dim}")
    return head_dim


def _rope(config: HfConfig) -> RopeSpec:
    """`rope_parameters` of newer configs, else `rope_theta` with `rope_scaling` of older ones."""
    scaling = config.section("rope_parameters") or config.section("rope_scaling")
    theta = config.number("rope_theta", above=0, default=10_000.0)
    if scaling is None:
        return RopeSpec(theta=theta)
    theta = scaling.number("rope_theta", above=0, default=theta)
    key = "rope_type" if scaling.values.get("rope_type") is not None else "type"
    name = scaling.text(key, default="default")
    if name not in _ROPE_KINDS:
        raise scaling.unsupported(key, name, ", ".join(_ROPE_KINDS))
    partial = scaling.number("partial_rotary_factor", above=0, default=1.0)
    if partial != 1.0:
        raise scaling.unsupported("partial_rotary_factor", partial, "1.0")
    kind = _ROPE_KINDS[name]
    if kind == "default":
        return RopeSpec(theta=theta)
    factor = scaling.number("factor", above=0)
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=factor)
    low = scaling.number("low_freq_factor", above=0)
    high = scaling.number("high_freq_factor", above=0)
    if high <= low:
        raise scaling.wrong("high_freq_factor", f"({high}) must be above low_freq_factor ({low})")
    original = scaling.integer("original_max_position_embeddings", low=1, high=1 << 27)
    return RopeSpec(theta, kind, factor, low, high, original)


def _dtype(config: HfConfig) -> str:
    """The type the weights were saved in: `dtype`, in older configs `torch_dtype`."""
    key = "dtype" if config.values.get("dtype") is not None else "torch_dtype"
    name = config.text(key, default="float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise config.unsupported(key, name, "float32, bfloat16, float16")
    return name


FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    translate=translate,
    targets=targets,
    # Old checkpoints carry the rope frequencies, and tied ones sometimes the output matrix too.
    ignored=("rotary_emb.inv_freq", "lm_head.weight"),
)
