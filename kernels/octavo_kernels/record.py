"""What a device keeps of the batch: which of the int32 words of a sequence's record is what, and
the tensors that records, block tables and a step's inputs are in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RECORD_WORDS = 16

# `token` is the newest one; `position` is that of the next to run; `generated` counts the tokens
# drawn; `stream` takes two words, the lower first; then the bits of float32 numbers and top_k;
# `adjusted` is the row of the sampler's adjustments that holds for it, or -1.
RECORD = {
    "token": 0,
    "position": 1,
    "generated": 2,
    "flags": 3,
    "stream": 4,
    "temperature": 6,
    "top_k": 7,
    "top_p": 8,
    "min_p": 9,
    "adjusted": 10,
}

# The step ends by drawing a token for it.
FLAG_SAMPLES = 1
# What it runs next is stored in the cache; after one step it is always.
FLAG_WRITES = 2


@dataclass(frozen=True, slots=True)
class BatchState:
    """int32 tensors: `records` [rows, RECORD_WORDS]; `tables` [rows, width], for each block_size
    tokens one entry a KV group; `batch` [rows], the row of each sequence of the step or -1;
    `query_start` [rows + 1]; `token_at` [rows], where a sequence's tokens begin in `chunk`
    [tokens], or -1 for the one token in its record.
    """

    records: torch.Tensor
    tables: torch.Tensor
    batch: torch.Tensor
    token_at: torch.Tensor
    query_start: torch.Tensor
    chunk: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What a step is given, as large as any step may be.

    int64 `token_ids`, `positions` [tokens] and `slots` [groups, tokens]; int32 `seq_lens` [rows]
    and `block_tables` [groups, rows, width]; of each sequence the parameters of its draw: float32
    `temperature`, `top_p`, `min_p`, int32 `top_k`, `adjusted`, int64 `stream`, `count` [rows].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    stream: torch.Tensor
    count: torch.Tensor
    adjusted: torch.Tensor
