"""The block pool against a model that is nothing but the tables themselves."""

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.core.block_pool import (
    AUDIT_TURN,
    NO_BLOCK,
    NULL_BLOCK,
    BlockPool,
    IntegrityError,
    OutOfBlocksError,
)


class PoolMachine(RuleBasedStateMachine):
    """Tables are made, shared and released at random; the pool's books must follow from them.

    The model of contents is one list of (block, key, ever found), longest unused first.
    """

    @initialize(size=st.integers(1, 12))
    def make(self, size):
        self.pool = BlockPool(size)
        self.size = size
        self.tables = []
        self.handed_out = 0
        self.contents = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        available = self.size - len(self.held())
        if count > available:
            text = f"{count} blocks asked for, {available} free"
            with pytest.raises(OutOfBlocksError, match=text):
                self.pool.allocate(count)
            return
        idle = [entry for entry in self.contents if entry[0] not in self.held()]
        evicted = sorted(idle, key=lambda entry: entry[2])[: max(0, count - self.num_blank())]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.held()), "a block in use was handed out"
        assert NULL_BLOCK not in blocks
        assert {entry[0] for entry in idle} & set(blocks) == {entry[0] for entry in evicted}
        self.contents = [entry for entry in self.contents if entry not in evicted]
        self.handed_out += count
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share_a_prefix(self, data):
        table = data.draw(st.sampled_from(self.tables))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.pool.share(prefix)
        self.tables.append(list(prefix))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if block not in self.held():
                self.contents.sort(key=lambda entry: entry[0] == block)

    @rule(data=st.data(), content=st.integers(0, 9))
    def publish(self, data, content):
        known = {block for block, _, _ in self.contents}
        blank = sorted(set(self.held()) - known)
        if not blank:
            return
        block, key = data.draw(st.sampled_from(blank)), (b"", bytes([content]), 0)
        self.pool.publish(block, key)
        if not any(entry[1] == key for entry in self.contents):
            self.contents.append((block, key, False))

    @rule(content=st.integers(0, 9))
    def find_and_take(self, content):
        key = (b"", bytes([content]), 0)
        found = self.pool.find(key)
        expected = [block for block, other, _ in self.contents if other == key]
        assert ([] if found is None else [found]) == expected
        if found is not None:
            self.pool.take([found])
            self.tables.append([found])
            self.contents = [(b, k, f or b == found) for b, k, f in self.contents]

    @rule(block=st.integers(1, 12))
    def forget(self, block):
        self.pool.forget([block])
        self.contents = [entry for entry in self.contents if entry[0] != block]

    def held(self):
        return Counter(block for table in self.tables for block in table)

    def num_blank(self):
        """Blocks that nobody holds and that hold nothing known."""
        return self.size - len(set(self.held()) | {block for block, _, _ in self.contents})

    @invariant()
    def books_follow_from_the_tables(self):
        held = self.held()
        counts = self.pool.counts
        assert counts.total == self.size
        assert counts.active == len(held)
        assert counts.shared == sum(1 for n in held.values() if n > 1)
        assert counts.free == self.num_blank()
        assert counts.free + counts.cached == self.pool.num_free == self.size - len(held)
        assert all(self.pool.references(block) == n for block, n in held.items())
        assert self.pool.allocations == self.handed_out
        self.pool.check_integrity(self.tables)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


@pytest.fixture
def pool():
    return BlockPool(4)


def test_a_released_block_is_the_next_to_be_used(pool):
    table = pool.allocate(3)
    pool.release(table)
    assert pool.allocate(3) == table


@pytest.mark.parametrize("block", [NULL_BLOCK, -2, 5, 4])
def test_only_active_blocks_can_be_shared_or_released(pool, block):
    pool.allocate(3)
    with pytest.raises(IntegrityError, match=f"block {block} is not active"):
        pool.share([block])
    with pytest.raises(IntegrityError, match=f"block {block} is not active"):
        pool.release([block])


def test_a_pool_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block, got 0"):
        BlockPool(0)


def test_only_published_blocks_can_be_taken(pool):
    (block,) = pool.allocate(1)
    with pytest.raises(IntegrityError, match=f"block {block} is not published"):
        pool.take([block])


def test_a_block_is_published_once_and_only_while_it_is_active(pool):
    (block,) = pool.allocate(1)
    pool.publish(block, (b"", b"a", 0))
    pool.publish(block, (b"", b"a", 0))
    for other in ((b"", b"b", 0), (b"", b"a", 1), (b"x", b"a", 0)):
        with pytest.raises(IntegrityError, match="published before"):
            pool.publish(block, other)
    pool.release([block])
    with pytest.raises(IntegrityError, match="not active"):
        pool.publish(block, (b"", b"c", 0))


def test_no_block_is_passed_over(pool):
    table = pool.allocate(2)
    pool.share([NO_BLOCK, *table])
    assert [pool.references(block) for block in table] == [2, 2]
    pool.check_integrity([[NO_BLOCK, *table], table])
    pool.release([NO_BLOCK, NO_BLOCK, *table])
    pool.release(table)
    assert pool.counts.free == 4


def leak(pool, tables):
    tables.pop()


def forget_reference(pool, tables):
    tables.append(tables[0])


def free_twice(pool, tables):
    pool._free.append(pool._free[-1])


def hand_out_free(pool, tables):
    pool._free.pop()


def miscount_shared(pool, tables):
    pool._shared += 1


def lose_a_cached_block(pool, tables):
    pool._never_found.popitem()


def lose_a_key(pool, tables):
    pool._key_of.popitem()


def swap_contents(pool, tables):
    pool._by_key = dict(zip(pool._by_key, reversed(pool._by_key.values()), strict=True))


def mark_a_cached_block_found(pool, tables):
    pool._found[next(iter(pool._never_found))] = True


def publish_a_free_block(pool, tables):
    block = pool._free[0]
    key = (b"", b"x", 0)
    pool._by_key[key], pool._key_of[block] = block, key


def test_the_check_of_a_large_pool_comes_in_many_turns():
    pool = BlockPool(10 * AUDIT_TURN)
    held = pool.allocate(4 * AUDIT_TURN)
    for block in held:
        pool.publish(block, (b"", block.to_bytes(4), 0))
    pool.release(held[AUDIT_TURN:])
    # Every block, each that is in a list, each that can be found.
    assert 10 + 9 + 4 <= sum(1 for _ in pool.audit([held[:AUDIT_TURN]])) <= 10 + 9 + 4 + 5
    turns = pool.audit([held[: AUDIT_TURN - 1]])
    with pytest.raises(IntegrityError):
        next(itertools.islice(turns, 9, None))


DAMAGE = (
    leak, forget_reference, free_twice, hand_out_free, miscount_shared, lose_a_cached_block,
    lose_a_key, swap_contents, mark_a_cached_block_found,
    publish_a_free_block,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_the_integrity_check_finds(damage):
    pool = BlockPool(6)
    tables = [pool.allocate(1), pool.allocate(2)]
    old = pool.allocate(2)
    for content, block in enumerate([*old, *tables[0]]):
        pool.publish(block, (b"", bytes([content]), 0))
    pool.release(old)
    pool.check_integrity(tables)
    damage(pool, tables)
    with pytest.raises(IntegrityError):
        pool.check_integrity(tables)
