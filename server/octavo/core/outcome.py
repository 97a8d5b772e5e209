"""What came of a step: tokens are recorded, sequences end, full blocks become findable."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import msgspec

from octavo.core.beam import rebuild
from octavo.core.forecast import OutputLengths
from octavo.core.group import Group
from octavo.core.kv_groups import slide
from octavo.core.prefix_cache import PrefixCache
from octavo.core.request import RequestError
from octavo.core.roster import Roster
from octavo.core.sequence import Sequence
from octavo.core.step import NO_TOKEN, NOTHING_ALLOWED, StepPlan
from octavo.kv_layout import KvGroups
from octavo.logprobs import TokenLogprobs

_NO_TOKEN_TEXTS = {
    NO_TOKEN: "the model's output became NaN",
    NOTHING_ALLOWED: "the request's parameters allow no token (allowed_token_ids, bad_words, "
    "logit_bias or min_tokens together forbid all)",
}


class SequenceUpdate(msgspec.Struct, frozen=True, gc=False):
    """What a step brought one sequence. The update with a `finish_reason` is its last.

    `index` is the sequence's branch of the request, or the rank of a hypothesis of a beam search,
    which comes whole, with its `score`. `stop_token_id` is the EOS or stop id that ended it; it is
    not among `token_ids`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: str | None = None
    seq_id: int = -1
    cached_tokens: int = 0
    index: int = 0
    score: float | None = None


@dataclass(slots=True)
class Counters:
    """Totals since the scheduler was made. `copies` are blocks copied before a write."""

    steps: int = 0
    preemptions: int = 0
    copies: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass(slots=True, frozen=True)
class Flight:
    """A step in flight: its sequences as they were planned.

    `chunks` are beside the plan's own. They have the position where they end, as have the rows that
    have `filled` a block by then. `alone` says that nothing may be planned before it has come back.
    """

    plan: StepPlan
    rows: list[Sequence]
    chunks: list[tuple[Sequence, int]]
    filled: list[tuple[Sequence, int]]
    alone: bool


