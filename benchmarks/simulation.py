"""The real scheduler and the real loop over a device that computes nothing."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from workloads import Work

from octavo import wire
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.sequence import Sequence, blocks_for
from octavo.core.step import StepPlan, StepResult
from octavo.engine.loop import EngineLoop
from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams

VOCAB_SIZE = 32_000
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
# How sure the device that computes nothing is of its next token: the spread of its logits, about
# that of a language model's best few.
_LOGIT_SPREAD = 2.0

Look = Callable[[StepPlan], None]


class FakeDevice:
    """Draws at once. No two samples of a request draw the same, as with long texts none do.

    To a beam search it gives candidates of random probability; `look` sees every plan.
    """

    def __init__(self, look: Look | None = None, seed: int = 0) -> None:
        self._look = look
        self._rng = random.Random(seed)

    def submit(self, plan: StepPlan) -> StepResult:
        if self._look is not None:
            self._look(plan)
        drawing = [share for share in plan.sequences if share.samples]
        tokens = [(share.branch * 1009 + share.num_generated) % VOCAB_SIZE for share in drawing]
        searching = [share for share in drawing if share.params.use_beam_search]
        found = {share.seq_id: self._candidates(share.params.logprobs or 1) for share in searching}
        return StepResult(tokens, found)

    def collect(self, step: StepResult) -> StepResult:
        return step

    def _candidates(self, count: int) -> TokenLogprobs:
        logits = sorted((self._rng.gauss(0, _LOGIT_SPREAD) for _ in range(count)), reverse=True)
        # All the other tokens of the vocabulary together weigh a little, too.
        ids = self._rng.sample(range(VOCAB_SIZE), count)
        logprobs = [logit - logits[0] - 0.5 for logit in logits]
        return TokenLogprobs(ids[0], logprobs[0], 1, ids, logprobs)


@dataclass(frozen=True, slots=True)
class Size:
    """How much the simulated engine may run at once."""

    num_blocks: int = 16_384
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = BLOCK_SIZE


def make_scheduler(size: Size) -> Scheduler:
    limits = Limits(
        block_size=size.block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=size.max_num_seqs,
        max_num_batched_tokens=size.max_num_batched_tokens,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset(),
    )
    policy = PolicyFactory.get_policy("fcfs")
    return Scheduler(BlockPool(size.num_blocks), policy, limits)


def plain(count: int) -> SamplingParams:
    """Exactly `count` tokens, greedily."""
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)


def run(
    scheduler: Scheduler, work: Iterable[Work], params: Callable[[int], SamplingParams], look: Look
) -> None:
    """Everything to its end, with `look` called in every step; the books must balance then."""
    loop = EngineLoop(scheduler, FakeDevice(look))
    for index, one in enumerate(work):
        loop.add(wire.AddRequest(str(index), one.prompt, params(one.output)))
    while loop.has_work:
        for output in loop.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id}: {output.error}")
    scheduler.check_integrity()


@dataclass(slots=True)
class Census:
    """Blocks and slots, added up over the steps, as they are when a step has been written.

    `tables` counts the entries of all block tables: what would be held if nothing were shared.
    `fewest` counts the blocks that would do if whatever could be shared were.
    """

    scheduler: Scheduler
    count_fewest: bool = False
    steps: int = 0
    tables: int = 0
    held: int = 0
    fewest: int = 0
    slots: int = 0
    filled: int = 0
    sum_of_shares: float = 0.0

    def look(self, plan: StepPlan) -> None:
        size, pool = self.scheduler.limits.block_size, self.scheduler.pool
        ends = {share.seq_id: share.start + len(share.token_ids) for share in plan.sequences}
        groups: dict[str, list[tuple[Sequence, int]]] = defaultdict(list)
        entries = tokens = 0
        for sequence in self.scheduler.running:
            end = ends.get(sequence.seq_id, sequence.computed)
            entries += len(sequence.block_table)
            tokens += end
            if sequence.block_table:
                groups[sequence.request_id].append((sequence, end))
        self.steps += 1
        self.tables += entries
        self.held += pool.counts.active
        if self.count_fewest:
            self.fewest += sum(fewest_blocks(group, size) for group in groups.values())
        else:  # without sharing a token is in one place
            self.slots += entries * size
            self.filled += tokens
            self.sum_of_shares += 1 - tokens / (entries * size) if entries else 0.0


def fewest_blocks(branches: list[tuple[Sequence, int]], size: int, at: int = 0) -> int:
    """Blocks from the `at`th on for branches that agree up to there, each with so many tokens.

    Those of equal content, and equal content before, are one; nothing can need fewer.
    """
    if len(branches) == 1:
        return max(0, blocks_for(branches[0][1], size) - at)
    alike: dict[tuple[int, ...], list[tuple[Sequence, int]]] = defaultdict(list)
    for sequence, end in branches:
        content = sequence.tokens[at * size : min(end, (at + 1) * size)]
        if content:
            alike[tuple(content)].append((sequence, end))
    return sum(1 + fewest_blocks(group, size, at + 1) for group in alike.values())
