"""The waiting queue: sequences in a policy's order, and their sums."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.core.policy import SchedulingPolicy
from octavo.core.sequence import Sequence, blocks_for

_SLACK = 64


@dataclass(slots=True)
class WaitingTotals:
    """Sums over the queue, kept as sequences come and go so that reading them costs nothing.

    `blocks` hold the tokens known so far; `growth` is the tokens that may still be drawn.
    """

    count: int = 0
    tokens: int = 0
    blocks: int = 0
    growth: int = 0


class WaitingQueue:
    """A heap by the policy's key; removal from the middle is lazy."""

    def __init__(self, policy: SchedulingPolicy, block_size: int) -> None:
        self.totals = WaitingTotals()
        self._policy = policy
        self._block_size = block_size
        self._heap: list[tuple[tuple[float, ...], int]] = []
        self._live: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Sequence]:
        """The waiting sequences, in no particular order."""
        return iter(self._live.values())

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._live

    def push(self, sequence: Sequence) -> None:
        """Add a sequence at its place."""
        self._live[sequence.seq_id] = sequence
        heapq.heappush(self._heap, (self._policy.sort_key(sequence), sequence.seq_id))
        self._count(sequence, 1)

    def peek(self) -> Sequence:
        """The sequence to be admitted next; the queue must not be empty."""
        while self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._live[self._heap[0][1]]

    def pop(self) -> Sequence:
        """Remove and return the sequence to be admitted next."""
        sequence = self.peek()
        heapq.heappop(self._heap)
        del self._live[sequence.seq_id]
        self._count(sequence, -1)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting sequence, wherever it stands."""
        del self._live[sequence.seq_id]
        self._count(sequence, -1)
        # Removed entries stay in the heap until they surface; rebuild before they are the most.
        if len(self._heap) > 2 * len(self._live) + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    def _count(self, sequence: Sequence, sign: int) -> None:
        totals = self.totals
        totals.count += sign
        totals.tokens += sign * len(sequence.tokens)
        totals.blocks += sign * blocks_for(len(sequence.tokens), self._block_size)
        totals.growth += sign * sequence.remaining
