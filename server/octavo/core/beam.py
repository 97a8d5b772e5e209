"""Beam search: which continuations of a request's branches are kept, which are finished, and when
it is over.

The rules are those of transformers' `generate(num_beams=…)`, to the token. In each step the best
continuations of all branches are ranked together. Those that stop become hypotheses if they are
among the best `width`; the best `width` of the others go on. There are as many candidates as it
takes for `width` of them not to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from octavo.core.block_pool import BlockPool
from octavo.core.sequence import Sequence, common_prefix
from octavo.logprobs import TokenLogprobs

_SCORE = itemgetter(0)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished continuation: without the token that stopped it, but scored with it."""

    score: float
    token_ids: list[int]
    stop_token_id: int | None


class Step(NamedTuple):
    """What a branch becomes: the branch `parent`, and one token more."""

    parent: int
    token_id: int


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
        """Continuations to be ranked, and so to be known of each branch."""
        return max(2, 1 + len(self.stop_ids)) * self.width

    @property
    def complete(self) -> bool:
        """True when every branch has brought its candidates."""
        return len(self.candidates) == self.width

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
                going.append((score, Step(parent, token_id)))
            elif place < self.width:
                score /= length**self.length_penalty
                self._finish(score, output_of(parent), token_id, stops)
            if len(going) == self.width:
                break  # as many were looked at, so that none behind can be among the best
        self.candidates = {}
        if not going or self._is_over(going[0][0], length):
            return []
        # Where there are fewer continuations than branches, the others idle.
        going += [(-math.inf, going[0][1])] * (self.width - len(going))
        self.scores = [score for score, _ in going]
        return [step for _, step in going]

    def _ranked(self) -> list[tuple[float, int, int]]:
        """(score, branch, token id) of the best continuations; of equals the first branch's."""
        found: list[tuple[float, int, int]] = []
        most, bar = self.num_candidates, math.nan  # nothing is below it
        for branch, score in enumerate(self.scores):
            if score == -math.inf:
                continue
            own = self.candidates[branch]
            # The largest come first, so that most branches are left after a few.
            for logprob, token_id in zip(own.top_logprobs, own.top_ids, strict=False):
                if score + logprob <= bar:
                    break
                found.append((score + logprob, branch, token_id))
            found.sort(key=_SCORE, reverse=True)
            del found[most:]
            if len(found) == most:
                bar = _SCORE(found[-1])
        return found

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
    for branch, step, own in zip(branches, steps, becomes, strict=True):
        branch.become(own, step.token_id)
