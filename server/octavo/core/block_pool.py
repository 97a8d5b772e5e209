"""The KV blocks: who holds how many references to which, which are free, and what is in them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

NULL_BLOCK = 0
# In a table: no block, where a sliding window has left one behind. Sharing and releasing a table
# pass over it.
NO_BLOCK = -1
# Blocks that are checked at a time: a quarter of a millisecond.
AUDIT_TURN = 2048

# What a full block holds: the digest of all that comes before it, its own token ids, packed, and
# the group of layers. Equal keys are equal contents, from the first token on.
BlockKey = tuple[bytes, bytes, int]


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
    handed out, and is where padding may point. A state is not stored but follows: active from one
    reference, shared from two; without references cached if its contents were published and can
    still be found, else free. Both of these can be allocated, free blocks first; then cached ones
    that nobody ever found, then the others, longest unused first.
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
        self._found = [False] * (num_blocks + 1)
        self._never_found: OrderedDict[int, None] = OrderedDict()
        self._found_before: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, the cached ones among them."""
        return len(self._free) + len(self._never_found) + len(self._found_before)

    @property
    def counts(self) -> BlockCounts:
        """Blocks by state."""
        available = self.num_free
        return BlockCounts(
            total=self.num_blocks,
            active=self.num_blocks - available,
            shared=self._shared,
            cached=available - len(self._free),
            free=len(self._free),
        )

    def references(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks without references, each with one reference then."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_free} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.allocations += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; all must be active."""
        for block in blocks:
            if block == NO_BLOCK:
                continue
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
            if block == NO_BLOCK:
                continue
            self._require_active(block)
            self._references[block] -= 1
            if self._references[block] == 1:
                self._shared -= 1
            elif self._references[block] == 0:
                if block in self._key_of:
                    self._queue_of(block)[block] = None
                else:
                    self._free.append(block)

    # Contents.

    def publish(self, block: int, key: BlockKey) -> None:
        """Say what an active block holds, so that it can be found.

        Where another block holds the same already, that one stays the one to be found.
        """
        self._require_active(block)
        before = self._key_of.get(block)
        if before is not None and before != key:
            raise IntegrityError(f"block {block} was published before, with other contents")
        if self._by_key.setdefault(key, block) == block:
            self._key_of[block] = key

    def find(self, key: BlockKey) -> int | None:
        """The block that holds this, active or cached; `take` it before anything is allocated."""
        return self._by_key.get(key)

    def take(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of the blocks found, which may be cached."""
        for block in blocks:
            if block not in self._key_of:
                raise IntegrityError(f"block {block} is not published")
            if self._references[block] == 0:
                del self._queue_of(block)[block]
                self._references[block] = 1
            else:
                self.share((block,))
            self._found[block] = True

    def forget(self, blocks: Iterable[int]) -> None:
        """Let these blocks not be found any more, where they were published."""
        for block in blocks:
            if block not in self._key_of:
                continue
            if self._references[block] == 0:
                del self._queue_of(block)[block]
                self._free.append(block)
            self._unpublish(block)

    def _evict(self) -> int:
        queue = self._never_found or self._found_before
        block, _ = queue.popitem(last=False)
        self._unpublish(block)
        return block

    def _unpublish(self, block: int) -> None:
        del self._by_key[self._key_of.pop(block)]
        self._found[block] = False

    def _queue_of(self, block: int) -> OrderedDict[int, None]:
        return self._found_before if self._found[block] else self._never_found

    def _require_active(self, block: int) -> None:
        if not NULL_BLOCK < block <= self.num_blocks or self._references[block] < 1:
            raise IntegrityError(f"block {block} is not active")

    # Books.

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise `IntegrityError` unless the counts equal what `tables`, all tables there are, hold.

        O(blocks), at once: for tests. An engine with nothing to do takes `audit`.
        """
        for _ in self.audit(tables):
            pass

    def audit(self, tables: Iterable[Sequence[int]]) -> Iterator[None]:
        """The same in turns, each bounded whatever the pool's size; nothing may change between."""
        held = Counter(block for table in tables for block in table)
        held.pop(NO_BLOCK, None)
        unused = 0
        for block, references in enumerate(self._references):
            if held.get(block, 0) != references:
                raise IntegrityError(
                    f"block {block} has {references} references and is in {held[block]} tables"
                )
            unused += not references
            if block % AUDIT_TURN == 0:
                yield
        shared = sum(1 for references in held.values() if references > 1)
        if shared != self._shared:
            raise IntegrityError(f"{self._shared} blocks counted as shared, {shared} are")
        # The null block is in no table and in no list.
        yield from self._audit_lists(unused - 1)
        yield from self._audit_contents()

    def _audit_lists(self, unused: int) -> Iterator[None]:
        """Each block without references is in one list, and in the right one."""
        if self.num_free != unused:
            raise IntegrityError(f"{self.num_free} free blocks listed, {unused} unused")
        listed = bytearray(self.num_blocks + 1)
        queues = ((self._free, None), (self._never_found, False), (self._found_before, True))
        for queue, found in queues:
            for index, block in enumerate(queue):
                if listed[block] or self._references[block] or block == NULL_BLOCK:
                    raise IntegrityError(f"block {block} is listed as free twice, or is not free")
                listed[block] = True
                if (block in self._key_of) is (found is None) or self._found[block] is not bool(
                    found
                ):
                    raise IntegrityError(f"block {block} is in the wrong list")
                if index % AUDIT_TURN == 0:
                    yield

    def _audit_contents(self) -> Iterator[None]:
        """Blocks and their contents belong together, one to one."""
        if len(self._by_key) != len(self._key_of):
            raise IntegrityError(
                f"{len(self._key_of)} published blocks and {len(self._by_key)} contents"
            )
        for index, (block, key) in enumerate(self._key_of.items()):
            if self._by_key.get(key) != block:
                raise IntegrityError(f"block {block} cannot be found by its content")
            if index % AUDIT_TURN == 0:
                yield
