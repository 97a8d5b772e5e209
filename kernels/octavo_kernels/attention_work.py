"""What attention on a GPU keeps between its calls: made once, planned once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from octavo_kernels.cuda_prefill import PrefillPlan

ROWS_PER_TILE = 16
# Chunks times key heads should be a few times the blocks that run at once on the largest GPU.
_ITEMS_PER_SEQUENCE = 512


@dataclass(slots=True)
class AttentionWork:
    """Buffers of decode attention, all on one device; see `attention_work`.

    A sequence is cut into chunks of `chunk` tokens, which double until there are at most
    `max_chunks`. For each of `windows` there is a list of chunks. `stages` and `blocks_per_sm` are
    for measurements: 0 is what suits the head dim. `prefill` is the step's plan for the sequences
    that are not decodes.
    """

    max_seqs: int
    heads: int
    kv_heads: int
    dim: int
    chunk: int
    max_chunks: int
    windows: tuple[int, ...]
    window_sizes: torch.Tensor  # int32 [windows]
    chunks: torch.Tensor  # int32 [windows, max_seqs * max_chunks, 4]: decode_attention.h
    counts: torch.Tensor  # int32 [windows]
    ticket: torch.Tensor  # int32 [1]
    arrivals: torch.Tensor  # int32 [max_seqs * kv_heads * tiles of rows]
    values: torch.Tensor  # float32 [max_seqs * max_chunks, heads, dim]
    sums: torch.Tensor  # float32 [max_seqs * max_chunks, heads, 2]
    stages: int = 0
    blocks_per_sm: int = 0
    prefill: PrefillPlan | None = None


def attention_work(
    *,
    max_seqs: int,
    max_seq_len: int,
    heads: int,
    kv_heads: int,
    dim: int,
    device: torch.device | str,
    windows: Sequence[int] = (0,),
    chunk: int = 256,
) -> AttentionWork:
    """Buffers for steps of up to `max_seqs` decodes of layers with any of these `windows`.

    Longer sequences than `max_seq_len` are served too, with less parallelism. The results' bits
    depend on `max_seq_len`, `kv_heads` and `chunk` (tokens, a power of two of 64 or more), and on
    nothing else that is given here. The largest buffer is `values`, at most
    max_seqs * max_chunks * heads * dim * 4 bytes. On a CPU the buffers are empty.
    """
    if chunk < 64 or chunk & (chunk - 1):
        raise ValueError(f"attention_work: chunk must be a power of two of 64 or more, got {chunk}")
    if not windows or min(windows) < 0:
        raise ValueError(f"attention_work: windows must be 0 or more each, got {tuple(windows)}")
    max_chunks = max_chunks_of(max_seq_len, kv_heads, chunk)
    different = tuple(dict.fromkeys(windows))
    seqs = max_seqs if torch.device(device).type == "cuda" else 0
    slots = seqs * max_chunks
    tiles = -(-heads // kv_heads // ROWS_PER_TILE)

    def words(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    return AttentionWork(
        max_seqs=max_seqs,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        chunk=chunk,
        max_chunks=max_chunks,
        windows=different,
        window_sizes=torch.tensor(different, dtype=torch.int32, device=device),
        chunks=words(len(different), slots, 4),
        counts=words(len(different)),
        ticket=words(1).zero_(),
        arrivals=words(seqs * kv_heads * tiles).zero_(),
        values=floats(slots, heads, dim),
        sums=floats(slots, heads, 2),
    )


def max_chunks_of(max_seq_len: int, kv_heads: int, chunk: int) -> int:
    """Into how many chunks a sequence is cut at most: a power of two, 128 or less."""
    enough = min(128, max(32, _power_of_two_from(-(-_ITEMS_PER_SEQUENCE // kv_heads))))
    return min(enough, _power_of_two_from(-(-max_seq_len // chunk)))


def _power_of_two_from(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
