"""The block pool against a model that is nothing but the tables themselves."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.core.block_pool import NULL_BLOCK, BlockPool, IntegrityError, OutOfBlocksError


class PoolMachine(RuleBasedStateMachine):
    """Tables are made, shared and released at random; the pool's books must follow from them."""

    @initialize(size=st.integers(1, 12))
    def make(self, size):
        self.pool = BlockPool(size)
        self.size = size
        self.tables = []
        self.handed_out = 0

    @rule(count=st.integers(0, 6))
    def allocate(self, count):
        free = self.size - len(self.held())
        if count > free:
            with pytest.raises(OutOfBlocksError, match=f"{count} blocks asked for, {free} free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.held()), "a block in use was handed out"
        assert NULL_BLOCK not in blocks
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

    def held(self):
        return Counter(block for table in self.tables for block in table)

    @invariant()
    def books_follow_from_the_tables(self):
        held = self.held()
        counts = self.pool.counts
        assert counts.total == self.size
        assert counts.active == len(held)
        assert counts.shared == sum(1 for n in held.values() if n > 1)
        assert counts.free == self.pool.num_free == self.size - len(held)
        assert counts.total == counts.active + counts.cached + counts.free
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


@pytest.mark.parametrize("block", [NULL_BLOCK, -1, 5, 4])
def test_only_active_blocks_can_be_shared_or_released(pool, block):
    pool.allocate(3)
    with pytest.raises(IntegrityError, match=f"block {block} is not active"):
        pool.share([block])
    with pytest.raises(IntegrityError, match=f"block {block} is not active"):
        pool.release([block])


def test_a_pool_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block, got 0"):
        BlockPool(0)


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


DAMAGE = (leak, forget_reference, free_twice, hand_out_free, miscount_shared)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_the_integrity_check_finds(pool, damage):
    tables = [pool.allocate(1), pool.allocate(2)]
    pool.check_integrity(tables)
    damage(pool, tables)
    with pytest.raises(IntegrityError):
        pool.check_integrity(tables)
