"""The prefix cache: full blocks found again by the tokens in them and all tokens before.

A sequence's full blocks form a chain from its scope: each is known by the digest of what precedes
it and by its own token ids, which are in the key and are compared. Nothing is stored here: the pool
knows the keys, a sequence knows how far its chain reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from struct import Struct

from octavo.core.block_pool import NO_BLOCK, BlockKey, BlockPool
from octavo.core.sequence import Sequence
from octavo.kv_layout import KvGroups

# Long enough that nobody makes two beginnings with one digest to be given another tenant's blocks.
_DIGEST_BYTES = 32


@dataclass(slots=True)
class PrefixCacheCounters:
    """Tokens that were looked for when a sequence first ran, and those of them that were found."""

    queries: int = 0
    hits: int = 0


@dataclass(slots=True, frozen=True)
class Prefix:
    """Rows of a block table that hold a sequence's first tokens, and the digest of those."""

    rows: int
    table: list[int]
    link: bytes


NOTHING = Prefix(0, [], b"")


class PrefixCache:
    """Finds and publishes the blocks of sequences; where disabled it finds and publishes none."""

    def __init__(self, pool: BlockPool, kv: KvGroups, *, enabled: bool) -> None:
        self.counters = PrefixCacheCounters()
        self._pool = pool
        self._kv = kv
        self._enabled = enabled
        self._pack = Struct(f"{kv.block_size}i").pack

    @property
    def enabled(self) -> bool:
        """Whether anything is published."""
        return self._enabled

    def find(self, sequence: Sequence, joined_at: int | None = None) -> Prefix:
        """The longest usable prefix: rows from the first token on that hold the sequence's tokens.

        Usable is what a group that keeps everything holds all of, and each windowed group as much
        as the next token to run sees, or the one at `joined_at`, where other branches will go on
        with these blocks. None for a sequence that wants log-probabilities of its prompt: they come
        from running it.
        """
        wants_all = sequence.params.prompt_logprobs is not None and not sequence.num_generated
        if not self._enabled or wants_all:
            return NOTHING
        if self._kv.sliding:
            return self._find_windowed(sequence, joined_at)
        return self._find_whole(sequence)

    def _find_whole(self, sequence: Sequence) -> Prefix:
        """Where no group slides: as many rows as all groups have."""
        find, groups = self._pool.find, range(self._kv.count)
        table: list[int] = []
        link, rows = _root(sequence.scope), len(sequence.tokens) // self._kv.block_size
        for row in range(rows):
            packed = self._packed(sequence, row)
            for group in groups:
                block = find((link, packed, group))
                if block is None:
                    return Prefix(row, table[: row * self._kv.count], link)
                table.append(block)
            link = _digest(link, packed)
        return Prefix(rows, table, link)

    def _find_windowed(self, sequence: Sequence, joined_at: int | None) -> Prefix:
        kv, find = self._kv, self._pool.find
        table: list[int] = []
        best = NOTHING
        # How many rows in a row, up to the present one, each windowed group has.
        runs = dict.fromkeys((group for group, _ in kv.sliding), 0)
        for row, (before, packed, link) in enumerate(self._chain(sequence)):
            for group in range(kv.count):
                block = find((before, packed, group))
                if block is None and group not in runs:
                    return self._seen(sequence, best, joined_at)
                table.append(NO_BLOCK if block is None else block)
                if group in runs:
                    runs[group] = 0 if block is None else runs[group] + 1
            first = self._next_token(sequence, row + 1, joined_at)
            if all(row + 1 - kv.behind(w, first) <= runs[g] for g, w in kv.sliding):
                best = Prefix(row + 1, table, link)
        return self._seen(sequence, best, joined_at)

    def _seen(self, sequence: Sequence, found: Prefix, joined_at: int | None) -> Prefix:
        """The prefix in a table of its own, without what no token to come sees."""
        kv = self._kv
        table = found.table[: found.rows * kv.count]
        first = self._next_token(sequence, found.rows, joined_at)
        for group, window in kv.sliding:
            for row in range(kv.behind(window, first)):
                table[row * kv.count + group] = NO_BLOCK
        return Prefix(found.rows, table, found.link)

    def _next_token(self, sequence: Sequence, rows: int, joined_at: int | None = None) -> int:
        """The position that runs first when so many rows are there; the last token at the latest.

        What comes next is drawn from the last token, so it runs though it is in the cache too.
        """
        first = min(rows * self._kv.block_size, len(sequence.tokens) - 1)
        return first if joined_at is None else min(first, joined_at)

    def attach(self, sequence: Sequence, prefix: Prefix) -> None:
        """Give the sequence the blocks that were found for it.

        Where its last token is in the cache too, it runs without being written.
        """
        if prefix.rows:
            self._pool.take(block for block in prefix.table if block != NO_BLOCK)
            sequence.block_table = prefix.table
            sequence.chained, sequence.link = prefix.rows, prefix.link
            sequence.written = prefix.rows * self._kv.block_size
            sequence.computed = self._next_token(sequence, prefix.rows)
        if self._enabled and sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
            self.counters.queries += len(sequence.tokens)
            self.counters.hits += sequence.computed

    def publish(self, sequence: Sequence, end: int) -> None:
        """Make the blocks of the first `end` tokens findable that have become full since."""
        if not self._enabled:
            return
        count = self._kv.count
        table, publish = sequence.block_table, self._pool.publish
        link = sequence.link if sequence.chained else _root(sequence.scope)
        for row in range(sequence.chained, end // self._kv.block_size):
            packed = self._packed(sequence, row)
            for group in range(count):
                block = table[row * count + group]
                if block != NO_BLOCK:
                    publish(block, (link, packed, group))
            sequence.link = link = _digest(link, packed)
            sequence.chained = row + 1

    def forget(self, sequence: Sequence) -> None:
        """Let nothing be found any more that holds this sequence's tokens, held by it or not."""
        for before, packed, _ in self._chain(sequence):
            for group in range(self._kv.count):
                block = self._pool.find((before, packed, group))
                if block is not None:
                    self._pool.forget((block,))

    def keys(self, sequence: Sequence, rows: int) -> Iterator[BlockKey]:
        """The keys of a sequence's first `rows` rows, entry by entry of its table.

        None where the cache is disabled.
        """
        if not self._enabled:
            return
        for before, packed, _ in islice(self._chain(sequence), rows):
            for group in range(self._kv.count):
                yield before, packed, group

    def _chain(self, sequence: Sequence) -> Iterator[tuple[bytes, bytes, bytes]]:
        """For each full row of its tokens: the digest before, its tokens, the digest after."""
        link = _root(sequence.scope)
        for row in range(len(sequence.tokens) // self._kv.block_size):
            packed = self._packed(sequence, row)
            before, link = link, _digest(link, packed)
            yield before, packed, link

    def _packed(self, sequence: Sequence, row: int) -> bytes:
        begin = row * self._kv.block_size
        return self._pack(*sequence.tokens[begin : begin + self._kv.block_size])


def _root(scope: str) -> bytes:
    """Where a scope's chains begin; no digest of tokens is equal to it."""
    return blake2b(scope.encode(), digest_size=_DIGEST_BYTES, person=b"scope").digest()


def _digest(before: bytes, packed: bytes) -> bytes:
    return blake2b(before + packed, digest_size=_DIGEST_BYTES).digest()
