"""The state of the batch on the device: sequences' records and block tables, and a step's inputs.

A sequence has a row: a record of RECORD_WORDS int32 words and a block table. `build_inputs` makes
of the rows in the batch what a forward takes and moves them on by the tokens that it runs;
`record_tokens` puts what was drawn where the next step finds it. So a sequence that decodes needs
nothing from the host.
"""

from __future__ import annotations

import torch

from octavo_kernels.dispatch import run
from octavo_kernels.match import Arg, match
from octavo_kernels.record import (
    FLAG_SAMPLES,
    FLAG_WRITES,
    RECORD,
    RECORD_WORDS,
    BatchState,
    StepBuffers,
)

__all__ = [
    "FLAG_SAMPLES", "FLAG_WRITES", "RECORD", "RECORD_WORDS", "BatchState", "StepBuffers",
    "apply_updates", "build_inputs", "record_tokens",
]  # fmt: skip


def apply_updates(words: torch.Tensor, message: torch.Tensor, stretches: int) -> None:
    """Write the message's stretches into `words` (both int32, flat).

    `message` begins with their number, which the host has to know too; for each of them where in
    `words` it goes, its length and where in the message its words are; then those words. No word
    is written by two stretches.
    """
    match(
        "apply_updates",
        Arg("words", words, "words", torch.int32),
        Arg("message", message, "length", torch.int32),
    )
    run("apply_updates", words, words, message, stretches)


def build_inputs(
    state: BatchState,
    out: StepBuffers,
    num_sequences: int,
    block_size: int,
    *,
    one_token: bool,
) -> None:
    """Fill `out` for the first `num_sequences` entries of `state.batch`, and move their rows on.

    With `one_token` each of them has the one token in its record; `query_start`, `token_at` and
    `chunk` are not read. An entry -1 is padding: no token is stored, and `seq_lens` is 0. Of the
    block tables only what covers a sequence's tokens is written.
    """
    match(
        "build_inputs",
        Arg("records", state.records, "rows words", torch.int32),
        Arg("tables", state.tables, "rows entries", torch.int32),
        Arg("batch", state.batch, "rows", torch.int32),
        Arg("token_at", state.token_at, "rows", torch.int32),
        Arg("chunk", state.chunk, "tokens", torch.int32),
        Arg("token_ids", out.token_ids, "tokens", torch.int64),
        Arg("positions", out.positions, "tokens", torch.int64),
        Arg("slots", out.slots, "groups tokens", torch.int64),
        Arg("seq_lens", out.seq_lens, "rows", torch.int32),
        Arg("block_tables", out.block_tables, "groups rows width", torch.int32),
    )
    if state.records.shape[1] != RECORD_WORDS or num_sequences > len(state.batch):
        raise ValueError(
            f"build_inputs: records of {state.records.shape[1]} words and {num_sequences} "
            f"sequences; a record has {RECORD_WORDS} and there are {len(state.batch)} rows"
        )
    groups, _, width = out.block_tables.shape
    if groups * width != state.tables.shape[1]:
        raise ValueError(
            f"build_inputs: {groups} groups of {width} blocks do not make up a table of "
            f"{state.tables.shape[1]} entries"
        )
    run("build_inputs", state.records, state, out, num_sequences, block_size, one_token)


def record_tokens(
    state: BatchState, tokens: torch.Tensor, drawn: torch.Tensor, counter: torch.Tensor
) -> None:
    """Put the tokens (int32) of the batch's first sequences into their records, where they sample.

    Row `counter % 2` of `drawn` (int32 [2, rows]) gets them all; then `counter` (int32 [1]) is one
    more: the tokens of a step can be read while the next one runs.
    """
    match(
        "record_tokens",
        Arg("records", state.records, "rows words", torch.int32),
        Arg("batch", state.batch, "rows", torch.int32),
        Arg("tokens", tokens, "sequences", torch.int32),
        Arg("drawn", drawn, "two rows", torch.int32),
        Arg("counter", counter, "one", torch.int32),
    )
    run("record_tokens", state.records, state, tokens, drawn, counter)
