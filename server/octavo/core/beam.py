"""Beam search: which continuations of a request's branches are kept, which are finished, and when
it is over.

The rules are those of transformers' `generate(num_beams=…)`, to the token. In each step the best
continuations of all branches are ranked together. Those that stop become hypotheses if they are
among the best `width`; the best `width` of the others go on. Of each branch as many candidates are
known as may be looked at before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from octavo.core.block_pool import BlockPool
from octavo.core.sequence import Sequence, common_prefix
from octavo.core.step import ScheduledSequence
from octavo.kv_layout import KvGroups
from octavo.logprobs import TokenLogprobs

# What a branch becomes: the branch of this number, and this token id more.
Step = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished continuation: without the token that stopped it, but scored with it."""

    score: float
    token_ids: list[int]
    stop_token_id: int | None


@dataclass(slots=True, kw_only=True)
class BeamSearch:
    """The state beside the branches. `candidates` are what this step brought, by branch."""

    width: int
    length_penalty: float
    early_stopping: bool | str
    max_new_tokens: int
    stop_ids: frozenset[int]
    scores: list[float] = field(init=False)
    candidates: dict[int, TokenLogprobs] = field(default_factory=dict)
    finished: list[Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        # At first all branches are the same; one stands for all.
        self.scores = [0.0] + [-math.inf] * (self.width - 1)

    @property
    def num_candidates(self) -> int:
        """Continuations to be known of each branch: all that go on may be its own, and before the
        last of them no more of its own stop than there are stop ids.
        """
        return self.width + len(self.stop_ids)

    def advance(self, length: int, output_of: Callable[[int], list[int]]) -> list[Step]:
        """Take the step for branches that have drawn `length` tokens; empty when it is the last.

        `output_of` gives a branch's own; it is asked only for what is finished.
        """
        length += 1
        ends = length >= self.max_new_tokens
        going: list[tuple[float, Step]] = []
        for place, (score, parent, token_id) in enumerate(self._ranked()):
            stops = token_id in self.stop_ids
            if not stops and not ends:
                going.append((score, (parent, token_id)))
            elif place < self.width:
                score /= length**self.length_penalty
                self._finish(score, output_of(parent), token_id, stops)
            if len(going) == self.width or (ends and place == self.width):
                break
        self.candidates = {}
        if not going or self._is_over(going[0][0], length):
            return []
        # Where there are fewer continuations than branches, the others idle.
        going += [(-math.inf, going[0][1])] * (self.width - len(going))
        self.scores = [score for score, _ in going]
        return [step for _, step in going]

    def _ranked(self) -> Iterator[tuple[float, int, int]]:
        """(score, branch, token id) of all continuations known, the best first; of equals the first
        branch's.

        A branch's own come largest first, so the next best of all is the next of some branch:
        little more is looked at than is taken.
        """
        # The next of each branch. A heap has its smallest first, so scores have their sign turned.
        leading = []
        for branch, score in enumerate(self.scores):
            if score == -math.inf:
                continue
            own = self.candidates[branch]
            if own.top_ids:
                leading.append((-(score + own.top_logprobs[0]), branch, 0))
        heapify(leading)
        while leading:
            loss, branch, place = leading[0]
            own = self.candidates[branch]
            yield -loss, branch, own.top_ids[place]
            place += 1
            if place < len(own.top_ids):
                loss = -(self.scores[branch] + own.top_logprobs[place])
                heapreplace(leading, (loss, branch, place))
            else:
                heappop(leading)

    def _finish(self, score: float, output: list[int], token_id: int, stops: bool) -> None:
        token_ids = output if stops else [*output, token_id]
        self.finished.append(Hypothesis(score, token_ids, token_id if stops else None))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]

    def _is_over(self, best: float, length: int) -> bool:
        """True when enough are finished and, as far as is looked, none that goes on gets better."""
        if len(self.finished) < self.width:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        return bool(best / length**self.length_penalty <= self.finished[-1].score)


def rebuild(branches: Items[Sequence], steps: Items[Step], pool: BlockPool) -> None:
    """Turn the branches into what they become: tables are shared, and only counts change.

    A branch's first continuation takes what was the branch's own; others get copies. As many
    branches end as there are others, and one table takes the place of another: what these two have
    in common, mostly the prompt and all but the last few blocks, keeps its count.
    """
    before = [branch.standing for branch in branches]
    goes_on = [False] * len(branches)
    others: list[list[int]] = []
    becomes = []
    for parent, _ in steps:
        own = before[parent]
        if goes_on[parent]:
            others.append(own[1])
            own = (own[0].copy(), own[1].copy(), *own[2:])
        goes_on[parent] = True
        becomes.append(own)
    ended = [own[1] for own, lives in zip(before, goes_on, strict=True) if not lives]
    for table, gone in zip(others, ended, strict=True):
        common = common_prefix(table, gone)
        pool.share(table[common:])
        pool.release(gone[common:])
    for branch, (_, token_id), own in zip(branches, steps, becomes, strict=True):
        branch.become(own, token_id)


def run_alike(
    branches: Items[Sequence], kv: KvGroups, pool: BlockPool
) -> tuple[list[ScheduledSequence], list[tuple[int, int]]] | None:
    """Let each branch run its newest token: the shares, and the copies of blocks before them.

    None, and nothing done, where the branches do not all decode and stand at the same token, where
    the free blocks may not suffice for all, or where tables have several groups or slide.
    """
    lead, width = branches[0], len(branches)
    start, prompt, params = lead.computed, lead.num_prompt_tokens, lead.params
    row, rows = start // kv.block_size, len(lead.block_table)
    if start < prompt or not row <= rows <= row + 1:
        return None
    if pool.num_free < width or kv.count > 1 or kv.sliding:
        return None
    for branch in branches:
        alike = branch.computed == start and len(branch.tokens) == start + 1
        if not alike or branch.written > start or len(branch.block_table) != rows:
            return None
    shares, copies = list[ScheduledSequence](), list[tuple[int, int]]()
    new = iter(pool.allocate(width) if row == rows else ())
    for branch in branches:
        table, tokens = branch.block_table, branch.tokens
        # Always a new list: a plan may still hold the old one.
        if row == rows:
            branch.block_table = table = [*table, next(new)]
        elif pool.references(shared := table[row]) > 1:
            [own] = pool.allocate(1)
            pool.release((shared,))
            copies.append((shared, own))
            branch.block_table = table = [*table[:row], own]
        branch.computed = start + 1
        # By position: one is made for each branch and step, and names take half as long again.
        share = ScheduledSequence(
            branch.seq_id,
            [tokens[start]],
            start,
            table,
            True,  # samples
            params,
            start + 1 - prompt,
            tokens,
            prompt,
            branch.branch,
        )
        shares.append(share)
    return shares, copies
