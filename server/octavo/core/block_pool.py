"""The KV blocks: who holds how many references to which, and which are free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NULL_BLOCK = 0


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free: the caller did not look first."""


class IntegrityError(RuntimeError):
    """The pool's books do not balance: a bug, named so that it is found near its cause."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks by state; `active` includes `shared`, and total = active + cached + free."""

    total: int
    active: int
    shared: int
    cached: int
    free: int


class BlockPool:
    """Blocks 1..num_blocks, each with a reference count; all operations are O(1) a block.

    Block 0 is the null block: it exists on the device beside the `num_blocks` usable ones, is never
    handed out, and is where padding may point. A state is not stored but follows from the reference
    count: free at 0, active from 1, shared from 2. (Cached, a free block whose contents may still
    be found, comes with the prefix cache.)
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.allocations = 0
        self._references = [0] * (num_blocks + 1)
        self._shared = 0
        # A stack, lowest id on top: what was used last is used next, while it is in the caches.
        self._free = list(range(num_blocks, NULL_BLOCK, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def counts(self) -> BlockCounts:
        """Blocks by state."""
        free = len(self._free)
        return BlockCounts(
            total=self.num_blocks,
            active=self.num_blocks - free,
            shared=self._shared,
            cached=0,
            free=free,
        )

    def references(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.allocations += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; all must be active."""
        for block in blocks:
            self._require_active(block)
            self._references[block] += 1
            if self._references[block] == 2:
                self._shared += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block; the last reference frees it.

        A table is released from its end, so that the block that is least likely to be a common
        prefix is reused first.
        """
        for block in reversed(blocks):
            self._require_active(block)
            self._references[block] -= 1
            if self._references[block] == 1:
                self._shared -= 1
            elif self._references[block] == 0:
                self._free.append(block)

    def _require_active(self, block: int) -> None:
        if not NULL_BLOCK < block <= self.num_blocks or self._references[block] < 1:
            raise IntegrityError(f"block {block} is not active")

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise `IntegrityError` unless the counts equal what `tables`, all tables there are, hold.

        O(blocks): for tests and for an engine with nothing to do.
        """
        held = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks + 1):
            if held[block] != self._references[block]:
                raise IntegrityError(
                    f"block {block} has {self._references[block]} references "
                    f"and is in {held[block]} tables"
                )
        unused = {block for block in range(1, self.num_blocks + 1) if not held[block]}
        if len(self._free) != len(unused) or set(self._free) != unused:
            raise IntegrityError(f"{len(self._free)} free blocks listed, {len(unused)} unused")
        shared = sum(1 for references in held.values() if references > 1)
        if shared != self._shared:
            raise IntegrityError(f"{self._shared} blocks counted as shared, {shared} are")