class Outcome:
    """Records what steps bring."""

    def __init__(self, roster: Roster, prefix_cache: PrefixCache, kv: KvGroups) -> None:
        self.counters = Counters()
        self.output_lengths = OutputLengths()
        self._roster = roster
        self._prefix_cache = prefix_cache
        self._kv = kv

    def take(
        self, flight: Flight, sampled: Items[int], logprobs: Mapping[int, TokenLogprobs]
    ) -> list[SequenceUpdate]:
        """Take in a step's tokens: one for each row, then one for each chunk that samples.

        What was dropped since the plan was made is passed over; its token is void.
        """
        self.counters.steps += 1
        here = self._roster.by_id
        failed = zip(flight.rows, sampled, strict=False) if NO_TOKEN in sampled else ()
        without = {row.seq_id for row, token in failed if token == NO_TOKEN}
        for sequence, end in flight.filled:
            if sequence.seq_id not in without:
                self._publish(sequence, end)
        updates = []
        for sequence, token in zip(flight.rows, sampled, strict=False):
            if sequence.seq_id in here:
                updates.append(self._draw(sequence, token))
        drawn = iter(sampled[len(flight.rows) :])
        publishes = self._prefix_cache.enabled
        for (sequence, end), share in zip(flight.chunks, flight.plan.chunks, strict=True):
            chosen = next(drawn) if share.samples else None
            if sequence.seq_id not in here:
                continue
            if publishes and chosen != NO_TOKEN:
                self._publish(sequence, end)
            if self._kv.sliding and sequence.block_table:
                # Branches that are rebuilt will join at the prompt's end and need what it sees.
                done = min(end, sequence.num_prompt_tokens)
                slide(sequence, done, self._kv, self._roster.pool)
            if chosen is None:
                continue
            if sequence.params.use_beam_search:
                updates += self._search(sequence, chosen, logprobs)
            else:
                updates.append(self._draw(sequence, chosen))
        return updates

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Let the blocks be found that were full before `end`, unless they were taken since.

        Blocks are published when the step that filled them has come back, not when it is planned:
        only then are their contents known to be numbers.
        """
        if sequence.block_table:
            self._prefix_cache.publish(sequence, end)

    def _draw(self, sequence: Sequence, token: int) -> SequenceUpdate:
        """Take in a drawn token: record it, and end the sequence if it is the last."""
        tokens = sequence.tokens
        generated = len(tokens) - sequence.num_prompt_tokens
        token_ids = [token]
        reason: str | None = None
        stop_token_id: int | None = None
        error: str | None = None
        if token in _NO_TOKEN_TEXTS:
            token_ids = []
            reason, error = "error", self._no_token(sequence, token)
            self._roster.drop(sequence)
        else:
            self.counters.generation_tokens += 1
            if generated == 0 and sequence.branch == 0:
                self.counters.prompt_tokens += sequence.num_prompt_tokens
            if token in sequence.stop_ids and generated >= sequence.params.min_tokens:
                token_ids = []
                reason, stop_token_id = "stop", token
            else:
                tokens.append(token)
                if generated + 1 >= sequence.max_new_tokens:
                    reason = "length"
            if reason is not None:
                self.output_lengths.observe(len(tokens) - sequence.num_prompt_tokens)
                self._roster.drop(sequence)
        # By position: one is made for each token, and names would cost a third more.
        return SequenceUpdate(
            sequence.request_id,
            token_ids,
            reason,
            stop_token_id,
            error,
            sequence.seq_id,
            sequence.cached_tokens,
            sequence.branch,
        )

    def _no_token(self, sequence: Sequence, token: int) -> str:
        """Why there is no token."""
        if token == NO_TOKEN:
            # NaN may stand in any of its blocks: nobody else may find them.
            self._prefix_cache.forget(sequence)
        return f"{_NO_TOKEN_TEXTS[token]} after {len(sequence.tokens)} tokens"

    # Beam searches.

    def _search(
        self, sequence: Sequence, token: int, logprobs: Mapping[int, TokenLogprobs]
    ) -> list[SequenceUpdate]:
        """Take in a branch's candidates; with the last of them the whole group takes a step."""
        group = self._roster.by_request[sequence.request_id]
        beam, branches = group.beam, group.branches
        if token in _NO_TOKEN_TEXTS:
            return self.end_search(group, error=self._no_token(sequence, token))
        if beam is None:
            raise RequestError("a beam search without its state")
        beam.candidates[sequence.branch] = logprobs[sequence.seq_id]
        if len(beam.candidates) < beam.width:
            return []
        drawn = sequence.num_generated
        if not drawn:
            self.counters.prompt_tokens += sequence.num_prompt_tokens
        self.counters.generation_tokens += len(branches)
        steps = beam.advance(drawn, lambda branch: branches[branch].generated)
        if not steps:
            return self.end_search(group)
        rebuild(branches, steps, self._roster.pool)
        return []

    def end_search(self, group: Group, error: str | None = None) -> list[SequenceUpdate]:
        """End a search with its best hypotheses, or with an error and none."""
        lead, beam = group.lead, group.beam
        for branch in tuple(group.branches):
            self._roster.drop(branch)
        if error is not None or beam is None:
            return ends(lead, "error", error)
        best = beam.finished[: lead.params.n]
        for found in best:
            self.output_lengths.observe(len(found.token_ids))
        return [
            SequenceUpdate(
                request_id=lead.request_id,
                token_ids=found.token_ids,
                finish_reason="length" if found.stop_token_id is None else "stop",
                stop_token_id=found.stop_token_id,
                seq_id=lead.seq_id + rank,
                cached_tokens=lead.cached_tokens,
                index=rank,
                score=found.score,
            )
            for rank, found in enumerate(best)
        ]


def ends(lead: Sequence, reason: str, error: str | None = None) -> list[SequenceUpdate]:
    """The ends of all outputs of a beam search that gives none."""
    return [
        SequenceUpdate(
            lead.request_id, [], reason, error=error, seq_id=lead.seq_id + rank, index=rank
        )
        for rank in range(lead.params.num_outputs)
    ]
