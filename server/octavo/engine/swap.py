"""Host memory for the blocks of preempted sequences, and the copies to it and back."""

from __future__ import annotations

import time

import torch

from octavo.core.step import StepPlan
from octavo_kernels import ops

# Blocks that are copied to measure how long one takes.
_MEASURED = 16


def host_bytes(nbytes: int, device: torch.device) -> int:
    """What so many bytes of blocks take: pinned, torch makes them the next power of two."""
    return 1 << (nbytes - 1).bit_length() if device.type == "cuda" else nbytes


class HostBlocks:
    """Blocks beside those of `kv_cache` [layers, 2, blocks, block_size, kv_heads, head_dim].

    `num_blocks` includes the null block. On a GPU the memory is pinned, so that it is copied as
    fast as the bus allows and without the host's waiting. Raises `RuntimeError` where there is not
    so much.
    """

    def __init__(self, kv_cache: torch.Tensor, num_blocks: int) -> None:
        self._cache = kv_cache.flatten(0, 1)
        shape = (num_blocks, self._cache.shape[0], *self._cache.shape[2:])
        on_gpu = kv_cache.device.type == "cuda"
        self._host = torch.empty(shape, dtype=kv_cache.dtype, pin_memory=on_gpu)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> None:
        """The step's copies, out before in: what one needs the other may free. On this stream."""
        if plan.swap_out:
            ops.swap_blocks(self._cache, self._host, self._pairs(plan.swap_out), "out")
        if plan.swap_in:
            ops.swap_blocks(self._cache, self._host, self._pairs(plan.swap_in), "in")

    def _pairs(self, pairs: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return torch.tensor(pairs, dtype=torch.int64, device=self._cache.device)

    def seconds_per_block(self) -> float:
        """Measured: some blocks out and in again, while nothing else runs; the contents stay."""
        count = min(_MEASURED, len(self._host), self._cache.shape[1])
        pairs = tuple((block, block) for block in range(count))
        there_and_back = StepPlan((), swap_out=pairs, swap_in=pairs)
        self.run(there_and_back)
        self._wait()
        begin = time.perf_counter()
        self.run(there_and_back)
        self._wait()
        return (time.perf_counter() - begin) / (2 * count)

    def _wait(self) -> None:
        if self._cache.is_cuda:
            torch.cuda.synchronize(self._cache.device)
