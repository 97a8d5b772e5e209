"""Which sequence stands in which row of the device's tables, and what has to be sent there.

All that a step needs to know of its sequences lies in one array of 32-bit words on the device
(`StateLayout`). The device itself moves a row on by what it ran and by what it drew, so a row that
only decodes costs the host nothing; what changes otherwise is sent as stretches of words. Here it
is decided what those are; no tensors, no device.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from octavo.core.sequence import blocks_for, common_prefix
from octavo.core.step import PENDING, ScheduledSequence, StepPlan, drawn_by_host
from octavo.engine.adjust import adjusts
from octavo.engine.sampler import draw_stream
from octavo.params import SamplingParams
from octavo_kernels.record import FLAG_SAMPLES, FLAG_WRITES, RECORD, RECORD_WORDS

# A stretch of words: where they go, and what they are.
Stretch = tuple[int, Sequence[int]]


@dataclass(frozen=True)
class StateLayout:
    """Where things lie in the device's array of int32 words.

    `records`: RECORD_WORDS for each row. `tables`: each row's block table, one entry for each
    `block_size` tokens and KV group. Then what only the step at hand needs: `batch`, the row of
    each sequence of the batch or -1; `token_at`, where its tokens begin in `chunk`, or -1 for the
    one token in its record; `query_start`, as in `Batch`; `chunk`, tokens that the host sends.
    """

    max_rows: int
    table_width: int
    max_tokens: int
    groups: int = 1

    @cached_property
    def tables(self) -> int:
        """First word of the block tables."""
        return self.max_rows * RECORD_WORDS

    @cached_property
    def batch(self) -> int:
        """First word of the rows in the batch."""
        return self.tables + self.max_rows * self.table_width

    @cached_property
    def token_at(self) -> int:
        """First word of the places of the tokens."""
        return self.batch + self.max_rows

    @cached_property
    def query_start(self) -> int:
        """First word of the ends of queries; one more than rows."""
        return self.token_at + self.max_rows

    @cached_property
    def chunk(self) -> int:
        """First word of the tokens sent."""
        return self.query_start + self.max_rows + 1

    @cached_property
    def num_words(self) -> int:
        """Words in all."""
        return self.chunk + self.max_tokens


@dataclass(slots=True)
class StepInputs:
    """One step as the device sees it.

    The batch is the plan's rows, then its chunks that are decodes as well, then the others; the
    first `num_decodes` sequences are decodes, with one token each, and of the chunks none ends
    behind position `max_chunk_end` of its sequence. `drawn` are the places in the batch of what the
    plan wants tokens of, and `prompt_rows` those of the tokens whose logits are wanted for the
    log-probabilities of prompts, in the plan's order. `sent` has to be on the device before.
    `fresh` are the rows of new sequences whose logits are adjusted.
    """

    num_sequences: int
    num_tokens: int
    num_decodes: int
    max_query_len: int
    drawn: Sequence[int] = ()
    sent: list[Stretch] = field(default_factory=list)
    prompt_rows: list[int] = field(default_factory=list)
    fresh: list[tuple[int, ScheduledSequence]] = field(default_factory=list)
    max_chunk_end: int | None = None

    @property
    def has_chunks(self) -> bool:
        """True when the step is more than a decode and one row of logits for each sequence."""
        return self.num_decodes < self.num_sequences or bool(self.prompt_rows)


@dataclass(slots=True)
class _Row:
    """A sequence's row and what is there: its table, and how it draws, by `params` and `branch`."""

    index: int
    table: list[int]
    params: SamplingParams | None = None
    branch: int = 0


