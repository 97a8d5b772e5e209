"""What a model family is: a config translator, and what its checkpoints call the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from octavo.models.hf_config import HfConfig
from octavo.models.parameters import parameter_shapes
from octavo.models.spec import DecoderSpec


@dataclass(slots=True, frozen=True)
class Arrange:
    """A tensor that lies otherwise in the file: its shape there, and how it becomes ours."""

    shape: Callable[[DecoderSpec, tuple[int, ...]], tuple[int, ...]]
    turn: Callable[[DecoderSpec, Any], Any]


TRANSPOSED = Arrange(lambda _spec, shape: shape[::-1], lambda _spec, tensor: tensor.T)


@dataclass(slots=True, frozen=True)
class Target:
    """Where one checkpoint tensor goes: rows `row`..`row + rows` of a parameter, which may be a
    fused one. `shape` is the tensor's in the file; `arrange` turns it into those rows.
    """

    parameter: str
    shape: tuple[int, ...]
    row: int
    rows: int
    arrange: Callable[[Any], Any] | None = None


@dataclass(slots=True, frozen=True)
class Names:
    """What a checkpoint calls the parts of a decoder; several names are parts of a fused one.

    `layer` comes before the names in `parts` and `exact`; those in `parts` are followed by
    ".weight" or ".bias". "{}" stands for the number of the layer, or of the expert. `arrange`
    has the parts (and biases, "qkv.bias") that do not lie in the file as in the decoder.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    positions: str = ""
    layer: str = "model.layers.{}."
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    arrange: dict[str, Arrange] = field(default_factory=dict)


LLAMA_PARTS: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "router": ("mlp.gate",),
    "experts.gate_up": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "experts.down": ("mlp.experts.{}.down_proj",),
    "shared.gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared.down": ("mlp.shared_expert.down_proj",),
    "shared_gate": ("mlp.shared_expert_gate",),
}


def llama_names(**changes: tuple[str, ...]) -> Names:
    """Llama's names but for some parts, given by keyword."""
    return Names(parts=LLAMA_PARTS | changes)


@dataclass(slots=True, frozen=True)
class Family:
    """`ignored` are suffixes of checkpoint names that hold nothing that must be loaded; a
    checkpoint may leave out `prefix` before all of its names.
    """

    architectures: tuple[str, ...]
    translate: Callable[[HfConfig], DecoderSpec]
    names: Names
    # Old checkpoints carry the rope frequencies, and tied ones sometimes the output matrix too.
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "lm_head.weight")
    prefix: str = ""

    def targets(self, spec: DecoderSpec) -> dict[str, Target]:
        """Every tensor that a checkpoint of this shape holds, with its place."""
        found: dict[str, Target] = {}
        for parameter, shape in parameter_shapes(spec).items():
            found |= self._targets_of(spec, parameter, shape)
        return found

    def _targets_of(
        self, spec: DecoderSpec, parameter: str, shape: tuple[int, ...]
    ) -> dict[str, Target]:
        at, part, suffix = self._take_apart(parameter)
        arrange = self.names.arrange.get(part + suffix)
        pieces = self._pieces(at, part, suffix)
        if arrange is not None:
            turn = partial(arrange.turn, spec)
            target = Target(parameter, arrange.shape(spec, shape), 0, shape[0], turn)
            return {pieces[0]: target}
        experts = spec.moe.num_experts if spec.moe and part.startswith("experts.") else 1
        sizes = _rows(spec, part, shape[0] // experts, len(pieces))
        found, row = {}, 0
        for expert in range(experts):
            for name, rows in zip(pieces, sizes, strict=True):
                target = Target(parameter, (rows, *shape[1:]), row, rows)
                found[name.replace("{}", str(expert))] = target
                row += rows
        return found

    def _take_apart(self, parameter: str) -> tuple[str, str, str]:
        """A parameter's name as the checkpoint's name of its layer, part, and "" or ".bias"."""
        suffix = ".bias" if parameter.endswith(".bias") else ""
        part, at = parameter.removesuffix(suffix), ""
        if part.startswith("layers."):
            _, index, part = part.split(".", 2)
            at = self.names.layer.replace("{}", index)
        return at, part, suffix

    def _pieces(self, at: str, part: str, suffix: str) -> list[str]:
        """Names of the checkpoint tensors that make up one parameter."""
        exact = self.names.exact.get(part + suffix)
        if exact is not None:
            return [at + exact]
        names = self.names.parts[part] if at else (getattr(self.names, part),)
        return [at + name + (suffix or ".weight") for name in names]


def _rows(spec: DecoderSpec, part: str, rows: int, pieces: int) -> list[int]:
    """How many rows of a fused parameter each piece fills."""
    if part == "qkv" and pieces == 3:
        return [spec.query_size, spec.kv_size, spec.kv_size]
    return [rows // pieces] * pieces
