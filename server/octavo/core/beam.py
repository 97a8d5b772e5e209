"""Beam search: which continuations of a request's branches are kept, which are finished, and when
it is over.

The rules are those of transformers' `generate(num_beams=…)`, to the token. In each step the best
continuations of all branches are ranked together. Those that stop become hypotheses if they are
among the best `width`; the best `width` of the others go on. There are as many candidates as it
takes for `width` of them not to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from octavo.core.block_pool import BlockPool
from octavo.core.sequence import Sequence
from octavo.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished continuation: without the token that stopped it, but scored with it."""

    score: float
    token_ids: list[int]
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Step:
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

    def advance(self, outputs: Items[list[int]]) -> list[Step]:
        """Take the step for branches that have drawn `outputs`; empty when the search is over."""
        length = len(outputs[0]) + 1
        ends = length >= self.max_new_tokens
        going: list[tuple[float, Step]] = []
        for place, (score, step) in enumerate(self._ranked()):
            stops = step.token_id in self.stop_ids
            if not stops and not ends:
                going.append((score, step))
            elif place < self.width:
                self._finish(score / length**self.length_penalty, outputs[step.parent], step, stops)
        self.candidates = {}
        if not going or self._is_over(going[0][0], length):
            return []
        # Where there are fewer continuations than branches, the others idle.
        going = going[: self.width]
        going += [(-math.inf, going[0][1])] * (self.width - len(going))
        self.scores = [score for score, _ in going]
        return [step for _, step in going]

    def _ranked(self) -> list[tuple[float, Step]]:
        found = [
            (self.scores[branch] + logprob, Step(branch, token_id))
            for branch, of_branch in sorted(self.candidates.items())
            if self.scores[branch] > -math.inf
            for token_id, logprob in zip(of_branch.top_ids, of_branch.top_logprobs, strict=True)
        ]
        found.sort(key=lambda item: -item[0])
        return found[: self.num_candidates]

    def _finish(self, score: float, output: list[int], step: Step, stops: bool) -> None:
        token_ids = list(output) if stops else [*output, step.token_id]
        self.finished.append(Hypothesis(score, token_ids, step.token_id if stops else None))
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
    """Turn the branches into what they become: tables are shared, and only counts change."""
    before = [(b.tokens, b.block_table, b.computed, b.written, b.chained, b.link) for b in branches]
    for step in steps:
        pool.share(before[step.parent][1])
    for _, table, *_ in before:
        pool.release(table)
    for branch, step in zip(branches, steps, strict=True):
        tokens, table, branch.computed, branch.written, branch.chained, branch.link = before[
            step.parent
        ]
        branch.tokens = [*tokens, step.token_id]
        branch.length = len(branch.tokens)
        branch.block_table = list(table)
