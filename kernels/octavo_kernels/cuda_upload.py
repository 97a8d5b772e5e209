"""Bytes of files to the GPU by threads that need no interpreter; torch need not be there yet."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

# A file's number, the place in it, the place in the memory, and how many bytes.
Piece = tuple[int, int, int, int]


class Upload(Protocol):
    """What is under way to the first GPU, and the memory there, which lives as long as this.

    torch takes a tensor of bytes from it by `__cuda_array_interface__`.
    """

    @property
    def done(self) -> int:
        """Bytes that were read."""
        ...

    def wait(self, seconds: float) -> bool:
        """Whether everything is on the device; waits so long. RuntimeError for what went wrong."""
        ...


def upload(
    paths: Sequence[str], pieces: Sequence[Piece], total: int, readers: int
) -> Upload | None:
    """Begin to send pieces of files to `total` bytes of a GPU's memory, with so many threads.

    None where the GPU module was not built.
    """
    try:
        compiled = importlib.import_module("octavo_kernels._cuda")
    except ImportError:
        return None
    found: Upload = compiled.Upload(list(paths), list(pieces), total, readers)
    return found
