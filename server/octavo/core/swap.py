"""Swapping: the blocks of a preempted group wait in host memory, rather than to be computed again.

A group leaves and returns whole. Blocks that several of its branches share are moved once and are
shared again afterwards; those that are also in the prefix cache stay findable there as long as
nobody needs the room, and what can still be found is not copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from octavo.core.block_pool import NO_BLOCK, BlockKey, BlockPool
from octavo.core.group import Group
from octavo.core.prefix_cache import PrefixCache
from octavo.core.sequence import Sequence

Pairs = list[tuple[int, int]]


def _never(_tokens: int) -> float | None:
    return None


class SwapSpace:
    """Blocks of host memory, and when it pays to use them.

    `seconds_per_block` is what copying one block takes, either way. `recompute_seconds`, given by
    whoever measures steps, says how much longer steps take that run so many tokens again; None:
    not known yet, and then nothing is swapped.
    """

    def __init__(
        self,
        num_blocks: int,
        seconds_per_block: float,
        recompute_seconds: Callable[[int], float | None] = _never,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.recompute_seconds = recompute_seconds
        self.blocks_out = 0
        self.blocks_in = 0
        self._seconds_per_block = seconds_per_block

    def pays(self, group: Group) -> bool:
        """True when the group's blocks fit and two copies cost less than computing them again."""
        count = len(_held(group.branches))
        seconds = self.recompute_seconds(group.num_computed)
        if seconds is None or not 0 < count <= self.pool.num_free:
            return False
        return 2 * count * self._seconds_per_block < seconds

    def out(self, group: Group, pool: BlockPool) -> Pairs:
        """Take the group's blocks; returns the copies, from device to host."""
        branches = group.branches
        held = _held(branches)
        host = dict(zip(held, self.pool.allocate(len(held)), strict=True))
        for branch in branches:
            branch.swapped = [host.get(block, NO_BLOCK) for block in branch.block_table]
            self.pool.share(branch.swapped)
            pool.release(branch.block_table)
            # A new list: a plan may still hold the old one.
            branch.block_table = []
            # Who waited for the others of a search draws its candidates again, writing nothing.
            branch.written = max(branch.written, branch.computed)
            branch.computed = min(branch.computed, branch.length - 1)
        self.pool.release(list(host.values()))
        self.blocks_out += len(host)
        return list(host.items())

    def back(self, group: Group, pool: BlockPool, cache: PrefixCache) -> Pairs:
        """Give the group its blocks again; returns the copies, from host to device."""
        branches = [branch for branch in group.branches if branch.swapped]
        keys = self._keys(branches, cache)
        found = {host: block for host, key in keys.items() if (block := pool.find(key)) is not None}
        pool.take(found.values())
        wanted = [host for host in _swapped(branches) if host not in found]
        new = dict(zip(wanted, pool.allocate(len(wanted)), strict=True))
        device = {**found, **new}
        for branch in branches:
            branch.block_table = [device.get(host, NO_BLOCK) for host in branch.swapped]
            pool.share(branch.block_table)
        for host in new.keys() & keys.keys():
            pool.publish(new[host], keys[host])
        pool.release(list(device.values()))
        for branch in branches:
            self.drop(branch)
        self.blocks_in += len(new)
        return list(new.items())

    def drop(self, branch: Sequence) -> None:
        """Forget what is kept for a branch."""
        self.pool.release(branch.swapped)
        branch.swapped = []

    def _keys(self, branches: Iterable[Sequence], cache: PrefixCache) -> dict[int, BlockKey]:
        """What can be found, or be made findable, under which key: rows that nobody writes to.

        A row that is full for one branch may be where another goes on, in place if it is the last.
        """
        keys: dict[int, BlockKey] = {}
        written: set[int] = set()
        for branch in branches:
            entries = zip(branch.swapped, cache.keys(branch, branch.chained), strict=False)
            known = {host: key for host, key in entries if host != NO_BLOCK}
            keys |= known
            written.update(host for host in branch.swapped if host not in known)
        return {host: key for host, key in keys.items() if host not in written}


def _held(branches: Iterable[Sequence]) -> list[int]:
    """Every block in the tables, once, in order."""
    blocks = dict.fromkeys(block for branch in branches for block in branch.block_table)
    blocks.pop(NO_BLOCK, None)
    return list(blocks)


def _swapped(branches: Iterable[Sequence]) -> list[int]:
    blocks = dict.fromkeys(block for branch in branches for block in branch.swapped)
    blocks.pop(NO_BLOCK, None)
    return list(blocks)
