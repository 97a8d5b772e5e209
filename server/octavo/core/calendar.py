"""The sequences that only decode: nothing is done for one of them until something happens to it.

A row gets one token in every step, so all of them move on together, by one tick. Which row next
needs a block, and in which step one draws its last token, is known when it joins: a step looks at
those rows and at no others.
"""

from __future__ import annotations

from collections.abc import Collection

from octavo.core.sequence import Clock, Sequence
from octavo.core.step import PENDING, Rows, ScheduledSequence, needs_host


class Calendar:
    """The decode rows, in order of joining, by the tick at which they need something."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._clock = Clock()
        self._rows: dict[int, Sequence] = {}
        # A row needs a block every `block_size` ticks, always at the same remainder.
        self._growing: list[dict[int, Sequence]] = [{} for _ in range(block_size)]
        self._ending: dict[int, dict[int, Sequence]] = {}
        self._num_need_host = 0
        # The sum of the rows' computed tokens at tick 0, as if all had always been rows.
        self._context_base = 0
        # Since the plan before.
        self._joined: dict[int, Sequence] = {}
        self._left: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def context(self) -> int:
        """Cached tokens of all rows."""
        return self._context_base + len(self._rows) * self._clock.ticks

    @property
    def needs_host(self) -> bool:
        """True when the next step cannot be planned before this one's tokens are read."""
        return self._num_need_host > 0

    def join(self, sequence: Sequence) -> None:
        """Make a decoding sequence a row, from the next step on."""
        seq_id = sequence.seq_id
        self._rows[seq_id] = self._joined[seq_id] = sequence
        sequence.follow(self._clock)
        self._bucket(sequence)[seq_id] = sequence
        self._ending.setdefault(self._last_tick(sequence), {})[seq_id] = sequence
        self._context_base += sequence.computed - self._clock.ticks
        self._num_need_host += needs_host(sequence.params)

    def leave(self, sequence: Sequence) -> None:
        """Let a row stand still where it is; nothing where the sequence is no row."""
        seq_id = sequence.seq_id
        if self._rows.pop(seq_id, None) is None:
            return
        del self._bucket(sequence)[seq_id]
        last = self._last_tick(sequence)
        del self._ending[last][seq_id]
        if not self._ending[last]:
            del self._ending[last]
        self._context_base -= sequence.computed - self._clock.ticks
        self._num_need_host -= needs_host(sequence.params)
        sequence.follow(None)
        # Nobody was told of one that comes and goes between two steps.
        if self._joined.pop(seq_id, None) is None:
            self._left.append(seq_id)

    def release_ended(self) -> None:
        """Let those leave whose last token is in flight."""
        for sequence in tuple(self._ending.get(self._clock.ticks, {}).values()):
            self.leave(sequence)

    @property
    def growing(self) -> Collection[Sequence]:
        """The rows whose next token goes to a new block."""
        return self._growing[self._clock.ticks % self._block_size].values()

    @property
    def rows(self) -> list[Sequence]:
        """All rows, in the order of their results."""
        return list(self._rows.values())

    def tick(self, grown: dict[int, list[int]]) -> Rows:
        """Let all rows take a step; `grown` has the blocks that rows got for it.

        Returns what has changed since the step before.
        """
        joined = tuple(row_share(sequence, sequence.computed) for sequence in self._joined.values())
        changes = Rows(
            count=len(self._rows),
            left=tuple(self._left),
            joined=joined,
            grown=tuple(
                (seq_id, block)
                for seq_id, blocks in grown.items()
                if seq_id not in self._joined
                for block in blocks
            ),
            context=self.context,
        )
        self._joined = {}
        self._left = []
        self._clock.ticks += 1
        return changes

    def _bucket(self, sequence: Sequence) -> dict[int, Sequence]:
        return self._growing[(self._clock.ticks - sequence.computed) % self._block_size]

    def _last_tick(self, sequence: Sequence) -> int:
        return self._clock.ticks + sequence.remaining


def row_share(sequence: Sequence, start: int) -> ScheduledSequence:
    """A row's share of the step that runs its token at position `start`."""
    tokens, prompt = sequence.tokens, sequence.num_prompt_tokens
    return ScheduledSequence(
        seq_id=sequence.seq_id,
        token_ids=[tokens[start] if start < len(tokens) else PENDING],
        start=start,
        block_table=sequence.block_table,
        samples=True,
        params=sequence.params,
        num_generated=start + 1 - prompt,
        tokens=tokens,
        num_prompt_tokens=prompt,
        branch=sequence.branch,
    )
