"""Steps as CUDA graphs, one for each size that is worth having: decodes by their sequences, whole
and with the draws; steps with chunks by their tokens, up to the last layer's attention.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from octavo.plan import GRAPH_TOKENS

# Beyond this a step of decodes is long enough to hide its launches, as chunks are of GRAPH_TOKENS.
LARGEST = 512

logger = logging.getLogger(__name__)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then every 8 up to 256, then every 16; the last is `max_num_seqs`, if not larger:
    there is no room for more rows than that, not even for padding.
    """
    most = min(max_num_seqs, LARGEST)
    steps = [1, 2, 4, *range(8, 257, 8), *range(272, LARGEST + 1, 16)]
    return [*(size for size in steps if size < most), most]


def chunk_sizes(max_tokens: int) -> list[int]:
    """From 16, closer than products become slower: every 32 up to 512, every 64 up to 1,024, then
    every 128. Above 256 at most an eighth of a step is padding.
    """
    most = min(max_tokens, GRAPH_TOKENS)
    steps = [16, 32, 48, 64, *range(96, 513, 32), *range(576, 1025, 64), *range(1152, 2049, 128)]
    return [*(size for size in steps if size < most), most]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step, for a size: `run` is what is captured, `rehearse` the same operations to no
    effect. `tune` finds what is fastest in it, which takes several times as long as a capture.
    """

    run: Callable[[int], None]
    rehearse: Callable[[int], None]
    tune: Callable[[int], None]


class PartRunner(Protocol):
    """Runs a part of a step, padded to some size."""

    @property
    def largest(self) -> int:
        """The largest size."""
        ...

    def ready(self, count: int) -> int:
        """The size that takes so many, which can be run from now on. It may be rehearsed here: what
        a step needs goes to the buffers after that.
        """
        ...

    def run(self, size: int) -> None:
        """Run a size that is ready."""
        ...

    def prepare_one(self) -> bool:
        """Prepare one more size while there is time; False when all are."""
        ...


class Direct:
    """Every operation is launched by itself."""

    def __init__(self, part: Part, largest: int) -> None:
        self._part = part
        self.largest = largest

    def ready(self, count: int) -> int:
        """As many as they are."""
        return count

    def run(self, size: int) -> None:
        """Run the part as it is."""
        self._part.run(size)

    def prepare_one(self) -> bool:
        """Nothing to prepare."""
        return False


class GraphMemory:
    """What captured operations need in between, shared by all graphs: none may be replayed while
    another runs; on one stream none is. `nbytes` is what the largest of them takes: taken as one
    piece at the first capture, it serves all sizes in whatever order they come.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._nbytes = nbytes
        self._device = device
        self._pool: Any = None

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of what `run` queues on the current stream."""
        first = self._pool is None
        if first:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (readers of weights, a profiler) may call the runtime meanwhile.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            if first:
                torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            run()
        finally:
            graph.capture_end()
        return graph


class CudaGraphs:
    """Graphs of a part of the step, captured when a size is first needed or there is time.

    They are rehearsed first: libraries load what they need at the first call, which a capture does
    not allow. Who needs a size now does not wait for what is fastest in it; it is captured again
    with that when there is time. `name` says what the sizes count.
    """

    def __init__(self, part: Part, sizes: list[int], memory: GraphMemory, name: str) -> None:
        self._part = part
        self._sizes = sizes
        self._memory = memory
        self._name = name
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._tuned: set[int] = set()
        self._padded = _paddings(sizes)
        self.largest = sizes[-1]

    def ready(self, count: int) -> int:
        """The next size, captured."""
        size = self._padded[count]
        if size not in self._graphs:
            self._capture(size)
        return size

    def run(self, size: int) -> None:
        """Replay its graph on the current stream."""
        self._graphs[size].replay()

    def prepare_one(self) -> bool:
        """Tune and capture the smallest size that is not."""
        size = next((size for size in self._sizes if size not in self._tuned), None)
        if size is None:
            return False
        begin = time.monotonic()
        self._part.tune(size)
        self._tuned.add(size)
        taken = 1000 * (time.monotonic() - begin)
        logger.debug("tuned the step of %d %s in %.0f ms", size, self._name, taken)
        self._capture(size)
        return True

    def _capture(self, size: int) -> None:
        begin = time.monotonic()
        self._part.rehearse(size)
        self._graphs[size] = self._memory.capture(lambda: self._part.run(size))
        taken = 1000 * (time.monotonic() - begin)
        logger.info("captured the step of %d %s in %.0f ms", size, self._name, taken)


def _paddings(sizes: list[int]) -> list[int]:
    """The size to take, by what it counts."""
    padded, at = [], 0
    for count in range(sizes[-1] + 1):
        at += sizes[at] < count
        padded.append(sizes[at])
    return padded
