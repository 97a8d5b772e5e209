"""The prefix cache: full blocks found again by the tokens in them and all tokens before.

A sequence's full blocks form a chain from its scope: each is known by what precedes it and by its
own token ids. The ids are in the key and are compared, so a block is never mistaken for another.
Nothing is stored here: the pool knows the keys, a sequence knows how far its chain reaches.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from octavo.core.block_pool import BlockKey, BlockPool
from octavo.core.sequence import Sequence


@dataclass(slots=True)
class PrefixCacheCounters:
    """Tokens that were looked for when a sequence first ran, and those of them that were found."""

    queries: int = 0
    hits: int = 0


class PrefixCache:
    """Finds and publishes the blocks of sequences; where disabled it finds and publishes none."""

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool) -> None:
        self.counters = PrefixCacheCounters()
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled

    def find(self, sequence: Sequence) -> list[int]:
        """The longest run of blocks, from its first token on, that hold the sequence's tokens.

        None for one that wants log-probabilities of its prompt: they come from running it.
        """
        blocks: list[int] = []
        wants_all = sequence.params.prompt_logprobs is not None and not sequence.num_generated
        if not self._enabled or wants_all:
            return blocks
        link: str | int = sequence.scope
        for index in range(len(sequence.tokens) // self._block_size):
            block = self._pool.find(self._key(sequence, link, index))
            if block is None:
                break
            blocks.append(block)
            link = self._pool.link(block)
        return blocks

    def attach(self, sequence: Sequence, blocks: list[int]) -> None:
        """Give the sequence the blocks that were found for it.

        At least its last token is left to run, for what comes next is drawn from it. Where that
        token is in the cache too, it runs without being written.
        """
        found = len(blocks) * self._block_size
        if blocks:
            self._pool.take(blocks)
            sequence.block_table = blocks
            sequence.chained = len(blocks)
            sequence.link = self._pool.link(blocks[-1])
            sequence.written = found
            sequence.computed = min(found, len(sequence.tokens) - 1)
        if self._enabled and sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
            self.counters.queries += len(sequence.tokens)
            self.counters.hits += sequence.computed

    def publish(self, sequence: Sequence, end: int) -> None:
        """Make the blocks of the first `end` tokens findable that have become full since."""
        if not self._enabled:
            return
        for index in range(sequence.chained, end // self._block_size):
            link = sequence.scope if index == 0 else sequence.link
            key = self._key(sequence, link, index)
            sequence.link = self._pool.publish(sequence.block_table[index], key)
            sequence.chained = index + 1

    def _key(self, sequence: Sequence, link: str | int, index: int) -> BlockKey:
        begin = index * self._block_size
        return link, array("i", sequence.tokens[begin : begin + self._block_size]).tobytes()
