"""The scheduler: which tokens of which sequences run in the next step, and what came of the last.

Invariants, in reading order:

- `running` is in order of admission. A group is cut short by the token budget only when it is the
  last admitted, so at most the last one is between two chunks of its prompt, and every other gets
  a token for each branch in each step. One is admitted only when all that run left a token for each
  of its branches, so never more run than a step has tokens for.
- A group takes blocks from those admitted after it, never from those before it, and first from the
  one that loses least by it. The last one has nobody to take from and waits, keeping its blocks. So
  the first always moves on, and whatever was accepted fits into the pool alone: there is no
  deadlock. Who was preempted keeps its place in the queue, before all who came later, and can only
  be preempted again by those who run already: there is no livelock.
- Tokens are recorded once. A preempted group runs its recorded tokens again, in chunks like a
  prompt, and draws on from where it was.
- A block that more than one table holds is not written: its writer takes a copy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from octavo.core.beam import rebuild
from octavo.core.block_pool import NO_BLOCK, BlockPool
from octavo.core.forecast import OutputLengths, expected_growth
from octavo.core.group import Group
from octavo.core.kv_groups import shared_entries, slide
from octavo.core.policy import SchedulingPolicy
from octavo.core.prefix_cache import NOTHING, Prefix, PrefixCache
from octavo.core.request import Limits, Request, RequestError, make_group
from octavo.core.sequence import Sequence
from octavo.core.step import NO_TOKEN, NOTHING_ALLOWED, ScheduledSequence, StepPlan
from octavo.core.swap import Pairs, SwapSpace
from octavo.core.waiting import WaitingQueue, WaitingTotals
from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams

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


@dataclass(slots=True)
class _Draft:
    """A step being planned, and the tokens that it may still take."""

    budget: int
    sequences: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    swap_out: Pairs = field(default_factory=list)
    swap_in: Pairs = field(default_factory=list)


class Scheduler:
    """Plans steps over groups of sequences and a block pool; knows no model, device or clock."""

    def __init__(
        self,
        pool: BlockPool,
        policy: SchedulingPolicy,
        limits: Limits,
        swap: SwapSpace | None = None,
    ) -> None:
        self.max_len = min(limits.max_model_len, limits.longest(pool.num_blocks))
        self.kv = limits.kv
        self.limits = limits
        self.pool = pool
        self.swap = swap
        self.counters = Counters()
        self.output_lengths = OutputLengths()
        self.prefix_cache = PrefixCache(pool, self.kv, enabled=limits.enable_prefix_caching)
        self._waiting = WaitingQueue(policy, self.kv)
        self._running: dict[int, Group] = {}
        self._branches: dict[int, Sequence] = {}
        self._by_request: dict[str, Group] = {}
        self._next_id = 0

    # Requests in and out.

    def add(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        scope: str = "",
        now: float = 0.0,
    ) -> None:
        """Queue a request; raise `RequestError` or `ParameterError` when it cannot be served."""
        if request_id in self._by_request:
            raise RequestError(f"a request with id {request_id!r} is already here")
        request = Request(
            request_id=request_id,
            prompt=prompt,
            params=params,
            priority=priority,
            scope=scope,
            now=now,
        )
        group = make_group(request, self.limits, self.pool.num_blocks, self._next_id)
        self._next_id += group.width
        self._by_request[request_id] = group
        self._waiting.push(group)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one sample of it, and free the blocks; empty when there is no such."""
        group = self._by_request.get(request_id)
        if group is not None and group.beam is not None:
            lead = group.lead
            self._end_search(group, error="")
            return _ends(lead, "abort")
        ended = [] if group is None else [b for b in group.branches if index in (None, b.branch)]
        for branch in ended:
            self._drop(branch)
        return [
            SequenceUpdate(request_id, [], "abort", seq_id=b.seq_id, index=b.branch) for b in ended
        ]

    # Plan.

    def plan(self, budget: int | None = None) -> StepPlan:
        """Choose the next step's tokens and give them blocks.

        At most `budget` tokens where it is given, but always one for each running sequence.
        """
        most = self.limits.max_num_batched_tokens
        draft = _Draft(most if budget is None else min(most, max(budget, self.num_running)))
        complete = True
        for group in tuple(self._running.values()):
            if group.arrival not in self._running:
                continue  # preempted for one before it
            complete = self._continue(group, draft)
            if not complete:
                break
        # Where blocks ran out just now, nobody is let in: least of all those who lost theirs.
        if complete and not draft.preempted:
            self._admit(draft)
        self.counters.copies += len(draft.copies)
        return StepPlan(
            tuple(draft.sequences),
            tuple(draft.copies),
            tuple(draft.preempted),
            tuple(draft.swap_out),
            tuple(draft.swap_in),
        )

    def _admit(self, draft: _Draft) -> None:
        while self._waiting:
            group = self._waiting.peek()
            places = self.limits.max_num_seqs - len(self._branches)
            if group.width > min(places, draft.budget):
                return
            found = NOTHING if group.swapped else self._find(group)
            if self._admission_blocks(group, found) > self.pool.num_free:
                return  # those behind it wait too: the order is the policy's, not the size's
            self._waiting.pop()
            self._running[group.arrival] = group
            for branch in group.branches:
                self._branches[branch.seq_id] = branch
            if group.swapped and self.swap is not None:
                draft.swap_in += self.swap.back(group, self.pool, self.prefix_cache)
            else:
                self.prefix_cache.attach(group.lead, found)
            if not self._continue(group, draft):
                return

    def _find(self, group: Group) -> Prefix:
        """What the lead need not compute. Its branches will join it at the prompt's end."""
        joined_at = group.lead.num_prompt_tokens if group.width > 1 else None
        return self.prefix_cache.find(group.lead, joined_at)

    def _admission_blocks(self, group: Group, found: Prefix) -> int:
        """Blocks to be taken for its known tokens and the output it is expected to grow by.

        By expectation, not by `max_tokens`: reserving the worst case leaves most of the cache
        empty. Where the expectation is wrong, preemption corrects it. Never more than the pool, as
        growth ends at `max_new_tokens`; so with nothing running the next is always admitted.
        Blocks found in the cache are to be taken too, unless somebody holds them already.
        """
        growth = [expected_growth(branch, self.output_lengths.mean) for branch in group.branches]
        references = self.pool.references
        active = sum(1 for block in found.table if block != NO_BLOCK and references(block))
        # What is drawn later runs a token at a time.
        chunk = min(group.num_tokens, self.limits.max_num_batched_tokens)
        return group.blocks_with(self.kv, growth, chunk) - active

    def _continue(self, group: Group, draft: _Draft) -> bool:
        """Schedule a running group; False when budget or blocks did not suffice for all of it."""
        alone = len(group.branches) == 1
        if not alone:
            self._join_rebuilt(group)
        for branch in group.branches:
            pending = len(branch.tokens) - branch.computed
            if alone:
                count = min(pending, draft.budget)
            else:
                if branch is not group.lead and not branch.block_table:
                    if branch.num_generated:
                        return False  # the lead has not yet come to the prompt's end
                    self._join(branch, group.lead, branch.num_prompt_tokens - 1)
                    pending = 1
                count = min(pending, self._share_of_budget(group, branch, draft))
            if pending == 0:
                continue  # a branch of a beam search that waits for the others
            if count == 0 or not self._grow(group, branch, count, draft):
                return False
            draft.sequences.append(self._schedule(branch, count))
            draft.budget -= count
            if count < pending:
                return False
        return True

    def _share_of_budget(self, group: Group, branch: Sequence, draft: _Draft) -> int:
        """Tokens that a branch may run. The first draw of all branches is in one step.

        So the lead ends the prompt only where a token is left for each of the others.
        """
        if branch is not group.lead or branch.num_generated:
            return draft.budget
        others = len(group.branches) - 1
        if draft.budget >= branch.pending + others:
            return branch.pending
        return min(draft.budget, branch.pending - 1)

    def _join_rebuilt(self, group: Group) -> None:
        """Let preempted branches go on from the prompt's end, where the lead is there again.

        Before anything of the group is scheduled, so that whoever writes first sees the others.
        """
        lead, prompt = group.lead, group.lead.num_prompt_tokens
        if lead.num_generated and lead.computed >= prompt:
            for branch in group.branches:
                if not branch.block_table:
                    self._join(branch, lead, prompt)

    def _join(self, branch: Sequence, lead: Sequence, computed: int) -> None:
        """Share the lead's blocks of the prompt, which are written or will be in this step.

        At the end of the prompt each branch runs the last token for itself, to draw from it, but
        does not write it: the lead does, in the same step, and writing comes before reading.
        """
        kv, prompt = self.kv, branch.num_prompt_tokens
        branch.computed, branch.written = computed, prompt
        branch.cached_tokens = lead.cached_tokens
        branch.block_table = lead.block_table[: kv.rows(prompt) * kv.count]
        self.pool.share(branch.block_table)
        if prompt % kv.block_size:
            # A rebuilt lead may have filled it: who writes here last does so in place.
            self.pool.forget(branch.block_table[-kv.count :])

    def _grow(self, group: Group, sequence: Sequence, count: int, draft: _Draft) -> bool:
        """Give a running sequence blocks for `count` more tokens, preempting later ones if need be.

        False when its group is the last admitted and there are not enough: it sits this step out.
        """
        kv = self.kv
        need = kv.rows(sequence.computed + count) * kv.count - len(sequence.block_table)
        copied = self._to_copy(sequence) if len(group.branches) > 1 else []
        need += len(copied)
        if need <= 0:
            return True
        if kv.sliding:
            slide(sequence, sequence.computed, kv, self.pool)
        while self.pool.num_free < need:
            victim = self._victim(group)
            if victim is None:
                return False
            draft.preempted += self._preempt(victim, draft)
        blocks = self.pool.allocate(need)
        # A new list where others may have been given the old one.
        table = sequence.block_table + blocks[len(copied) :]
        for entry, block in zip(copied, blocks, strict=False):
            draft.copies.append((table[entry], block))
            self.pool.release(table[entry : entry + 1])
            table[entry] = block
        sequence.block_table = table
        return True

    def _victim(self, group: Group) -> Group | None:
        """Of the groups admitted after this one, that whose blocks cost least to compute again.

        The last admitted among equals; None when this is the last.
        """
        later: list[Group] = []
        for other in reversed(self._running.values()):
            if other is group:
                break
            later.append(other)
        return min(later, key=self._cost_of_a_block, default=None)

    def _cost_of_a_block(self, group: Group) -> float:
        """Tokens to be computed again for each block that its preemption would free."""
        held = Counter(block for branch in group.branches for block in branch.block_table)
        held.pop(NO_BLOCK, None)
        freed = sum(1 for block, n in held.items() if self.pool.references(block) == n)
        return group.num_computed / freed if freed else math.inf

    def _to_copy(self, sequence: Sequence) -> list[int]:
        """Entries of its table that its next token is written to and that others hold too."""
        if sequence.computed < sequence.written:
            return []
        return shared_entries(sequence, self.kv, self.pool)

    def _schedule(self, sequence: Sequence, count: int) -> ScheduledSequence:
        start = sequence.computed
        return ScheduledSequence(
            seq_id=sequence.seq_id,
            token_ids=sequence.tokens[start : start + count],
            start=start,
            block_table=sequence.block_table,
            samples=start + count == len(sequence.tokens),
            params=sequence.params,
            num_generated=sequence.num_generated,
            tokens=sequence.tokens,
            num_prompt_tokens=sequence.num_prompt_tokens,
            branch=sequence.branch,
            writes=start >= sequence.written,
        )

    def _preempt(self, group: Group, draft: _Draft) -> list[int]:
        """Take the group's blocks; it returns to its place in the queue.

        Later it replays, or its blocks come back from host memory.
        """
        if self.swap is not None and self.swap.pays(group):
            draft.swap_out += self.swap.out(group, self.pool)
        del self._running[group.arrival]
        if group.beam is not None:
            group.beam.candidates = {}
        for branch in group.branches:
            del self._branches[branch.seq_id]
            if not branch.swapped:
                self._free_blocks(branch)
            branch.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(group)
        return [branch.seq_id for branch in group.branches]

    # Commit.

    def commit(
        self,
        plan: StepPlan,
        sampled: list[int],
        logprobs: Mapping[int, TokenLogprobs] = MappingProxyType({}),
    ) -> list[SequenceUpdate]:
        """Record a step that ran. `sampled` has one token for each sequence that samples, in order.

        `logprobs` are by sequence id; only beam searches read them. A sequence aborted since the
        plan was made is passed over.
        """
        self.counters.steps += 1
        updates: list[SequenceUpdate] = []
        drawn = iter(sampled)
        for share in plan.sequences:
            token = next(drawn) if share.samples else None
            sequence = self._branches.get(share.seq_id)
            if sequence is None:
                continue
            sequence.computed = share.start + len(share.token_ids)
            if token != NO_TOKEN:
                self.prefix_cache.publish(sequence)
            if self.kv.sliding and len(share.token_ids) > 1:
                # Branches that are rebuilt will join at the prompt's end and need what it sees.
                done = min(sequence.computed, sequence.num_prompt_tokens)
                slide(sequence, done, self.kv, self.pool)
            if token is None:
                continue
            if sequence.params.use_beam_search:
                updates += self._search(sequence, token, logprobs)
            else:
                updates.append(self._draw(sequence, token))
        return updates

    def _search(
        self, sequence: Sequence, token: int, logprobs: Mapping[int, TokenLogprobs]
    ) -> list[SequenceUpdate]:
        """Take in a branch's candidates; with the last of them the whole group takes a step."""
        group = self._by_request[sequence.request_id]
        beam, branches = group.beam, group.branches
        if token in _NO_TOKEN_TEXTS:
            return self._end_search(group, error=self._no_token(sequence, token))
        if beam is None:
            raise RequestError("a beam search without its state")
        beam.candidates[sequence.branch] = logprobs[sequence.seq_id]
        if not beam.complete:
            return []
        if not group.lead.num_generated:
            self.counters.prompt_tokens += group.lead.num_prompt_tokens
        self.counters.generation_tokens += len(branches)
        steps = beam.advance([branch.generated for branch in branches])
        if not steps:
            return self._end_search(group)
        rebuild(branches, steps, self.pool)
        return []

    def _end_search(self, group: Group, error: str | None = None) -> list[SequenceUpdate]:
        lead, beam = group.lead, group.beam
        for branch in tuple(group.branches):
            self._drop(branch)
        if error is not None or beam is None:
            return _ends(lead, "error", error)
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

    def _draw(self, sequence: Sequence, token: int) -> SequenceUpdate:
        """Take in a drawn token: record it, and end the sequence if it is the last."""
        generated = sequence.num_generated
        token_ids: list[int] = []
        reason = stop_token_id = error = None
        if token in _NO_TOKEN_TEXTS:
            reason, error = "error", self._no_token(sequence, token)
            self._drop(sequence)
        else:
            self.counters.generation_tokens += 1
            if generated == 0 and sequence.branch == 0:
                self.counters.prompt_tokens += sequence.num_prompt_tokens
            if token in sequence.stop_ids and generated >= sequence.params.min_tokens:
                reason, stop_token_id = "stop", token
            else:
                token_ids.append(token)
                sequence.tokens.append(token)
                if generated + 1 >= sequence.max_new_tokens:
                    reason = "length"
            if reason is not None:
                self._finish(sequence)
        return SequenceUpdate(
            request_id=sequence.request_id,
            token_ids=token_ids,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
            seq_id=sequence.seq_id,
            cached_tokens=sequence.cached_tokens,
            index=sequence.branch,
        )

    def _no_token(self, sequence: Sequence, token: int) -> str:
        """Why there is no token."""
        if token == NO_TOKEN:
            # NaN may stand in any of its blocks: nobody else may find them.
            self.prefix_cache.forget(sequence)
        return f"{_NO_TOKEN_TEXTS[token]} after {len(sequence.tokens)} tokens"

    def _finish(self, sequence: Sequence) -> None:
        self.output_lengths.observe(sequence.num_generated)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Take a branch out, and the group with its last one."""
        group = self._by_request[sequence.request_id]
        waiting = group.arrival in self._waiting
        if waiting:
            self._waiting.remove(group)
        group.branches.remove(sequence)
        self._branches.pop(sequence.seq_id, None)
        if not group.branches:
            self._running.pop(group.arrival, None)
            del self._by_request[sequence.request_id]
        elif waiting:
            self._waiting.push(group)
        self._free_blocks(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        if sequence.swapped and self.swap is not None:
            self.swap.drop(sequence)
        self.pool.release(sequence.block_table)
        # A new list: a plan may still hold the old one.
        sequence.block_table = []
        sequence.computed = sequence.written = sequence.chained = 0

    # What others may look at.

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self._by_request)

    @property
    def running(self) -> Iterable[Sequence]:
        """The running sequences, in order of admission."""
        return self._branches.values()

    @property
    def num_running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._branches)

    @property
    def waiting_totals(self) -> WaitingTotals:
        """Sums over the waiting queue."""
        return self._waiting.totals

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Every unfinished request."""
        return tuple(self._by_request)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every block is accounted for; O(blocks)."""
        groups = self._by_request.values()
        self.pool.check_integrity(b.block_table for group in groups for b in group.branches)
        if self.swap is not None:
            self.swap.pool.check_integrity(b.swapped for group in groups for b in group.branches)


def _ends(lead: Sequence, reason: str, error: str | None = None) -> list[SequenceUpdate]:
    """The ends of all outputs of a beam search that gives none."""
    return [
        SequenceUpdate(
            lead.request_id, [], reason, error=error, seq_id=lead.seq_id + rank, index=rank
        )
        for rank in range(lead.params.num_outputs)
    ]
