"""The waiting queue: groups in a policy's order, and their sums."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.core.group import Group
from octavo.core.policy import SchedulingPolicy
from octavo.kv_layout import KvGroups

_SLACK = 64


@dataclass(slots=True)
class WaitingTotals:
    """Sums over the queue, kept as groups come and go so that reading them costs nothing.

    `blocks` hold the tokens known so far; `growth` is the tokens that may still be drawn.
    """

    count: int = 0
    tokens: int = 0
    blocks: int = 0
    growth: int = 0


class WaitingQueue:
    """A heap by the policy's key; removal from the middle is lazy."""

    def __init__(self, policy: SchedulingPolicy, kv: KvGroups) -> None:
        self.totals = WaitingTotals()
        self._policy = policy
        self._kv = kv
        self._heap: list[tuple[tuple[float, ...], int]] = []
        self._live: dict[int, Group] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Group]:
        """The waiting groups, in no particular order."""
        return iter(self._live.values())

    def __contains__(self, arrival: int) -> bool:
        return arrival in self._live

    def push(self, group: Group) -> None:
        """Add a group at its place."""
        self._live[group.arrival] = group
        heapq.heappush(self._heap, (self._policy.sort_key(group.lead), group.arrival))
        self._count(group, 1)

    def peek(self) -> Group:
        """The group to be admitted next; the queue must not be empty."""
        while self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._live[self._heap[0][1]]

    def pop(self) -> Group:
        """Remove and return the group to be admitted next."""
        group = self.peek()
        heapq.heappop(self._heap)
        del self._live[group.arrival]
        self._count(group, -1)
        return group

    def remove(self, group: Group) -> None:
        """Remove a waiting group, wherever it stands."""
        del self._live[group.arrival]
        self._count(group, -1)
        # Removed entries stay in the heap until they surface; rebuild before they are the most.
        if len(self._heap) > 2 * len(self._live) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    def _count(self, group: Group, sign: int) -> None:
        totals = self.totals
        totals.count += sign * group.width
        totals.tokens += sign * group.num_tokens
        totals.blocks += sign * group.num_blocks(self._kv)
        totals.growth += sign * group.remaining
