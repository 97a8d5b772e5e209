"""Fill the decoder's parameters from safetensors files, completely or not at all."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from octavo.checkpoint import TensorEntry
from octavo.errors import ModelError, UnsupportedModelError
from octavo.models.decoder import Parameters
from octavo.models.family import Target

CHUNK_BYTES = 16 << 20
# Enough to keep a disk or a network file system busy, few enough to be no burden on two cores.
READERS = 4

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


@dataclass(slots=True, frozen=True)
class _Piece:
    """`count` elements of a tensor from element `first`: what one read brings."""

    name: str
    first: int
    count: int


def load(
    entries: dict[str, TensorEntry],
    targets: dict[str, Target],
    parameters: Parameters,
    progress: Callable[[int, int], None],
) -> None:
    """Read every target's bytes into its rows, casting as needed, with several readers.

    `progress` is called with bytes done and bytes in all. `check_complete` has passed before.
    """
    total = sum(entries[name].num_bytes for name in targets)
    done = 0
    progress(0, total)
    with _Files() as files, ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        reader = _Reader(entries, targets, parameters, files)
        try:
            for size in pool.map(reader.read, _pieces(entries, targets)):
                done += size
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _pieces(entries: dict[str, TensorEntry], targets: dict[str, Target]) -> list[_Piece]:
    """All there is to read, in the order in which it lies in the files."""
    found = []
    for name in sorted(targets, key=lambda n: (str(entries[n].file), entries[n].begin)):
        elements = math.prod(entries[name].shape)
        # What must be turned round is read whole.
        size = max(1, CHUNK_BYTES // _DTYPES[entries[name].dtype].itemsize)
        step = elements if targets[name].arrange is not None else size
        found += [
            _Piece(name, first, min(step, elements - first))
            for first in range(0, elements, max(1, step))
        ]
    return found


class _Files:
    """Descriptors of the files, opened once each; reading at an offset needs no others."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def descriptor(self, path: Path) -> int:
        """The file's descriptor."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]


class _Reader:
    """Reads pieces; every thread has a buffer of its own."""

    def __init__(
        self,
        entries: dict[str, TensorEntry],
        targets: dict[str, Target],
        parameters: Parameters,
        files: _Files,
    ) -> None:
        self._entries = entries
        self._targets = targets
        self._parameters = parameters
        self._files = files
        self._own = threading.local()

    @torch.inference_mode()  # which a thread does not take over from the one that started it
    def read(self, piece: _Piece) -> int:
        """Put one piece where it belongs; the bytes that it took in the file."""
        entry, target = self._entries[piece.name], self._targets[piece.name]
        dtype = _DTYPES[entry.dtype]
        size = piece.count * dtype.itemsize
        buffer = self._buffer(size)
        try:
            with memoryview(buffer)[:size] as window:
                self._fill(window, entry, entry.begin + piece.first * dtype.itemsize)
        except OSError as error:
            raise ModelError(f"{entry.file} cannot be read: {error.strerror}") from error
        found = torch.frombuffer(buffer, dtype=dtype, count=piece.count)
        rows = self._parameters[target.parameter].narrow(0, target.row, target.rows)
        if target.arrange is None:
            rows.reshape(-1)[piece.first : piece.first + piece.count].copy_(found)
        else:
            rows.copy_(target.arrange(found.view(target.shape).to(rows.dtype)))
        return size

    def _buffer(self, size: int) -> bytearray:
        if len(getattr(self._own, "buffer", b"")) < size:
            self._own.buffer = bytearray(max(size, CHUNK_BYTES))
        buffer: bytearray = self._own.buffer
        return buffer

    def _fill(self, window: memoryview, entry: TensorEntry, offset: int) -> None:
        descriptor, at = self._files.descriptor(entry.file), 0
        while at < len(window):
            count = os.preadv(descriptor, [window[at:]], offset + at)
            if not count:
                raise ModelError(f"{entry.file} became shorter while it was read; copy it again")
            at += count


def _names(names: list[str]) -> str:
    listed = ", ".join(sorted(names)[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed}{more}) that"
