"""A model's sizes from its config.json, under the names of any family; for the memory plan.

Without torch, and less strict than the engine: what the engine would refuse may still be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import ModelError, OctavoError
from octavo.json_object import read_json_object
from octavo.models.hf_config import read_config
from octavo.models.registry import native_family

_MOST = 1 << 32
# Families that know no grouped queries, whatever keys their configs carry.
_UNGROUPED = ("gpt2", "opt", "gpt_neox")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(slots=True, frozen=True)
class ModelShape:
    """What decides how much memory a model takes, beside its weights. `windows` are by layer."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str
    tied_embeddings: bool
    windows: tuple[int | None, ...]


def read_shape(folder: Path) -> ModelShape:
    """The shape in the folder's config.json; raises `ModelError` naming the key that is wrong."""
    path = folder / "config.json"
    values = read_json_object(path)
    if values is None:
        raise ModelError(f"{path} is missing; is this the model's folder?")
    config = _Config(path, values)
    names = config.values.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else "unknown"
    text = config.values.get("text_config")
    if isinstance(text, dict):  # a model for text and more keeps the text part's sizes apart
        config = _Config(path, {**config.values, **text})
    hidden = config.size("hidden_size", "n_embd", "d_model")
    heads = config.size("num_attention_heads", "n_head")
    num_layers = config.size("num_hidden_layers", "n_layer")
    ungrouped = config.values.get("model_type") in _UNGROUPED
    return ModelShape(
        architecture=str(architecture)[:100],
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=config.size(
            "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden
        ),
        num_heads=heads,
        num_kv_heads=heads if ungrouped else config.size("num_key_value_heads", default=heads),
        head_dim=config.size("head_dim", default=max(1, hidden // heads)),
        vocab_size=config.size("vocab_size"),
        max_positions=config.size("max_position_embeddings", "n_positions", default=2048),
        dtype=config.dtype(),
        tied_embeddings=config.values.get("tie_word_embeddings") is True,
        windows=_windows(folder, num_layers),
    )


def _windows(folder: Path, num_layers: int) -> tuple[int | None, ...]:
    """Of each layer, as its family reads them; none where no family does."""
    try:
        config = read_config(folder)
        family = native_family(config)
        if family is not None:
            return tuple(layer.window for layer in family.translate(config).layers)
    except OctavoError:
        pass
    return (None,) * num_layers


@dataclass(slots=True, frozen=True)
class _Config:
    path: Path
    values: dict[str, Any]

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive integer under the first of the names that is there."""
        name = next((n for n in names if self.values.get(n) is not None), None)
        if name is None:
            if default is None:
                raise ModelError(f"{self.path}: {names[0]} is missing")
            return default
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST:
            raise ModelError(f"{self.path}: {name} must be a positive integer, not {value!r:.40}")
        return value

    def dtype(self) -> str:
        """The type of the weights, float32 where the config says none."""
        value = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            raise ModelError(f"{self.path}: dtype is {name!r:.40}; known: {', '.join(_DTYPES)}")
        return name
