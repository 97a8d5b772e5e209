"""What the scheduler asks the runner to do in one step, and nothing about how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams

# What a runner returns in place of a token when the logits were not numbers.
NO_TOKEN = -1
# ... and when the request's own parameters forbade every token.
NOTHING_ALLOWED = -2
# The last of a sequence's token ids, where it is what the plan submitted before this one draws for
# the same sequence, and has not been read yet.
PENDING = -3


def needs_host(params: SamplingParams) -> bool:
    """True when a step can be submitted only once the host knows all tokens before it.

    A search chooses among its branches' candidates; a draw of the host may look at them.
    """
    return params.use_beam_search or (drawn_by_host(params) and params.needs_history)


def drawn_by_host(params: SamplingParams) -> bool:
    """True when a draw is beyond what a device does by itself."""
    return params.typical_p < 1 or any(len(ids) > 1 for ids in params.bad_words_ids)


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """One sequence's share of a step.

    `token_ids[i]` stands at position `start + i`; its keys and values go to slot
    `block_table[p // block_size] * block_size + p % block_size` for p = start + i, and it attends
    to positions 0..p. With several groups of layers a row of the table has an entry for each of
    them, as `kv_layout.KvGroups` says; an entry of -1 lies behind the group's window. `samples`
    says that the last of these tokens is the last one known, so that the step ends by drawing the
    next. `num_generated` is the count drawn before this step; with `params.seed`, `seq_id` and
    `branch` (which of several samples of one request) it keys the draw, so that a draw does not
    depend on batch mates. `tokens` is the sequence's own list, not a copy: prompt, then what was
    drawn and read; who reads it when more may have been appended bounds it by `num_prompt_tokens +
    num_generated`, and the last of these is missing while it is in flight. Without `writes` the
    keys and values of these tokens are in their slots already, in blocks that others may read, and
    are not written again.
    """

    seq_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    samples: bool
    params: SamplingParams
    num_generated: int
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    branch: int = 0
    writes: bool = True

    @property
    def prompt_logprob_rows(self) -> range:
        """Which of `token_ids` are followed by a prompt token whose log-probability is wanted."""
        if self.params.prompt_logprobs is None or self.num_generated:
            return range(0)
        return range(min(len(self.token_ids), self.num_prompt_tokens - 1 - self.start))


class PlanExpiredError(RuntimeError):
    """The rows of a plan were asked for when they had moved on: a bug of the one who asks."""


@dataclass(slots=True, frozen=True)
class Rows:
    """The decode rows of a step, as what changed since the plan that was run before it.

    A row runs one token, the one it drew in the step before, and draws the next. The rows are
    those of the plan before in their order, without those that `left`, and then those that
    `joined`. Where all have joined just now, whatever was a row before is none, also if another
    scheduler made it one. `grown` has (seq_id, block) for each block that is added to the table of
    another row, whose token goes there: one for each group of layers, in order. Nothing else
    changes in what a row sees of its table. `context` counts the cached tokens of all rows.
    """

    count: int = 0
    left: tuple[int, ...] = ()
    joined: tuple[ScheduledSequence, ...] = ()
    grown: tuple[tuple[int, int], ...] = ()
    context: int = 0


_NO_ROWS = Rows()


class StepPlan:
    """One step: block copies first, then one forward over all sequences.

    `chunks` are the shares of sequences that are no rows: parts of prompts and replays, first
    draws, beams. Copies are made in this order: `swap_out` (device block, host block), `swap_in`
    (host block, device block), `copies` (source block, destination block; copy-on-write).
    `preempted` names sequences whose blocks were taken; they will be planned again, from position 0
    or, if they were swapped out, from where they were. `needs_host` says that this step's tokens
    must be read before the next step is planned.
    """

    __slots__ = (
        "_list_rows", "_sequences", "chunks", "copies", "needs_host", "preempted", "rows",
        "swap_in", "swap_out",
    )  # fmt: skip

    def __init__(
        self,
        chunks: tuple[ScheduledSequence, ...] = (),
        copies: tuple[tuple[int, int], ...] = (),
        preempted: tuple[int, ...] = (),
        rows: Rows = _NO_ROWS,
        *,
        swap_out: tuple[tuple[int, int], ...] = (),
        swap_in: tuple[tuple[int, int], ...] = (),
        list_rows: Callable[[], list[ScheduledSequence]] = list,
        rows_need_host: bool = False,
    ) -> None:
        self.chunks = chunks
        self.copies = copies
        self.preempted = preempted
        self.rows = rows
        self.swap_out = swap_out
        self.swap_in = swap_in
        self.needs_host = rows_need_host or any(s.samples and needs_host(s.params) for s in chunks)
        self._list_rows: Callable[[], list[ScheduledSequence]] | None = list_rows
        self._sequences: tuple[ScheduledSequence, ...] | None = None if rows.count else chunks

    @property
    def sequences(self) -> tuple[ScheduledSequence, ...]:
        """Every share, the rows' first, in the order of the results.

        Made when first asked for, in O(rows); raises `PlanExpiredError` when that is after the
        next plan or the commit of any.
        """
        if self._sequences is None:
            if self._list_rows is None:
                raise PlanExpiredError("the rows of this plan have moved on; read them earlier")
            self._sequences = (*self._list_rows(), *self.chunks)
        return self._sequences

    def expire(self) -> None:
        """Say that the rows are about to change."""
        self._list_rows = None

    @property
    def num_sequences(self) -> int:
        """Sequences that take part."""
        return self.rows.count + len(self.chunks)

    @property
    def num_samples(self) -> int:
        """Tokens that this step draws."""
        return self.rows.count + sum(share.samples for share in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens that this step runs through the model."""
        return self.rows.count + sum(len(share.token_ids) for share in self.chunks)

    @property
    def context(self) -> int:
        """Cached tokens that those of this step attend to."""
        return self.rows.context + sum(share.start for share in self.chunks)


@dataclass(slots=True, frozen=True)
class StepResult:
    """What a step brought: a token for each sequence that samples, in the plan's order.

    The log-probabilities are by `seq_id` and only of those that asked: `logprobs` of the drawn
    token, `prompt_logprobs` of the prompt's tokens from position `start + 1` of the share.
    """

    tokens: list[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
