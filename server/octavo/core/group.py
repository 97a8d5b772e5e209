"""A request's sequences: one for each sample it asked for. They come, wait and leave as one.

The branches of a group have the prompt in common. The first of them, the lead, runs the prompt; the
others then take its blocks, and whoever first writes into a block that is held by more than one
copies it before.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.core.beam import BeamSearch
from octavo.core.sequence import Sequence
from octavo.kv_layout import KvGroups


@dataclass(slots=True, eq=False)
class Group:
    """The unfinished branches of one request, in order; a group without branches is over.

    `arrival` is its place in the order of adding. In a beam search the branches become each
    other's continuations, and end together.
    """

    arrival: int
    branches: list[Sequence]
    beam: BeamSearch | None = None

    @property
    def lead(self) -> Sequence:
        """The branch that runs the prompt for all."""
        return self.branches[0]

    @property
    def width(self) -> int:
        """Branches that are still drawing."""
        return len(self.branches)

    @property
    def swapped(self) -> bool:
        """True while its blocks are in host memory."""
        return any(branch.swapped for branch in self.branches)

    @property
    def num_tokens(self) -> int:
        """Tokens known of all branches, the prompt counted once."""
        prompt = self.lead.num_prompt_tokens
        return prompt + sum(branch.length - prompt for branch in self.branches)

    @property
    def num_computed(self) -> int:
        """Tokens in the cache, which it would take as many to compute again; the prompt once."""
        prompt = self.lead.num_prompt_tokens
        longest = max(branch.computed for branch in self.branches)
        own = sum(max(0, branch.computed - prompt) for branch in self.branches)
        return min(longest, prompt) + own

    @property
    def remaining(self) -> int:
        """Tokens that may still be drawn."""
        return sum(branch.remaining for branch in self.branches)

    def num_blocks(self, kv: KvGroups) -> int:
        """Blocks for all tokens known."""
        return self.blocks_with(kv, [0] * len(self.branches))

    def blocks_with(self, kv: KvGroups, growth: list[int], chunk: int = 1) -> int:
        """Blocks for all tokens known and for `growth` more of each branch.

        `chunk` bounds the tokens that a step runs of the group.
        """
        lengths = [branch.length + more for branch, more in zip(self.branches, growth, strict=True)]
        return kv.blocks(lengths, self.lead.num_prompt_tokens, chunk)
