"""What the operations on the batch's state mean, in torch; see `batch_state.py`."""

from __future__ import annotations

import torch

from octavo_kernels.record import FLAG_SAMPLES, FLAG_WRITES, RECORD, BatchState, StepBuffers


def apply_updates(words: torch.Tensor, message: torch.Tensor, stretches: int) -> None:
    """Copy each stretch to its place."""
    for i in range(stretches):
        to, length, begin = message[1 + 3 * i : 4 + 3 * i].tolist()
        words[to : to + length] = message[begin : begin + length]


def build_inputs(
    state: BatchState, out: StepBuffers, num_sequences: int, block_size: int, one_token: bool
) -> None:
    """One sequence after another."""
    for i in range(num_sequences):
        begin = i if one_token else int(state.query_start[i])
        end = i + 1 if one_token else int(state.query_start[i + 1])
        row = int(state.batch[i])
        if row < 0:
            _pad(out, i, begin, end)
            continue
        record = state.records[row]
        start, flags = int(record[RECORD["position"]]), int(record[RECORD["flags"]])
        at = -1 if one_token else int(state.token_at[i])
        tokens = record[:1] if at < 0 else state.chunk[at : at + end - begin]
        # A token on its way is in the record; one that came to nothing does no harm as 0.
        out.token_ids[begin:end] = torch.where(tokens < 0, record[0], tokens).clamp(min=0)
        positions = torch.arange(start, start + end - begin, device=record.device)
        out.positions[begin:end] = positions
        out.seq_lens[i] = start + end - begin
        groups = len(out.slots)
        covering = -(-(start + end - begin) // block_size)
        table = state.tables[row, : covering * groups].view(covering, groups).t()
        out.block_tables[:, i, :covering] = table
        blocks = table[:, positions // block_size].long()
        slots = blocks * block_size + positions % block_size
        stored = (blocks >= 0) & bool(flags & FLAG_WRITES)
        out.slots[:, begin:end] = torch.where(stored, slots, -1)
        _draw(out, i, record, flags)
        record[RECORD["position"]] += end - begin
        record[RECORD["generated"]] += flags & FLAG_SAMPLES
        record[RECORD["flags"]] = flags | FLAG_WRITES


def _pad(out: StepBuffers, i: int, begin: int, end: int) -> None:
    out.token_ids[begin:end] = 0
    out.positions[begin:end] = 0
    out.slots[:, begin:end] = -1
    out.seq_lens[i] = 0
    _no_draw(out, i)


def _no_draw(out: StepBuffers, i: int) -> None:
    """What costs the sampler least: the largest logit."""
    out.temperature[i] = out.min_p[i] = 0
    out.top_p[i] = 1
    out.top_k[i] = -1
    out.stream[i] = out.count[i] = 0
    out.adjusted[i] = -1


def _draw(out: StepBuffers, i: int, record: torch.Tensor, flags: int) -> None:
    if not flags & FLAG_SAMPLES:
        _no_draw(out, i)
        return
    for name in ("temperature", "top_p", "min_p"):
        getattr(out, name)[i] = record[RECORD[name]].view(torch.float32)
    out.top_k[i] = record[RECORD["top_k"]]
    out.adjusted[i] = record[RECORD["adjusted"]]
    out.count[i] = record[RECORD["generated"]]
    out.stream[i] = record[RECORD["stream"] : RECORD["stream"] + 2].clone().view(torch.int64)[0]


def record_tokens(
    state: BatchState, tokens: torch.Tensor, drawn: torch.Tensor, counter: torch.Tensor
) -> None:
    """One sequence after another."""
    drawn[int(counter[0]) % 2, : len(tokens)] = tokens
    for i, token in enumerate(tokens):
        row = int(state.batch[i])
        if row >= 0 and int(state.records[row, RECORD["flags"]]) & FLAG_SAMPLES:
            state.records[row, RECORD["token"]] = token
    counter += 1
