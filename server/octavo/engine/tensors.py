"""Which tensors of a checkpoint a model takes: all of them there, right in shape and type.

Needs no torch: a start looks at them while torch is still to be imported.
"""

from __future__ import annotations

from octavo.checkpoint import TensorEntry
from octavo.errors import ModelError, UnsupportedModelError
from octavo.models.family import Target

# The types that weights may have: the files' names, and torch's.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def with_prefix(entries: dict[str, TensorEntry], prefix: str) -> dict[str, TensorEntry]:
    """The tensors by full name, where a family's older checkpoints leave its prefix out."""
    if any(name.startswith(prefix) for name in entries):
        return entries
    return {prefix + name: entry for name, entry in entries.items()}


def check_complete(
    entries: dict[str, TensorEntry], targets: dict[str, Target], ignored: tuple[str, ...]
) -> None:
    """Raise unless each wanted tensor is there in its shape and nothing else is."""
    folder = next(iter(entries.values())).file.parent if entries else None
    missing = [name for name in targets if name not in entries]
    if missing:
        raise ModelError(
            f"the checkpoint in {folder} lacks {_names(missing)} config.json calls for"
        )
    surplus = [n for n in entries if n not in targets and not n.endswith(ignored)]
    if surplus:
        raise ModelError(
            f"the checkpoint in {folder} holds {_names(surplus)} config.json has no place for; "
            "do config.json and the weights belong together?"
        )
    for name, target in targets.items():
        entry = entries[name]
        if entry.shape != target.shape:
            raise ModelError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but config.json "
                f"calls for {list(target.shape)}"
            )
        if entry.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"{entry.file}: tensor {name} has dtype {entry.dtype}, which is not supported; "
                f"supported: {', '.join(FLOATS)}"
            )


def _names(names: list[str]) -> str:
    listed = ", ".join(sorted(names)[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed}{more}) that"
