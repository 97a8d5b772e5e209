"""What happens to block tables that hold several groups of layers: they grow and slide.

Pure bookkeeping between a sequence and the pool; when it happens is the scheduler's matter. With
one group that keeps everything a table only ever grows at its end.
"""

from __future__ import annotations

from octavo.core.block_pool import NO_BLOCK, BlockPool
from octavo.core.sequence import Sequence
from octavo.kv_layout import KvGroups


def slide(sequence: Sequence, position: int, kv: KvGroups, pool: BlockPool) -> None:
    """Give up the blocks that no token from `position` on can see.

    The freed blocks stay findable in the prefix cache until they are needed. The sequence gets a
    new table: a plan may still hold the old one. What has been given up already is at a column's
    beginning, so looking backwards from the window's edge costs no more than what is freed.
    """
    given_up: list[int] = []
    for group, window in kv.sliding:
        last = (kv.behind(window, position) - 1) * kv.count + group
        for entry in range(last, -1, -kv.count):
            if sequence.block_table[entry] == NO_BLOCK:
                break
            given_up.append(entry)
    if given_up:
        table = list(sequence.block_table)
        # From the beginning on: a table's end is freed, and so evicted, before its beginning.
        pool.release([table[entry] for entry in reversed(given_up)])
        for entry in given_up:
            table[entry] = NO_BLOCK
        sequence.block_table = table


def shared_entries(sequence: Sequence, kv: KvGroups, pool: BlockPool) -> list[int]:
    """Entries of the row that the next token is written to, whose blocks others hold too."""
    table = sequence.block_table
    first = sequence.computed // kv.block_size * kv.count
    if kv.count == 1:  # the usual case, which beams ask for with every token
        return [first] if first < len(table) and pool.references(table[first]) > 1 else []
    row = range(first, min(first + kv.count, len(table)))
    return [entry for entry in row if pool.references(table[entry]) > 1]
