"""Who is here: the groups that wait and those that run, and what leaving means for their blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from octavo.core.block_pool import NO_BLOCK, BlockPool
from octavo.core.calendar import Calendar
from octavo.core.group import Group
from octavo.core.policy import SchedulingPolicy
from octavo.core.sequence import Sequence
from octavo.core.swap import Pairs, SwapSpace
from octavo.core.waiting import WaitingQueue
from octavo.kv_layout import KvGroups


class Roster:
    """Every unfinished group, by where it stands.

    `running` is in order of admission, and `branches` are the sequences of those groups. A running
    branch is a row of the `calendar`, or its group is in `unsettled`, in order of admission too; or
    all its tokens are drawn and the last is in flight.
    """

    def __init__(
        self, pool: BlockPool, policy: SchedulingPolicy, kv: KvGroups, swap: SwapSpace | None
    ) -> None:
        self.pool = pool
        self.swap = swap
        self.calendar = Calendar(kv.block_size)
        self.waiting = WaitingQueue(policy, kv)
        self.running: dict[int, Group] = {}
        self.unsettled: dict[int, Group] = {}
        self.branches: dict[int, Sequence] = {}
        self.by_request: dict[str, Group] = {}
        self.by_id: dict[int, Sequence] = {}

    def add(self, group: Group) -> None:
        """Let a new group wait."""
        self.by_request[group.lead.request_id] = group
        for branch in group.branches:
            self.by_id[branch.seq_id] = branch
        self.waiting.push(group)

    def admit(self, group: Group) -> None:
        """Let the group that is next run."""
        self.waiting.pop()
        self.running[group.arrival] = self.unsettled[group.arrival] = group
        for branch in group.branches:
            self.branches[branch.seq_id] = branch

    def unsettle(self, group: Group, branch: Sequence) -> None:
        """Take a branch off the calendar: its next step is to be planned by itself."""
        self.calendar.leave(branch)
        self.unsettled[group.arrival] = group

    def swap_out(self, group: Group) -> Pairs:
        """Before it is preempted: move the group's blocks to host memory where that pays.

        Returns the copies to be made.
        """
        if self.swap is None or not self.swap.pays(group):
            return []
        for branch in group.branches:
            self.calendar.leave(branch)
        return self.swap.out(group, self.pool)

    def preempt(self, group: Group) -> list[int]:
        """Take the group's blocks; it returns to its place in the queue.

        There it replays later, or goes on where it was if its blocks were swapped out. Returns the
        ids of its sequences.
        """
        del self.running[group.arrival]
        self.unsettled.pop(group.arrival, None)
        if group.beam is not None:
            group.beam.candidates = {}
        for branch in group.branches:
            del self.branches[branch.seq_id]
            if not branch.swapped:
                self._free_blocks(branch)
            branch.preemptions += 1
        self.waiting.push(group)
        return [branch.seq_id for branch in group.branches]

    def drop(self, sequence: Sequence) -> None:
        """Take a branch out, and the group with its last one."""
        group = self.by_request[sequence.request_id]
        waiting = group.arrival in self.waiting
        if waiting:
            self.waiting.remove(group)
        group.branches.remove(sequence)
        del self.by_id[sequence.seq_id]
        self.branches.pop(sequence.seq_id, None)
        if not group.branches:
            self.running.pop(group.arrival, None)
            self.unsettled.pop(group.arrival, None)
            del self.by_request[sequence.request_id]
        elif waiting:
            self.waiting.push(group)
        self._free_blocks(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        """Take its blocks, also while a step in flight uses them.

        The device runs steps in order: whoever is given the blocks next uses them after that step,
        and writes every slot before reading it.
        """
        self.calendar.leave(sequence)
        if sequence.swapped and self.swap is not None:
            self.swap.drop(sequence)
        self.pool.release(sequence.block_table)
        # A new list: a plan may still hold the old one.
        sequence.block_table = []
        sequence.computed = sequence.written = sequence.chained = 0

    def victim(self, group: Group) -> Group | None:
        """Of the groups admitted after this one, that whose blocks cost least to compute again.

        The last admitted among equals; None when this is the last.
        """
        later: list[Group] = []
        for other in reversed(self.running.values()):
            if other is group:
                break
            later.append(other)
        return min(later, key=self._cost_of_a_block, default=None)

    def _cost_of_a_block(self, group: Group) -> float:
        """Tokens to be computed again for each block that its preemption would free."""
        held = Counter(block for branch in group.branches for block in branch.block_table)
        held.pop(NO_BLOCK, None)
        freed = sum(1 for block, n in held.items() if self.pool.references(block) == n)
        return group.num_computed / freed if freed else math.inf

    def in_order(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Running sequences by their groups' order of admission; O(running)."""
        place = {arrival: index for index, arrival in enumerate(self.running)}
        return sorted(sequences, key=lambda sequence: (place[sequence.arrival], sequence.branch))

    @property
    def decoding(self) -> bool:
        """True while anybody who runs has drawn a token and waits for the next."""
        return bool(self.calendar) or any(
            branch.num_generated > 0 and branch.remaining > 0
            for group in self.unsettled.values()
            for branch in group.branches
        )

    @property
    def context(self) -> int:
        """Cached tokens of all that run and are not about to end."""
        return self.calendar.context + sum(
            branch.computed
            for group in self.unsettled.values()
            for branch in group.branches
            if not branch.follows
        )

    @property
    def tables(self) -> Iterator[list[int]]:
        """Every block table there is."""
        groups = self.by_request.values()
        return (branch.block_table for group in groups for branch in group.branches)

    @property
    def swapped(self) -> Iterator[list[int]]:
        """Every table of blocks in host memory."""
        groups = self.by_request.values()
        return (branch.swapped for group in groups for branch in group.branches)
