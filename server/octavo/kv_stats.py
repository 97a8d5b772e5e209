"""What the KV cache holds, wastes and shares, measured while `LLM.generate` runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from octavo.core.block_pool import BlockCounts


class Holder(Protocol):
    """A sequence, as far as its blocks go."""

    block_table: list[int]

    @property
    def computed(self) -> int:
        """Tokens in those blocks."""


@dataclass(frozen=True, slots=True)
class KvStats:
    """Blocks by state now, and means over the steps that were looked at.

    `waste` is the share of allocated token slots without a token: all of it lies in last blocks.
    `sharing` is the share of blocks saved because sequences hold the same ones.
    """

    total: int
    active: int
    shared: int
    cached: int
    free: int
    block_size: int
    peak_active: int
    waste: float
    sharing: float


class KvMeter:
    """Adds up what `observe` sees; looking costs O(running sequences)."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._peak = self._slots = self._unused = self._held = self._physical = 0

    def observe(self, running: Iterable[Holder], active: int) -> None:
        """Take in one moment. `active` counts the blocks that are held at all."""
        unused: dict[int, int] = {}
        held = 0
        for sequence in running:
            table = sequence.block_table
            held += len(table)
            # All unused slots are behind the last token; a block that is shared counts once.
            for place in range(sequence.computed // self._block_size, len(table)):
                fill = max(0, sequence.computed - place * self._block_size)
                empty = self._block_size - fill
                unused[table[place]] = min(empty, unused.get(table[place], empty))
        self._held += held
        self._physical += active
        self._slots += active * self._block_size
        self._unused += sum(unused.values())
        self._peak = max(self._peak, active)

    def stats(self, now: BlockCounts) -> KvStats:
        """The sums as shares, beside the blocks of this moment."""
        return KvStats(
            total=now.total,
            active=now.active,
            shared=now.shared,
            cached=now.cached,
            free=now.free,
            block_size=self._block_size,
            peak_active=max(self._peak, now.active),
            waste=self._unused / self._slots if self._slots else 0.0,
            sharing=1.0 - self._physical / self._held if self._held else 0.0,
        )