class RowTable:
    """The host's picture of the device's rows, brought forward by one plan after another.

    `seed` is the engine's. With `deterministic` a prompt's token is no decode where its chunk has
    no other: how a prompt is cut depends on who else is there. A row is free again as soon as a
    plan lacks its sequence: the device runs the steps in order, so those in flight have read it
    when it is written again.
    """

    def __init__(
        self, layout: StateLayout, block_size: int, seed: int, *, deterministic: bool = False
    ) -> None:
        self._layout = layout
        self._block_size = block_size
        self._seed = seed
        self._deterministic = deterministic
        self.reset()

    def reset(self) -> None:
        """Know nothing of what is on the device; the next plan must not build on any before."""
        layout = self._layout
        self._rows: dict[int, _Row] = {}
        self._free = list(range(layout.max_rows - 1, -1, -1))
        self._decoding: dict[int, int] = {}  # sequence id to row index, in the batch's order
        self._chunks: dict[int, bool] = {}  # of the last plan: sequence id to whether it drew
        # As it may be on the device: no entry of a larger batch is to be left behind the next one.
        self._batch = [-1] * layout.max_rows
        self._fresh: list[tuple[int, ScheduledSequence]] = []

    def advance(self, plan: StepPlan) -> StepInputs:
        """What the plan needs; the picture afterwards is that of the device after the step.

        Raises `RuntimeError` where the plan does not follow from the one before, and `ValueError`
        where a sequence is beyond its block table.
        """
        sent: list[Stretch] = []
        self._fresh = []
        drew = self._forget(plan)
        joined = plan.rows.joined
        rows = self._place(joined, sent, drew)
        self._decoding.update((share.seq_id, row) for share, row in zip(joined, rows, strict=True))
        for seq_id, block in plan.rows.grown:
            row = self._rows[seq_id]
            sent.append((self._table(row) + len(row.table), (block,)))
            row.table.append(block)
        if len(self._decoding) != plan.rows.count:
            raise RuntimeError(
                f"the plan has {plan.rows.count} rows, but {len(self._decoding)} follow from the "
                "plan before"
            )
        self._chunks = {share.seq_id: share.samples for share in plan.chunks}
        if not plan.chunks:
            if plan.rows.left or plan.rows.joined or len(self._batch) != plan.rows.count:
                self._arrange(list(self._decoding.values()), sent)
            count = plan.rows.count
            inputs = StepInputs(count, count, count, 1, range(count), sent)
        else:
            inputs = self._with_chunks(plan, sent, drew)
        inputs.fresh = self._fresh
        return inputs

    def places(self, seq_ids: Container[int]) -> list[tuple[int, int]]:
        """(place in the batch, sequence id) of those of them that were rows in the last plan."""
        return [(at, seq_id) for at, seq_id in enumerate(self._decoding) if seq_id in seq_ids]

    def token_word(self, seq_id: int) -> int:
        """Where the newest token of a sequence of the last plan lies."""
        return self._rows[seq_id].index * RECORD_WORDS + RECORD["token"]

    def _forget(self, plan: StepPlan) -> dict[int, bool]:
        """Free the rows of those that are in the plan no more; who drew in the plan before."""
        staying = {share.seq_id for share in plan.chunks}
        staying.update(share.seq_id for share in plan.rows.joined)
        drew, rows = self._chunks, plan.rows
        left: Iterable[int] = rows.left
        if len(rows.joined) == rows.count:
            left = tuple(self._decoding)  # also those that another scheduler left behind
        for seq_id in left:
            if seq_id not in self._decoding:
                raise RuntimeError(f"sequence {seq_id} left the rows, but was not among them")
            del self._decoding[seq_id]
            drew[seq_id] = True
        for seq_id in drew.keys() - staying:
            self._free.append(self._rows.pop(seq_id).index)
        return drew

    def _place(
        self, shares: Iterable[ScheduledSequence], sent: list[Stretch], drew: dict[int, bool]
    ) -> list[int]:
        """Send what the device does not know of some sequences; their rows."""
        size, groups, width = self._block_size, self._layout.groups, self._layout.table_width
        indices = list[int]()
        for share in shares:
            seq_id, start, table = share.seq_id, share.start, share.block_table
            end, token = start + len(share.token_ids), share.token_ids[-1]
            if not blocks_for(end, size) * groups <= len(table) <= width:
                raise ValueError(
                    f"sequence {seq_id} has a block table of {len(table)} entries; {end} tokens "
                    f"need {blocks_for(end, size) * groups} and {width} is the most"
                )
            row = self._rows.get(seq_id)
            if row is None:
                row = self._rows[seq_id] = self._new_row()
            index = row.index
            indices.append(index)
            flags = FLAG_SAMPLES * share.samples | FLAG_WRITES * share.writes
            record: tuple[int, ...] = (token, start, share.num_generated, flags)
            # How it draws stays as long as it is one sequence's.
            if row.params is not share.params or row.branch != share.branch:
                record += self._drawing(share, row)
            if token != PENDING:
                sent.append((index * RECORD_WORDS, record))
            elif drew.get(seq_id, False):
                # The token on its way is the first word: it is there already, or soon.
                sent.append((index * RECORD_WORDS + 1, record[1:]))
            else:
                raise RuntimeError(
                    f"sequence {seq_id} waits for a token that the plan before does not draw"
                )
            same = common_prefix(row.table, table)
            if same < len(table):
                sent.append((self._table(row) + same, table[same:]))
            row.table = table.copy()
        return indices

    def _new_row(self) -> _Row:
        if not self._free:
            raise RuntimeError(f"more than {self._layout.max_rows} sequences in one step")
        return _Row(self._free.pop(), [])

    def _drawing(self, share: ScheduledSequence, row: _Row) -> tuple[int, ...]:
        """The record's words behind the first four, of a sequence that is new to the row.

        Another scheduler, as that of a warm-up, may have left one of the same number there.
        """
        p = share.params
        adjusted = -1
        if adjusts(p) and not drawn_by_host(p):
            adjusted = row.index
            if row.params is not p:
                self._fresh.append((row.index, share))
        row.params, row.branch = p, share.branch
        stream = draw_stream(p, self._seed, share.seq_id, share.branch)
        draw = (stream, p.temperature, min(p.top_k, 2**31 - 1), p.top_p, p.min_p)
        packed = struct.pack("<Qfiffi", *draw, adjusted)
        words = struct.unpack(f"<{len(packed) // 4}i", packed)
        return (*words, *(0,) * (RECORD_WORDS - 4 - len(words)))

    def _table(self, row: _Row) -> int:
        return self._layout.tables + row.index * self._layout.table_width

    def _arrange(self, batch: list[int], sent: list[Stretch]) -> None:
        """Send the rows of the batch; behind them nothing is left of a larger one."""
        padding = [-1] * (len(self._batch) - len(batch))
        sent.append((self._layout.batch, batch + padding))
        self._batch = batch

    def _decodes(self, share: ScheduledSequence) -> bool:
        of_prompt = share.start < share.num_prompt_tokens
        return len(share.token_ids) == 1 and not (self._deterministic and of_prompt)

    def _with_chunks(
        self, plan: StepPlan, sent: list[Stretch], drew: dict[int, bool]
    ) -> StepInputs:
        chunks, count = plan.chunks, plan.rows.count
        decodes = [i for i, share in enumerate(chunks) if self._decodes(share)]
        # Mostly few: where searches run, nearly all are decodes.
        others = sorted({*range(len(chunks))}.difference(decodes))
        order = decodes + others
        batch = list(self._decoding.values())
        batch += self._place((chunks[i] for i in order), sent, drew)
        num_decodes = count + len(decodes)
        starts, token_at = list(range(num_decodes + 1)), [-1] * num_decodes
        tokens = list[int]()
        for i in others:
            ids = chunks[i].token_ids
            starts.append(starts[-1] + len(ids))
            token_at.append(-1 if len(ids) == 1 else len(tokens))
            if len(ids) > 1:
                tokens += ids
        if starts[-1] > self._layout.max_tokens:
            raise RuntimeError(
                f"a step of {starts[-1]} tokens; {self._layout.max_tokens} is the most"
            )
        self._arrange(batch, sent)
        places = [0] * len(order)
        for place, i in enumerate(order, count):
            places[i] = place
        inputs = StepInputs(
            num_sequences=len(batch),
            num_tokens=starts[-1],
            num_decodes=num_decodes,
            max_query_len=max([1, *(len(chunks[i].token_ids) for i in others)]),
            drawn=[*range(count), *(places[i] for i, s in enumerate(chunks) if s.samples)],
            sent=sent,
            prompt_rows=[
                starts[places[i]] + row
                for i, share in enumerate(chunks)
                if share.params.prompt_logprobs is not None
                for row in share.prompt_logprob_rows
            ],
            max_chunk_end=max([share.start + len(share.token_ids) for share in chunks]),
        )
        if inputs.has_chunks:  # else each has one token, which is in its record
            sent += [
                (self._layout.query_start, starts),
                (self._layout.token_at, token_at),
                (self._layout.chunk, tokens),
            ]
        return inputs


