"""Decode steps as CUDA graphs, one for each size of batch that is worth having."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

# Beyond this a step is long enough to hide its launches.
LARGEST = 512

logger = logging.getLogger(__name__)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then every 8 up to 256, then every 16; the last one holds `max_num_seqs`."""
    most = min(max_num_seqs, LARGEST)
    steps = [1, 2, 4, *range(8, 257, 8), *range(272, LARGEST + 1, 16)]
    return [size for i, size in enumerate(steps) if i == 0 or steps[i - 1] < most]


class DecodeRunner(Protocol):
    """Runs the decode step of a batch padded to some size."""

    @property
    def largest(self) -> int:
        """Sequences that it takes at most."""
        ...

    def run(self, num_sequences: int) -> None:
        """Run a step of at least that many sequences."""
        ...

    def prepare_one(self) -> bool:
        """Prepare one more size while there is time; False when all are."""
        ...


class Direct:
    """Every operation is launched by itself."""

    def __init__(self, step: Callable[[int], None], largest: int) -> None:
        self._step = step
        self.largest = largest

    def run(self, num_sequences: int) -> None:
        """Run the step as it is."""
        self._step(num_sequences)

    def prepare_one(self) -> bool:
        """Nothing to prepare."""
        return False


class CudaGraphs:
    """Graphs of `step(size)`, captured when a size is first needed or there is time.

    `rehearse(size)` runs the same operations to no effect: libraries load what they need at the
    first call, which a capture does not allow. All graphs share one pool of memory, so none may be
    replayed while another runs; on one stream none is.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        rehearse: Callable[[int], None],
        sizes: list[int],
    ) -> None:
        self._step = step
        self._rehearse = rehearse
        self._sizes = sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._padded = _paddings(sizes)
        self._pool: Any = None
        self.largest = sizes[-1]

    def run(self, num_sequences: int) -> None:
        """Replay the graph of the next size, on the current stream."""
        size = self._padded[num_sequences]
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._capture(size)
        graph.replay()

    def prepare_one(self) -> bool:
        """Capture the smallest size that is missing."""
        missing = next((size for size in self._sizes if size not in self._graphs), None)
        if missing is None:
            return False
        self._capture(missing)
        return True

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        begin = time.monotonic()
        self._rehearse(size)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (readers of weights, a profiler) may call the runtime meanwhile.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            self._step(size)
        finally:
            graph.capture_end()
        self._graphs[size] = graph
        taken = 1000 * (time.monotonic() - begin)
        logger.info("captured the decode step of %d sequences in %.0f ms", size, taken)
        return graph


def _paddings(sizes: list[int]) -> list[int]:
    """The size to take, by the number of sequences."""
    padded, at = [], 0
    for count in range(sizes[-1] + 1):
        at += sizes[at] < count
        padded.append(sizes[at])
    return padded
