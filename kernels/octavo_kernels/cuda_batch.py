"""The operations on the batch's state on a GPU; shapes were matched. See `batch_state.py`."""

from __future__ import annotations

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import stream_of
from octavo_kernels.record import BatchState, StepBuffers


def apply_updates(words: torch.Tensor, message: torch.Tensor, stretches: int) -> None:
    """Copy each stretch to its place."""
    _cuda.apply_updates(words.data_ptr(), message.data_ptr(), stretches, stream_of(words))


def build_inputs(
    state: BatchState, out: StepBuffers, num_sequences: int, block_size: int, one_token: bool
) -> None:
    """One block a sequence."""
    _cuda.build_inputs(
        records=state.records.data_ptr(),
        tables=state.tables.data_ptr(),
        batch=state.batch.data_ptr(),
        token_at=0 if one_token else state.token_at.data_ptr(),
        query_start=state.query_start.data_ptr(),
        chunk=state.chunk.data_ptr(),
        table_width=state.tables.shape[1],
        groups=len(out.slots),
        block_size=block_size,
        token_ids=out.token_ids.data_ptr(),
        positions=out.positions.data_ptr(),
        slots=out.slots.data_ptr(),
        seq_lens=out.seq_lens.data_ptr(),
        block_tables=out.block_tables.data_ptr(),
        temperature=out.temperature.data_ptr(),
        top_k=out.top_k.data_ptr(),
        top_p=out.top_p.data_ptr(),
        min_p=out.min_p.data_ptr(),
        draw_stream=out.stream.data_ptr(),
        count=out.count.data_ptr(),
        adjusted=out.adjusted.data_ptr(),
        max_tokens=out.slots.shape[1],
        rows=len(out.seq_lens),
        sequences=num_sequences,
        stream=stream_of(state.records),
    )


def record_tokens(
    state: BatchState, tokens: torch.Tensor, drawn: torch.Tensor, counter: torch.Tensor
) -> None:
    """One block for all."""
    _cuda.record_tokens(
        records=state.records.data_ptr(),
        batch=state.batch.data_ptr(),
        tokens=tokens.data_ptr(),
        sequences=len(tokens),
        drawn=drawn.data_ptr(),
        rows=drawn.shape[1],
        counter=counter.data_ptr(),
        stream=stream_of(state.records),
    )
