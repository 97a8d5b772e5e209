"""Fill the decoder's parameters from safetensors files, completely or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from octavo.checkpoint import TensorEntry
from octavo.engine.tensors import FLOATS
from octavo.errors import ModelError
from octavo.models.decoder import Parameters
from octavo.models.family import Target

CHUNK_BYTES = 16 << 20
# Enough to keep a disk or a network file system busy, few enough to be no burden on two cores.
READERS = 4
# A GPU takes four times what four readers bring from the page cache. Each has pinned memory for
# two chunks, to fill one while the other is on its way.
GPU_READERS = 12
GPU_CHUNK_BYTES = 4 << 20

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in FLOATS.items()}


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

    `progress` is called with bytes done and bytes in all. `tensors.check_complete` has
    passed before.
    """
    total = sum(entries[name].num_bytes for name in targets)
    done = 0
    progress(0, total)
    device = next(iter(parameters.values())).device
    on_gpu = device.type == "cuda"
    readers = min(GPU_READERS, os.cpu_count() or READERS) if on_gpu else READERS
    pieces = _pieces(entries, targets, GPU_CHUNK_BYTES if on_gpu else CHUNK_BYTES)
    with _Files() as files, ThreadPoolExecutor(readers, thread_name_prefix="weights") as pool:
        reader = _Reader(entries, targets, parameters, files)
        try:
            for size in pool.map(reader.read, pieces):
                done += size
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if on_gpu:
        torch.cuda.synchronize(device)


def _pieces(
    entries: dict[str, TensorEntry], targets: dict[str, Target], chunk_bytes: int
) -> list[_Piece]:
    """All there is to read, in the order in which it lies in the files."""
    found = []
    for name in sorted(targets, key=lambda n: (str(entries[n].file), entries[n].begin)):
        elements = math.prod(entries[name].shape)
        # What must be turned round is read whole.
        size = max(1, chunk_bytes // _DTYPES[entries[name].dtype].itemsize)
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


class _HostBuffer:
    """Memory to read into; what is copied out of it has left when the copy returns."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """Bytes to be overwritten."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8)
        return self._bytes[:size]

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Around the copy out of what was taken last."""
        yield


class _PinnedBuffers:
    """Two pieces of memory that a GPU reads by itself, and a stream of its own for that."""

    def __init__(self, device: torch.device) -> None:
        self._bytes = [_pinned(GPU_CHUNK_BYTES) for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in range(2)]
        self._stream = torch.cuda.Stream(device)
        self._turn = 0

    def take(self, size: int) -> torch.Tensor:
        """Bytes to be overwritten, once what was in them has left."""
        self._turn ^= 1
        self._left[self._turn].synchronize()
        if len(self._bytes[self._turn]) < size:  # a tensor that must be read whole
            self._bytes[self._turn] = _pinned(size)
        return self._bytes[self._turn][:size]

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Around the copy out of what was taken last, which goes on when this is over."""
        with torch.cuda.stream(self._stream):
            yield
        self._left[self._turn].record(self._stream)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


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
        rows = self._parameters[target.parameter].narrow(0, target.row, target.rows)
        buffer = self._buffer(rows.device)
        found = buffer.take(size)
        try:
            with found.numpy().data as window:
                self._fill(window, entry, entry.begin + piece.first * dtype.itemsize)
        except OSError as error:
            raise ModelError(f"{entry.file} cannot be read: {error.strerror}") from error
        found = found.view(dtype)
        with buffer.leaving():
            if target.arrange is None:
                to = rows.reshape(-1)[piece.first : piece.first + piece.count]
                to.copy_(found, non_blocking=True)
            else:
                rows.copy_(target.arrange(found.view(target.shape).to(rows.dtype)))
        return size

    def _buffer(self, device: torch.device) -> _HostBuffer | _PinnedBuffers:
        buffer: _HostBuffer | _PinnedBuffers | None = getattr(self._own, "buffer", None)
        if buffer is None:
            on_gpu = device.type == "cuda"
            buffer = self._own.buffer = _PinnedBuffers(device) if on_gpu else _HostBuffer()
        return buffer

    def _fill(self, window: memoryview, entry: TensorEntry, offset: int) -> None:
        descriptor, at = self._files.descriptor(entry.file), 0
        while at < len(window):
            count = os.preadv(descriptor, [window[at:]], offset + at)
            if not count:
                raise ModelError(f"{entry.file} became shorter while it was read; copy it again")
            at += count


def randomize(parameters: Parameters, seed: int, norm_offset: float) -> None:
    """Fill the parameters as if they had been loaded: N(0, 0.02), and norms that change nothing.

    `norm_offset` is what the model's norms add to their weight.
    """
    for index, (name, tensor) in enumerate(parameters.items()):
        if name.endswith("norm"):
            tensor.fill_(1.0 - norm_offset)
            continue
        generator = torch.Generator(tensor.device).manual_seed(seed + index)
        tensor.normal_(0.0, 0.02, generator=generator)
