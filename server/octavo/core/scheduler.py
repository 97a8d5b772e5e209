"""The scheduler: which tokens of which sequences run in the next step, and what came of the last.

Invariants, in reading order:

- `running` is in order of admission. A group is cut short by the token budget only when it is the
  last admitted, so at most the last one is between two chunks of its prompt, and every other gets
  a token for each branch in each step. One is admitted only when all that run left a token for each
  of its branches, so never more run than a step has tokens for.
- A sequence that only decodes is a row of the calendar: it takes part in every step, and is looked
  at only when it needs a block or draws its last token. All others are planned one by one.
- A group takes blocks from those admitted after it, never from those before it, and first from the
  one that loses least by it. The last one has nobody to take from and waits, keeping its blocks. So
  the first always moves on, and whatever was accepted fits into the pool alone: there is no
  deadlock. Who was preempted keeps its place in the queue, before all who came later, and can only
  be preempted again by those who run already: there is no livelock.
- Tokens are recorded once. A preempted group runs its recorded tokens again, in chunks like a
  prompt, and draws on from where it was.
- A block that more than one table holds is not written: its writer takes a copy.
- One plan may be made while the step before it is in flight. Sequences stand where that step will
  leave them, with the token it draws still unread. Nothing waits for the host to take blocks back:
  the device runs steps in order. Where a plan depends on what the step draws, or on what it makes
  findable, it is made after that step came back (`may_plan`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from octavo.core.beam import run_alike
from octavo.core.block_pool import NO_BLOCK, BlockPool
from octavo.core.calendar import row_share
from octavo.core.forecast import OutputLengths, expected_growth
from octavo.core.group import Group
from octavo.core.kv_groups import shared_entries, slide
from octavo.core.outcome import Counters, Flight, Outcome, SequenceUpdate, ends
from octavo.core.policy import SchedulingPolicy
from octavo.core.prefix_cache import NOTHING, Prefix, PrefixCache
from octavo.core.request import Limits, Request, RequestError, make_group
from octavo.core.roster import Roster
from octavo.core.sequence import Sequence
from octavo.core.step import PENDING, ScheduledSequence, StepPlan
from octavo.core.swap import Pairs, SwapSpace
from octavo.core.waiting import WaitingTotals
from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams

MAX_IN_FLIGHT = 2
# While more wait than fit, they are let in when a share of all places, one in so many, is free.
PLACES_A_BUNCH = 32


@dataclass(slots=True)
class _Draft:
    """A step being planned, and the tokens that it may still take.

    What is first in it may take `more` than these. `grown` has the blocks that rows of the calendar
    get, by seq_id. The step runs `alone` when nothing may be planned before it came back.
    """

    budget: int
    more: int = 0
    shares: list[ScheduledSequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    grown: dict[int, list[int]] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    swap_out: Pairs = field(default_factory=list)
    swap_in: Pairs = field(default_factory=list)
    alone: bool = False


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
        self.limits = limits
        self.kv = limits.kv
        self.pool = pool
        self.swap = swap
        self.prefix_cache = PrefixCache(pool, self.kv, enabled=limits.enable_prefix_caching)
        self._roster = Roster(pool, policy, self.kv, swap)
        self._outcome = Outcome(self._roster, self.prefix_cache, self.kv)
        self._flights: deque[Flight] = deque()
        self._latest = StepPlan()
        # By host block: copies of a plan that had no sequences, and so was not run.
        self._to_swap_out: dict[int, int] = {}
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
        if request_id in self._roster.by_request:
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
        self._roster.add(group)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request, or one sample of it, and free the blocks; empty when there is no such."""
        self._latest.expire()
        group = self._roster.by_request.get(request_id)
        if group is not None and group.beam is not None:
            lead = group.lead
            self._outcome.end_search(group, error="")
            return ends(lead, "abort")
        ended = [] if group is None else [b for b in group.branches if index in (None, b.branch)]
        for branch in ended:
            self._roster.drop(branch)
        return [
            SequenceUpdate(request_id, [], "abort", seq_id=b.seq_id, index=b.branch) for b in ended
        ]

    # Plan.

    @property
    def may_plan(self) -> bool:
        """True when a plan may be made now, with what is in flight."""
        flights = self._flights
        return not flights or (len(flights) < MAX_IN_FLIGHT and not flights[-1].alone)

    def plan(self, budget: int | None = None) -> StepPlan:
        """Choose the next step's tokens and give them blocks.

        At most `budget` tokens where it is given, but always one for each running sequence. A plan
        without sequences is not to be run and not committed: all that could move is in flight, or
        waits for what is.
        """
        if not self.may_plan:
            raise RuntimeError(f"commit first: {len(self._flights)} steps are in flight")
        self._latest.expire()
        roster = self._roster
        roster.calendar.release_ended()
        draft = self._begin(budget)
        for group in tuple(roster.unsettled.values()):
            self._settle(group)
        self._grow_rows(draft)
        draft.budget -= len(roster.calendar)
        complete = True
        for group in tuple(roster.unsettled.values()):
            if group.arrival not in roster.unsettled:
                continue  # preempted for one before it
            complete = self._continue(group, draft)
            if not complete:
                break
        # Where blocks ran out just now, nobody is let in: least of all those who lost theirs, some
        # of whose tokens are still in flight.
        if complete and not draft.preempted:
            self._admit(draft)
        self._latest = self._finish_plan(draft)
        return self._latest

    def _begin(self, budget: int | None) -> _Draft:
        """An empty step, and what it may take.

        Large steps take less time for a token, and more time in all. While somebody decodes, a step
        is how long the next token takes, and so bounded. While nobody does, a prompt that would go
        on in the next step takes more of it in this one. That delays nobody: who comes behind it or
        while it runs would wait for those tokens just the same. Several prompts in a large step get
        their first tokens together, when the last of them is through. A server does not do that to
        them; where only the end of all counts (`offline`) it is faster.

        A window's blocks were promised for usual chunks, so with windows there are no others.
        """
        limits, most = self.limits, self.limits.max_num_batched_tokens
        if budget is not None:
            return _Draft(min(most, max(budget, self.num_running)))
        if limits.large_step is None or self.kv.sliding or self.decoding:
            return _Draft(most)
        if limits.offline:
            return _Draft(limits.large_step)
        return _Draft(most, limits.large_step - most)

    def _finish_plan(self, draft: _Draft) -> StepPlan:
        calendar = self._roster.calendar
        self.counters.copies += len(draft.copies)
        shares = tuple(draft.shares)
        self._to_swap_out |= {host: block for block, host in draft.swap_out}
        if not shares and not calendar:
            return StepPlan(preempted=tuple(draft.preempted))
        swap_out = tuple((block, host) for host, block in self._to_swap_out.items())
        self._to_swap_out = {}
        sequences = calendar.rows
        needs_host = calendar.needs_host
        rows = calendar.tick(draft.grown)
        plan = StepPlan(
            shares,
            tuple(draft.copies),
            tuple(draft.preempted),
            rows,
            swap_out=swap_out,
            swap_in=tuple(draft.swap_in),
            # The tick has moved them one further than this step begins.
            list_rows=lambda: [row_share(row, row.computed - 1) for row in sequences],
            rows_need_host=needs_host,
        )
        # Those that need a block for their next token fill one with this.
        filled = [(row, row.computed) for row in calendar.growing]
        alone = draft.alone or plan.needs_host
        self._flights.append(Flight(plan, sequences, draft.chunks, filled, alone))
        return plan

    def _settle(self, group: Group) -> None:
        """Make rows of the branches that only decode from now on."""
        if group.beam is not None or any(not branch.block_table for branch in group.branches):
            return  # branches without blocks are still to be given some of the lead's
        roster = self._roster
        settled = True
        for branch in group.branches:
            if branch.follows or not branch.remaining:
                continue
            writes = branch.computed >= branch.written
            if branch.decoding and writes and not self._to_copy(branch):
                roster.calendar.join(branch)
            else:
                settled = False
        if settled:
            del roster.unsettled[group.arrival]

    def _grow_rows(self, draft: _Draft) -> None:
        """Give blocks to the rows whose last one is full, in order of admission."""
        roster = self._roster
        growing: Iterable[Sequence] = roster.calendar.growing
        if len(roster.calendar.growing) * self.kv.count > self.pool.num_free:
            growing = roster.in_order(growing)
        for branch in tuple(growing):
            if not branch.follows:
                continue  # preempted for one before it
            group = roster.running[branch.arrival]
            if self.kv.sliding:
                slide(branch, branch.computed, self.kv, self.pool)
            if self._make_room(group, self.kv.count, draft):
                blocks = self.pool.allocate(self.kv.count)
                branch.block_table += blocks
                draft.grown[branch.seq_id] = blocks
            else:
                roster.unsettle(group, branch)

    def _worth_admitting(self, draft: _Draft) -> bool:
        """Whether to let requests in now, or when there is room for more of them at once.

        A step of rows alone is one graph on a GPU; one with a prompt in it is not, and costs the
        host many times more. While more wait than fit, who comes in a few steps later has waited
        long anyway, and a bunch costs what one does.
        """
        roster = self._roster
        if draft.shares or not len(roster.calendar):
            return True  # not such a step as it is
        places = self.limits.max_num_seqs - self.num_running
        return places >= min(len(roster.waiting), self.limits.max_num_seqs // PLACES_A_BUNCH)

    def _admit(self, draft: _Draft) -> None:
        roster = self._roster
        if not roster.waiting or not self._worth_admitting(draft):
            return
        while roster.waiting:
            group = roster.waiting.peek()
            # A large step must not let in more than a usual one has tokens for.
            most = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
            if group.width > min(most - self.num_running, draft.budget):
                return
            found = NOTHING if group.swapped else self._find(group)
            if self._admission_blocks(group, found) > self.pool.num_free:
                return  # those behind it wait too: the order is the policy's, not the size's
            roster.admit(group)
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
        if group.beam is not None and self._step_search(group, draft):
            return True
        lead, single = group.lead, len(group.branches) == 1
        if not single:
            self._join_rebuilt(group, draft)
        for branch in group.branches:
            if branch.follows or not branch.remaining:
                continue  # a row, or its last token is in flight
            pending = branch.pending
            if single:
                count = min(pending, draft.budget + (0 if draft.shares else draft.more))
            else:
                if branch is not lead and not branch.block_table:
                    if branch.num_generated:
                        return False  # the lead has not yet come to the prompt's end
                    self._join(branch, lead, branch.num_prompt_tokens - 1)
                    pending = 1
                first = branch is lead and not lead.num_generated
                count = min(pending, self._prompt_share(group, draft) if first else draft.budget)
            if pending == 0:
                continue  # a branch of a beam search that waits for the others
            if count == 0 or not self._grow(group, branch, count, draft):
                return False
            self._schedule(branch, count, draft)
            if count < pending:
                return False
        return True

    def _step_search(self, group: Group, draft: _Draft) -> bool:
        """Schedule all branches of a search at once; False, and nothing done, where that cannot be.

        What comes of it is what `_continue` does branch by branch; but searches are planned anew in
        each step, and meanwhile the device waits. With 500 branches it is 0.9 ms of 1.6: no one of
        the calls that are left out takes most of that.
        """
        if draft.budget < group.width:
            return False
        step = run_alike(group.branches, self.kv, self.pool)
        if step is None:
            return False
        shares, copies = step
        end = shares[0].start + 1
        draft.shares += shares
        draft.copies += copies
        draft.chunks += [(branch, end) for branch in group.branches]
        draft.budget -= group.width
        return True

    def _prompt_share(self, group: Group, draft: _Draft) -> int:
        """Tokens of its prompt that the lead may run. The first draw of all branches is in one
        step, so it ends the prompt only where a token is left for each of the others.
        """
        pending, others = group.lead.pending, len(group.branches) - 1
        if draft.budget >= pending + others:
            return pending
        return min(draft.budget, pending - 1)

    def _join_rebuilt(self, group: Group, draft: _Draft) -> None:
        """Let preempted branches go on where the lead is at the prompt's end again.

        From there, or from as far as their own blocks are still in the prefix cache.

        Before anything of the group is scheduled, so that whoever writes first sees the others.
        Until all have joined, a plan follows only when the step before has come back: what the lead
        filled is findable then, or will not be.
        """
        lead, prompt = group.lead, group.lead.num_prompt_tokens
        lost = [branch for branch in group.branches if not branch.block_table]
        if not lead.num_generated or not lost:
            return
        draft.alone = True
        if lead.computed < prompt:
            return
        common = prompt // self.kv.block_size
        of_lead = lead.block_table[: common * self.kv.count]
        for branch in lost:
            found = self.prefix_cache.find(branch)
            shared = zip(found.table, of_lead, strict=False)
            # Never a second copy of the prompt: the pool was promised to hold the group with one.
            if found.rows > common and all(own in (NO_BLOCK, block) for own, block in shared):
                self.prefix_cache.attach(branch, found)
            else:
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
        if not self._make_room(group, need, draft):
            return False
        blocks = self.pool.allocate(need)
        # A new list where others may have been given the old one.
        table = sequence.block_table + blocks[len(copied) :]
        for entry, block in zip(copied, blocks, strict=False):
            draft.copies.append((table[entry], block))
            self.pool.release(table[entry : entry + 1])
            table[entry] = block
        sequence.block_table = table
        return True

    def _make_room(self, group: Group, need: int, draft: _Draft) -> bool:
        """Preempt groups admitted after this one until so many blocks are free, if they suffice."""
        while self.pool.num_free < need:
            victim = self._roster.victim(group)
            if victim is None:
                return False
            draft.swap_out += self._roster.swap_out(victim)
            for seq_id in self._roster.preempt(victim):
                draft.grown.pop(seq_id, None)
                draft.preempted.append(seq_id)
            self.counters.preemptions += 1
        return True

    def _to_copy(self, sequence: Sequence) -> list[int]:
        """Entries of its table that its next token is written to and that others hold too."""
        if sequence.computed < sequence.written:
            return []
        return shared_entries(sequence, self.kv, self.pool)

    def _schedule(self, sequence: Sequence, count: int, draft: _Draft) -> None:
        """Put the next `count` tokens of a sequence into the step; it then stands behind them."""
        start, tokens = sequence.computed, sequence.tokens
        end = start + count
        samples = end == sequence.length
        token_ids = tokens[start:end]
        if len(token_ids) < count:
            token_ids += [PENDING] * (count - len(token_ids))
        draft.budget = max(0, draft.budget - count)
        draft.chunks.append((sequence, end))
        draft.shares.append(
            ScheduledSequence(
                seq_id=sequence.seq_id,
                token_ids=token_ids,
                start=start,
                block_table=sequence.block_table,
                samples=samples,
                params=sequence.params,
                num_generated=sequence.num_generated,
                tokens=tokens,
                num_prompt_tokens=sequence.num_prompt_tokens,
                branch=sequence.branch,
                writes=start >= sequence.written,
            )
        )
        sequence.computed = end
        # What a branch of a search becomes is not known before all of them have drawn.
        if samples and not sequence.params.use_beam_search:
            sequence.length += 1

    # Commit.

    def commit(
        self,
        plan: StepPlan,
        sampled: list[int],
        logprobs: Mapping[int, TokenLogprobs] = MappingProxyType({}),
    ) -> list[SequenceUpdate]:
        """Record the step that was planned first of those in flight.

        `sampled` has one token for each sequence that samples, in order. `logprobs` are by sequence
        id; only beam searches read them. A sequence that ended since the plan was made, by an abort
        or by the step before, is passed over.
        """
        self._latest.expire()
        if not self._flights or self._flights[0].plan is not plan:
            raise RuntimeError("steps are committed once each, in the order of their plans")
        return self._outcome.take(self._flights.popleft(), sampled, logprobs)

    def abandon(self) -> None:
        """Forget what is in flight; every request must be ended then, as its tokens are lost."""
        self._flights.clear()

    # What others may look at.

    @property
    def counters(self) -> Counters:
        """Totals since the scheduler was made."""
        return self._outcome.counters

    @property
    def output_lengths(self) -> OutputLengths:
        """How long outputs have been."""
        return self._outcome.output_lengths

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self._roster.by_request)

    @property
    def running(self) -> Iterable[Sequence]:
        """The running sequences, in order of admission."""
        return self._roster.branches.values()

    @property
    def num_running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._roster.branches)

    @property
    def decoding(self) -> bool:
        """True while anybody would notice a long step."""
        return self._roster.decoding

    @property
    def context(self) -> int:
        """Cached tokens of all that run."""
        return self._roster.context

    def knows(self, seq_id: int) -> bool:
        """True while the sequence is unfinished."""
        return seq_id in self._roster.by_id

    @property
    def waiting_totals(self) -> WaitingTotals:
        """Sums over the waiting queue."""
        return self._roster.waiting.totals

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Every unfinished request."""
        return tuple(self._roster.by_request)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every block is accounted for; O(blocks)."""
        for _ in self.audit():
            pass

    def audit(self) -> Iterator[None]:
        """The same in short turns, as long as nothing changes between them."""
        yield from self.pool.audit(self._roster.tables)
        if self.swap is not None:
            yield from self.swap.pool.audit(self._roster.swapped)
