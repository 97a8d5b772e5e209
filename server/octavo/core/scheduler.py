"""The scheduler: which tokens of which sequences run in the next step, and what came of the last.

Invariants, in reading order:

- `running` is in order of admission. A sequence is cut short by the token budget only when it is
  the last admitted, so at most the last one is between two chunks of its prompt, and every other
  gets its token each step. One is admitted only when all that run left budget over, so never more
  run than a step has tokens for.
- A sequence takes blocks from those admitted after it, never from those before it; the last one
  has nobody to take from and waits, keeping its blocks. So the first always moves on, and
  whatever was accepted fits into the pool alone: there is no deadlock and no livelock.
- Tokens are recorded once. A preempted sequence runs its recorded tokens again, in chunks like a
  prompt, and draws on from where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.core.block_pool import BlockPool
from octavo.core.forecast import OutputLengths, expected_growth
from octavo.core.policy import SchedulingPolicy
from octavo.core.prefix_cache import PrefixCache
from octavo.core.sequence import Sequence, blocks_for
from octavo.core.step import NO_TOKEN, NOTHING_ALLOWED, ScheduledSequence, StepPlan
from octavo.core.waiting import WaitingQueue, WaitingTotals
from octavo.params import SamplingParams

_NO_TOKEN_TEXTS = {
    NO_TOKEN: "the model's output became NaN",
    NOTHING_ALLOWED: "the request's parameters allow no token (allowed_token_ids, bad_words, "
    "logit_bias or min_tokens together forbid all)",
}


class RequestError(ValueError):
    """One request cannot be served as it is; the text is for the one who sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the configuration allow. `max_model_len` is prompt and output together."""

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step brought one request. The update with a `finish_reason` is its last.

    `stop_token_id` is the EOS or stop id that ended it; it is not among `token_ids`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: str | None = None
    seq_id: int = field(default=-1, compare=False)
    cached_tokens: int = 0


@dataclass(slots=True)
class Counters:
    """Totals since the scheduler was made."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Scheduler:
    """Plans steps over sequences and a block pool; knows neither model, device nor clock."""

    def __init__(self, pool: BlockPool, policy: SchedulingPolicy, limits: Limits) -> None:
        self.max_len = min(limits.max_model_len, pool.num_blocks * limits.block_size)
        self.limits = limits
        self.pool = pool
        self.counters = Counters()
        self.output_lengths = OutputLengths()
        self.prefix_cache = PrefixCache(
            pool, limits.block_size, enabled=limits.enable_prefix_caching
        )
        self._waiting = WaitingQueue(policy, limits.block_size)
        self._running: dict[int, Sequence] = {}
        self._by_request: dict[str, Sequence] = {}
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
        """Queue a request; raise `RequestError` or `ParameterError` when it cannot be served.

        Requests of one `scope` share the cached blocks of equal prompts, and of no other.
        """
        if request_id in self._by_request:
            raise RequestError(f"a request with id {request_id!r} is already here")
        params.validate(self.limits.vocab_size)
        self._check_prompt(prompt)
        room = self.max_len - len(prompt)
        eos = frozenset[int]() if params.ignore_eos else self.limits.eos_token_ids
        sequence = Sequence(
            seq_id=self._next_id,
            request_id=request_id,
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
            max_new_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            params=params,
            arrival=self._next_id,
            arrival_time=now,
            priority=priority,
            scope=scope,
            stop_ids=eos.union(params.stop_token_ids),
        )
        self._next_id += 1
        self._by_request[request_id] = sequence
        self._waiting.push(sequence)

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise RequestError("the prompt has no tokens")
        if len(prompt) >= self.max_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; at most {self.max_len - 1} leave room for "
                f"one of output (context {self.limits.max_model_len} tokens, KV cache "
                f"{self.pool.num_blocks * self.limits.block_size})"
            )
        vocab_size = self.limits.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            bad = next(token for token in prompt if not 0 <= token < vocab_size)
            raise RequestError(f"token id {bad} in the prompt; valid ids are 0..{vocab_size - 1}")

    def abort(self, request_id: str) -> SequenceUpdate | None:
        """End a request and free its blocks; None when there is no such request."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return None
        self._drop(sequence)
        return SequenceUpdate(request_id, [], "abort", seq_id=sequence.seq_id)

    # Plan.

    def plan(self) -> StepPlan:
        """Choose the next step's tokens and give them blocks."""
        scheduled: list[ScheduledSequence] = []
        preempted: list[int] = []
        budget = self.limits.max_num_batched_tokens
        stalled = False
        for sequence in tuple(self._running.values()):
            if sequence.seq_id not in self._running:
                break  # preempted for one before it, as were all after it
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if not self._grow(sequence, count, preempted):
                stalled = True
                break
            scheduled.append(self._schedule(sequence, count))
            budget -= count
        if not stalled:
            self._admit(budget, scheduled)
        return StepPlan(sequences=tuple(scheduled), preempted=tuple(preempted))

    def _admit(self, budget: int, scheduled: list[ScheduledSequence]) -> None:
        while budget > 0 and self._waiting and len(self._running) < self.limits.max_num_seqs:
            sequence = self._waiting.peek()
            found = self.prefix_cache.find(sequence)
            if self._admission_blocks(sequence, found) > self.pool.num_free:
                return  # those behind it wait too: the order is the policy's, not the size's
            self._waiting.pop()
            self._running[sequence.seq_id] = sequence
            self.prefix_cache.attach(sequence, found)
            count = min(sequence.pending, budget)
            self._extend(sequence, count)
            scheduled.append(self._schedule(sequence, count))
            budget -= count

    def _admission_blocks(self, sequence: Sequence, found: list[int]) -> int:
        """Blocks to be taken for its known tokens and the output it is expected to grow by.

        By expectation, not by `max_tokens`: reserving the worst case leaves most of the cache
        empty. Where the expectation is wrong, preemption corrects it. Never more than the pool, as
        growth ends at `max_new_tokens`; so with nothing running the next is always admitted.
        Blocks found in the cache are to be taken too, unless somebody holds them already.
        """
        growth = expected_growth(sequence, self.output_lengths.mean)
        active = sum(1 for block in found if self.pool.references(block))
        return blocks_for(len(sequence.tokens) + growth, self.limits.block_size) - active

    def _grow(self, sequence: Sequence, count: int, preempted: list[int]) -> bool:
        """Give a running sequence blocks for `count` more tokens, preempting later ones if need be.

        False when it is the last admitted and there are not enough: it sits this step out.
        """
        size = self.limits.block_size
        need = blocks_for(sequence.computed + count, size) - len(sequence.block_table)
        if need <= 0:
            return True
        while self.pool.num_free < need:
            victim = self._running[next(reversed(self._running))]
            if victim is sequence:
                return False
            self._preempt(victim)
            preempted.append(victim.seq_id)
        sequence.block_table += self.pool.allocate(need)
        return True

    def _extend(self, sequence: Sequence, count: int) -> None:
        """Blocks for the first chunk of a sequence just admitted; admission saw that they fit."""
        need = blocks_for(sequence.computed + count, self.limits.block_size)
        sequence.block_table += self.pool.allocate(need - len(sequence.block_table))

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
            writes=start >= sequence.chained * self.limits.block_size,
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Take the sequence's blocks; it returns to its place in the queue and replays later."""
        del self._running[sequence.seq_id]
        self._free_blocks(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(sequence)

    # Commit.

    def commit(self, plan: StepPlan, sampled: list[int]) -> list[SequenceUpdate]:
        """Record a step that ran. `sampled` has one token for each sequence that samples, in order.

        A sequence aborted since the plan was made is passed over.
        """
        self.counters.steps += 1
        updates: list[SequenceUpdate] = []
        drawn = iter(sampled)
        for share in plan.sequences:
            token = next(drawn) if share.samples else None
            sequence = self._running.get(share.seq_id)
            if sequence is None:
                continue
            sequence.computed = share.start + len(share.token_ids)
            if token != NO_TOKEN:
                self.prefix_cache.publish(sequence)
            if token is not None:
                updates.append(self._draw(sequence, token))
        return updates

    def _draw(self, sequence: Sequence, token: int) -> SequenceUpdate:
        """Take in a drawn token: record it, and end the sequence if it is the last."""
        generated = sequence.num_generated
        token_ids: list[int] = []
        reason = stop_token_id = error = None
        if token in _NO_TOKEN_TEXTS:
            reason = "error"
            error = f"{_NO_TOKEN_TEXTS[token]} after {len(sequence.tokens)} tokens"
            if token == NO_TOKEN:
                # NaN may stand in any of its blocks: nobody else may find them.
                self.pool.forget(sequence.block_table)
            self._drop(sequence)
        else:
            self.counters.generation_tokens += 1
            if generated == 0:
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
        )

    def _finish(self, sequence: Sequence) -> None:
        self.output_lengths.observe(sequence.num_generated)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._by_request[sequence.request_id]
        if self._running.pop(sequence.seq_id, None) is None:
            self._waiting.remove(sequence)
        self._free_blocks(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        # A new list: a plan may still hold the old one.
        sequence.block_table = []
        sequence.computed = sequence.chained = 0

    # What others may look at.

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self._by_request)

    @property
    def running(self) -> Iterable[Sequence]:
        """The running sequences, in order of admission."""
        return self._running.values()

    @property
    def num_running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self._running)

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
        self.pool.check_integrity(s.block_table for s in self._by_request.values())
