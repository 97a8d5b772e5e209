"""Fill the decoder's parameters from safetensors files, completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import BinaryIO

import torch

from octavo.checkpoint import TensorEntry
from octavo.errors import ModelError, UnsupportedModelError
from octavo.models.decoder import Parameters
from octavo.models.family import Target

CHUNK_BYTES = 16 << 20

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}


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
        if entry.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{entry.file}: tensor {name} has dtype {entry.dtype}, which is not supported; "
                f"supported: {', '.join(_DTYPES)}"
            )


def load(
    entries: dict[str, TensorEntry],
    targets: dict[str, Target],
    parameters: Parameters,
    progress: Callable[[int, int], None],
) -> None:
    """Read every target's bytes into its rows, casting as needed.

    `progress` is called with bytes done and bytes in all. `check_complete` has passed before.
    """
    total = sum(entries[name].num_bytes for name in targets)
    done = 0
    progress(0, total)
    staging = bytearray(CHUNK_BYTES)
    for file, names in _by_file(entries, targets):
        try:
            with file.file.open("rb", buffering=0) as stream:
                for name in names:
                    for count in _fill(stream, entries[name], targets[name], parameters, staging):
                        done += count
                        progress(done, total)
        except OSError as error:
            raise ModelError(f"{file.file} cannot be read: {error.strerror}") from error


def _by_file(
    entries: dict[str, TensorEntry], targets: Iterable[str]
) -> Iterable[tuple[TensorEntry, list[str]]]:
    """Names by file, each file's in the order they lie in it, so that reading is sequential."""
    groups: dict[str, list[str]] = {}
    for name in sorted(targets, key=lambda n: (str(entries[n].file), entries[n].begin)):
        groups.setdefault(str(entries[name].file), []).append(name)
    return ((entries[names[0]], names) for names in groups.values())


def _fill(
    stream: BinaryIO,
    entry: TensorEntry,
    target: Target,
    parameters: Parameters,
    staging: bytearray,
) -> Iterable[int]:
    """Copy one tensor chunk by chunk; yields the bytes of each."""
    source_dtype = _DTYPES[entry.dtype]
    rows = parameters[target.parameter].narrow(0, target.row, target.rows)
    # What must be turned round is read whole first.
    whole = None if target.arrange is None else torch.empty(target.shape, dtype=rows.dtype)
    destination = rows.reshape(-1) if whole is None else whole.view(-1)
    chunk = CHUNK_BYTES - CHUNK_BYTES % source_dtype.itemsize
    filled = 0
    stream.seek(entry.begin)
    while filled < destination.numel():
        size = min(chunk, (destination.numel() - filled) * source_dtype.itemsize)
        with memoryview(staging)[:size] as window:
            _read_exactly(stream, window, entry)
        count = size // source_dtype.itemsize
        piece = torch.frombuffer(staging, dtype=source_dtype, count=count)
        destination[filled : filled + count].copy_(piece)
        filled += count
        yield size
    if whole is not None and target.arrange is not None:
        rows.copy_(target.arrange(whole))


def _read_exactly(stream: BinaryIO, window: memoryview, entry: TensorEntry) -> None:
    at = 0
    while at < len(window):
        count = stream.readinto(window[at:])  # type: ignore[attr-defined]
        if not count:
            raise ModelError(f"{entry.file} became shorter while it was read; copy it again")
        at += count


def _names(names: list[str]) -> str:
    listed = ", ".join(sorted(names)[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed}{more}) that"
