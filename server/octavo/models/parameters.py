"""The decoder's parameters: their names and shapes follow from the spec alone."""

from __future__ import annotations

from octavo.models.spec import DecoderSpec, LayerSpec

Shapes = dict[str, tuple[int, ...]]

_NORMS = {
    "pre": ("input_norm", "mlp_norm"),
    "post": ("attention_out_norm", "mlp_out_norm"),
    "both": ("input_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"),
    "parallel": ("input_norm", "mlp_norm"),
}


def parameter_shapes(spec: DecoderSpec) -> Shapes:
    """Every parameter of the decoder with its shape; biases are named after their matrix."""
    shapes: Shapes = {"embedding": (spec.vocab_size, spec.hidden_size)}
    if spec.learned_positions:
        shapes["positions"] = (spec.learned_positions, spec.hidden_size)
    for index, layer in enumerate(spec.layers):
        for name, shape in _layer(spec, layer).items():
            shapes[f"layers.{index}.{name}"] = shape
    shapes |= _norm(spec, "norm", spec.hidden_size)
    if not spec.tied_embeddings:
        shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _layer(spec: DecoderSpec, layer: LayerSpec) -> Shapes:
    hidden = spec.hidden_size
    shapes: Shapes = {}
    for name in _NORMS[spec.placement]:
        if not (spec.shared_norm and name == "mlp_norm"):
            shapes |= _norm(spec, name, hidden)
    shapes |= _matrix("qkv", spec.query_size + 2 * spec.kv_size, hidden, spec.qkv_bias)
    shapes |= _matrix("output", hidden, spec.query_size, spec.output_bias)
    if spec.qk_norm != "none":
        head = spec.qk_norm == "head"
        shapes["q_norm"] = (spec.head_dim if head else spec.query_size,)
        shapes["k_norm"] = (spec.head_dim if head else spec.kv_size,)
    if spec.sinks:
        shapes["sinks"] = (spec.num_heads,)
    if layer.sparse:
        return shapes | _mixture(spec)
    return shapes | _mlp("", hidden, spec.intermediate_size, spec.gated, spec.mlp_bias)


def _mixture(spec: DecoderSpec) -> Shapes:
    """The experts' matrices lie one under the other."""
    moe, hidden = spec.moe, spec.hidden_size
    if moe is None:
        raise ValueError("a sparse layer needs a MoeSpec")
    count, inner = moe.num_experts, moe.intermediate_size
    shapes = _matrix("router", count, hidden, moe.bias)
    shapes |= _matrix("experts.gate_up", count * 2 * inner, hidden, moe.bias)
    shapes |= _matrix("experts.down", count * hidden, inner, moe.bias)
    if moe.shared_intermediate_size:
        shapes |= _mlp("shared.", hidden, moe.shared_intermediate_size, spec.gated, False)
        shapes |= _matrix("shared_gate", 1, hidden, False)
    return shapes


def _mlp(at: str, hidden: int, inner: int, gated: bool, bias: bool) -> Shapes:
    shapes = _matrix(at + "gate_up", 2 * inner, hidden, bias) if gated else {}
    if not gated:
        shapes = _matrix(at + "up", inner, hidden, bias)
    return shapes | _matrix(at + "down", hidden, inner, bias)


def _matrix(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {name: (rows, columns)}
    return shapes | {name + ".bias": (rows,)} if bias else shapes


def _norm(spec: DecoderSpec, name: str, width: int) -> Shapes:
    shapes: Shapes = {name: (width,)}
    return shapes | {name + ".bias": (width,)} if spec.norm_bias else shapes
