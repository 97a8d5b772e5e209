"""What the KV cache holds, wastes and shares, measured while `LLM.generate` runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from octavo.core.block_pool import NO_BLOCK, BlockCounts
from octavo.kv_layout import KvGroups


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
    `sharing` is the share of blocks saved because sequences hold the same ones. A block holds
    `block_size` tokens of one group of layers in `block_bytes` bytes.
    """

    total: int
    active: int
    shared: int
    cached: int
    free: int
    block_size: int
    block_bytes: int
    peak_active: int
    waste: float
    sharing: float


class KvMeter:
    """Adds up what `observe` sees; looking costs O(running sequences)."""

    def __init__(self, kv: KvGroups, block_bytes: int) -> None:
        self._kv = kv
        self._block_bytes = block_bytes
        self._peak = self._slots = self._unused = self._held = self._physical = 0

    def observe(self, running: Iterable[Holder], active: int) -> None:
        """Take in one moment. `active` counts the blocks that are held at all."""
        unused: dict[int, int] = {}
        held, size, count = 0, self._kv.block_size, self._kv.count
        for sequence in running:
            table = sequence.block_table
            held += len(table) - (table.count(NO_BLOCK) if self._kv.sliding else 0)
            # All unused slots are behind the last token; a block that is shared counts once.
            for place in range(sequence.computed // size * count, len(table)):
                empty = size - max(0, sequence.computed - place // count * size)
                unused[table[place]] = min(empty, unused.get(table[place], empty))
        self._held += held
        self._physical += active
        self._slots += active * size
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
            block_size=self._kv.block_size,
            block_bytes=self._block_bytes,
            peak_active=max(self._peak, now.active),
            waste=self._unused / self._slots if self._slots else 0.0,
            sharing=1.0 - self._physical / self._held if self._held else 0.0,
        )
