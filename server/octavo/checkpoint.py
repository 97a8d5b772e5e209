"""What a model folder's safetensors files hold, checked before anything is read or allocated.

Standard library only: the memory plan needs it where torch is not installed.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from octavo.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Bits an element takes, for every type that the format knows.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: bytes `begin`..`end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return self.end - self.begin


def read_checkpoint(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder by name, from the shards of the index or the single file."""
    index = folder / INDEX_NAME
    if index.exists():
        return _read_shards(folder, index)
    single = folder / SINGLE_NAME
    if single.exists():
        return read_header(single)
    raise ModelError(_nothing_to_load(folder))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, after checking that the file really holds them."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header, data_start = _read_header_json(path, file, size)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    entries = {
        name: _entry(path, name, value, data_start, size)
        for name, value in header.items()
        if name != "__metadata__"
    }
    _check_coverage(path, entries, data_start, size)
    return entries


def _read_header_json(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ModelError(f"{path} is truncated: {size} bytes, a safetensors file has at least 8")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path} is not a safetensors file: it claims a header of {length} bytes "
            f"(limit {MAX_HEADER_BYTES})"
        )
    if 8 + length > size:
        raise ModelError(
            f"{path} is truncated: its header takes {length} bytes, the file has {size - 8} "
            "after the length; copy the file again"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} has a broken safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a broken safetensors header: not a JSON object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict):
        raise ModelError(f"{where} is not described by an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelError(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape):
        raise ModelError(f"{where} has no valid shape")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{where} has no valid data_offsets")
    begin, end = data_start + offsets[0], data_start + offsets[1]
    if end > size:
        raise ModelError(
            f"{where} ends at byte {end}, but the file has only {size}: it is truncated; "
            "copy the file again"
        )
    elements = 1
    for dimension in shape:
        elements *= dimension
    if elements * DTYPE_BITS[dtype] != (end - begin) * 8:
        raise ModelError(
            f"{where} of type {dtype} and shape {shape} does not take {end - begin} bytes"
        )
    return TensorEntry(path, dtype, tuple(shape), begin, end)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """A short list of non-negative integers that fit in 64 bits."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    )


def _check_coverage(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """Tensors follow one another without overlap or hole, from the header to the file's end."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            problem = (
                "overlaps the one before it" if entry.begin < at else "leaves a hole before it"
            )
            raise ModelError(f"{path}: tensor {name[:200]!r} {problem}")
        at = entry.end
    if at != size:
        raise ModelError(f"{path} holds {size - at} bytes after its last tensor")


def _read_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    file_of = _read_index(index)
    shards: dict[str, dict[str, TensorEntry]] = {}
    for file_name in sorted(set(file_of.values())):
        path = folder / file_name
        if not path.is_file():
            raise ModelError(f"{file_name} is missing in {folder}, but {INDEX_NAME} names it")
        shards[file_name] = read_header(path)
    entries: dict[str, TensorEntry] = {}
    for name, file_name in file_of.items():
        if name not in shards[file_name]:
            raise ModelError(
                f"{folder / file_name} lacks tensor {name[:200]!r} that {INDEX_NAME} puts there"
            )
        entries[name] = shards[file_name][name]
    return entries


def _read_index(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise ModelError(f"{index} is larger than {MAX_HEADER_BYTES} bytes; that is no index")
        document = json.loads(index.read_bytes())
    except OSError as error:
        raise ModelError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not valid JSON: {error}") from error
    file_of = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(file_of, dict) or not file_of:
        raise ModelError(f"{index}: weight_map must be an object of tensor name to file name")
    for name, file_name in file_of.items():
        plain = isinstance(file_name, str) and file_name not in ("", ".", "..")
        if not plain or any(c in file_name for c in "/\\\0"):
            raise ModelError(
                f"{index}: weight_map puts {name[:200]!r} in {str(file_name)[:200]!r}, which is "
                "not a plain file name inside the folder"
            )
        if not file_name.endswith(".safetensors"):
            raise ModelError(f"{index}: {file_name[:200]!r} is not a .safetensors file")
    return file_of


def _nothing_to_load(folder: Path) -> str:
    wanted = f"neither {SINGLE_NAME} nor {INDEX_NAME} is in {folder}"
    pickles = sorted(
        p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}
    )
    if not pickles:
        return f"{wanted}; Octavo loads safetensors files only"
    return (
        f"{wanted}; {pickles[0]} is a pickle, which Octavo never loads because it can run code: "
        "save the model with save_pretrained, which writes safetensors"
    )