def padding(layout: StateLayout, num_sequences: int, tokens: int) -> Stretch:
    """What makes of a step with chunks one of `tokens` tokens: those beyond its own are one more
    sequence's, of nobody; the rows behind that have none.
    """
    first = num_sequences + 1
    return layout.query_start + first, [tokens] * (layout.max_rows + 1 - first)


def messages(sent: Sequence[Stretch], capacity: int) -> list[np.ndarray]:
    """The stretches as messages of at most `capacity` words; see `batch_state.apply_updates`.

    A message is the number of stretches, then of each where it goes, its length and where in the
    message it is, then their words.
    """
    if 1 + sum([3 + len(words) for _, words in sent]) <= capacity:
        whole = [stretch for stretch in sent if stretch[1]]
        return [_message(whole)] if whole else []
    found, part, used = list[np.ndarray](), list[Stretch](), 1
    for to, words in sent:
        done = 0
        while done < len(words):
            room = capacity - used - 3
            if room < 1:
                found.append(_message(part))
                part, used = [], 1
                continue
            piece = words[done : done + room]
            part.append((to + done, piece))
            used += 3 + len(piece)
            done += len(piece)
    if part:
        found.append(_message(part))
    return found


def _message(part: list[Stretch]) -> np.ndarray:
    head, body = [len(part)], list[int]()
    begin = 1 + 3 * len(part)
    for to, words in part:
        head += (to, len(words), begin + len(body))
        body += words
    return np.array(head + body, dtype=np.int32)
