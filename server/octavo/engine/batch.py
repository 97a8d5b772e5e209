"""A step plan as the flat arrays that one forward takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch

from octavo.core.step import PENDING, ScheduledSequence, StepPlan
from octavo.models.decoder import Batch


def resolve(plan: StepPlan, drawn: Mapping[int, int]) -> StepPlan:
    """The plan with every `PENDING` token replaced by what was `drawn` for its sequence.

    Where nothing could be drawn the sequence is over, and what this step makes of it is void: it
    runs on token 0. Raises `RuntimeError` where the plan before drew nothing for the sequence.
    """
    if not any(s.token_ids[-1] == PENDING for s in plan.sequences):
        return plan
    sequences = []
    for share in plan.sequences:
        if share.token_ids[-1] == PENDING:
            if share.seq_id not in drawn:
                raise RuntimeError(
                    f"sequence {share.seq_id} waits for a token that the plan before does not draw"
                )
            known = [*share.token_ids[:-1], max(0, drawn[share.seq_id])]
            share = msgspec.structs.replace(share, token_ids=known)
        sequences.append(share)
    return StepPlan(tuple(sequences), plan.copies, plan.preempted)


def build_batch(
    plan: StepPlan, block_size: int, device: torch.device, num_groups: int = 1
) -> Batch:
    """All sequences' tokens one after another, with their positions, slots and block tables.

    Sequences with one token come first, else in the plan's order; `logit_rows` keep that order.
    A sequence's table has `num_groups` entries a row, one for each group of layers.
    """
    order, num_decodes = decodes_first(plan.sequences)
    sequences = [plan.sequences[i] for i in order]
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
    of_groups = [np.ascontiguousarray(tables[:, g::num_groups]) for g in range(num_groups)]
    silent = ~np.array([s.writes for s in sequences], dtype=bool)[owner]
    begins_planned, ends_planned = np.empty_like(ends), np.empty_like(ends)
    begins_planned[order], ends_planned[order] = ends - counts, ends
    samples = np.array([s.samples for s in plan.sequences], dtype=bool)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids=tensor(
            np.fromiter((t for s in sequences for t in s.token_ids), np.int64, int(counts.sum()))
        ),
        positions=tensor(positions),
        slots=tuple(
            tensor(_slots(table[owner, positions // block_size], positions, block_size, silent))
            for table in of_groups
        ),
        query_start=tensor(np.concatenate(([0], ends)).astype(np.int32)),
        seq_lens=tensor((starts + counts).astype(np.int32)),
        block_tables=tuple(tensor(table) for table in of_groups),
        logit_rows=tensor(
            np.concatenate(
                (ends_planned[samples] - 1, *_prompt_rows(plan.sequences, begins_planned))
            )
        ),
        num_decodes=num_decodes,
        max_query_len=int(counts.max()),
    )


def _slots(
    blocks: np.ndarray, positions: np.ndarray, block_size: int, silent: np.ndarray
) -> np.ndarray:
    """Where tokens are stored; -1 for the silent, whose keys and values are in their slots."""
    slots: np.ndarray = blocks.astype(np.int64) * block_size + positions % block_size
    slots[silent] = -1
    return slots


def decodes_first(sequences: Sequence[ScheduledSequence]) -> tuple[list[int], int]:
    """The order in which sequences with one token come first, and how many those are."""
    one = [i for i, s in enumerate(sequences) if len(s.token_ids) == 1]
    more = [i for i, s in enumerate(sequences) if len(s.token_ids) != 1]
    return one + more, len(one)


def _prompt_rows(sequences: Sequence[ScheduledSequence], begins: np.ndarray) -> list[np.ndarray]:
    """Those that are wanted for log-probabilities of prompts; they follow those that sample."""
    return [
        begin + np.array(rows, dtype=np.int64)
        for sequence, begin in zip(sequences, begins, strict=True)
        if (rows := sequence.prompt_logprob_rows)
    ]
