"""A step plan as the flat arrays that one forward takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo.core.step import ScheduledSequence, StepPlan
from octavo.models.decoder import Batch


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """All sequences' tokens one after another, with their positions, slots and block tables."""
    sequences = plan.sequences
    counts = np.array([len(s.token_ids) for s in sequences], dtype=np.int64)
    starts = np.array([s.start for s in sequences], dtype=np.int64)
    ends = counts.cumsum()
    owner = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(int(counts.sum())) - (ends - counts)[owner] + starts[owner]
    # -1 is no block: a sequence that reaches beyond its table is refused, not given block 0.
    widest = max(len(s.block_table) for s in sequences)
    tables = np.full((len(sequences), widest), -1, dtype=np.int32)
    for row, sequence in enumerate(sequences):
        tables[row, : len(sequence.block_table)] = sequence.block_table
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size
    slots += positions % block_size
    # Slot -1 writes nothing: what these tokens would write is there.
    slots[~np.array([s.writes for s in sequences], dtype=bool)[owner]] = -1
    samples = np.array([s.samples for s in sequences], dtype=bool)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids=tensor(
            np.fromiter((t for s in sequences for t in s.token_ids), np.int64, int(counts.sum()))
        ),
        positions=tensor(positions),
        slots=tensor(slots),
        query_start=tensor(np.concatenate(([0], ends)).astype(np.int32)),
        seq_lens=tensor((starts + counts).astype(np.int32)),
        block_tables=tensor(tables),
        logit_rows=tensor(
            np.concatenate((ends[samples] - 1, *_prompt_rows(sequences, ends - counts)))
        ),
    )


def _prompt_rows(sequences: Sequence[ScheduledSequence], begins: np.ndarray) -> list[np.ndarray]:
    """Those that are wanted for log-probabilities of prompts; they follow those that sample."""
    return [
        begin + np.array(rows, dtype=np.int64)
        for sequence, begin in zip(sequences, begins, strict=True)
        if (rows := sequence.prompt_logprob_rows)
    ]
