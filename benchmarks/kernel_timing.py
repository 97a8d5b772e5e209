"""Timing of GPU kernels: many calls in one CUDA graph, replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPLAYS = 7
# Times the L2 cache of the largest GPU: what calls in a row touch together, at the least.
ROTATED_BYTES = 4 * 64 * 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    device: str
    copy_bytes_s: float  # read and written
    product_flop_s: float  # bf16

    def as_json(self) -> dict[str, object]:
        return {
            "device": self.device,
            "copy_TB_s": round(self.copy_bytes_s / 1e12, 3),
            "bf16_TFLOP_s": round(self.product_flop_s / 1e12, 1),
            "torch": torch.__version__,
        }


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call: the median replay of a graph that makes all of them, by their number.

    A kernel may begin while the one before it ends, as in the engine.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(times) / len(calls)


def rotations(bytes_of_a_call: int, least: int = 2, most: int = 64) -> int:
    """How many sets of buffers to go through so that no call finds its own in the cache."""
    return min(most, max(least, -(-ROTATED_BYTES // bytes_of_a_call)))
