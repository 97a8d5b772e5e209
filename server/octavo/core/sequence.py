"""One request's tokens, blocks and limits; its stage follows from comparing two integers."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.params import SamplingParams


@dataclass(slots=True, eq=False)
class Clock:
    """Ticks once for each step; whoever follows it is a token further with each tick."""

    ticks: int = 0


# Of those whose steps are planned one by one.
_STOPPED = Clock()
# Tokens, block table, computed, written, chained, link.
Standing = tuple[list[int], list[int], int, int, int, bytes]


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens known so far and how many of them have keys and values in the cache.

    `tokens` is the prompt followed by what was drawn and read. Tokens are only ever appended, so a
    preempted sequence replays what it recorded and never draws a token twice. `length` also counts
    those that a step in flight draws. `computed` counts the leading tokens whose keys and values
    are in `block_table` once all planned steps have run; it returns to 0 when the blocks are taken.
    Both count planned steps, not finished ones, and move by themselves while the sequence follows
    the clock of a calendar.

    `arrival` is the order of adding; it survives preemption. `max_new_tokens` is resolved: the
    request's `max_tokens`, bounded by the context.

    `branch` tells the sequences of one group apart. The first `written` tokens have their keys and
    values in the table's blocks, or get them in this step from another branch's share: they may run
    again to draw from the last of them, and are then not written.

    For the prefix cache: only sequences of one `scope` find each other's blocks. The first
    `chained` rows of the table are full and published; `link` is the digest of their tokens.
    `cached_tokens` were found when the sequence first ran. While its blocks are in host memory,
    `swapped` has them in the places of the table's entries.
    """

    seq_id: int
    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    params: SamplingParams
    arrival: int
    arrival_time: float = 0.0
    priority: int = 0
    stop_ids: frozenset[int] = frozenset()
    block_table: list[int] = field(default_factory=list)
    preemptions: int = 0
    branch: int = 0
    written: int = 0
    scope: str = ""
    chained: int = 0
    link: bytes = b""
    swapped: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    _clock: Clock = field(default=_STOPPED, init=False, repr=False)
    _computed: int = field(default=0, init=False, repr=False)
    _length: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._length = len(self.tokens)

    @property
    def computed(self) -> int:
        """Tokens in the cache once all planned steps have run."""
        return self._computed + self._clock.ticks

    @computed.setter
    def computed(self, value: int) -> None:
        self._computed = value - self._clock.ticks

    @property
    def length(self) -> int:
        """Tokens, those in flight among them."""
        return self._length + self._clock.ticks

    @length.setter
    def length(self, value: int) -> None:
        self._length = value - self._clock.ticks

    @property
    def standing(self) -> Standing:
        """What it has in common with whoever goes on in its place; it must not follow a clock."""
        table, computed = self.block_table, self._computed
        return self.tokens, table, computed, self.written, self.chained, self.link

    def become(self, standing: Standing, token_id: int) -> None:
        """Go on from there, which is nobody else's then, with one token more."""
        tokens, self.block_table, self._computed, self.written, self.chained, self.link = standing
        tokens.append(token_id)
        self.tokens = tokens
        self._length = len(tokens)

    def follow(self, clock: Clock | None) -> None:
        """From now on be a token further with each tick of `clock`; None: stand still."""
        computed, length = self.computed, self.length
        self._clock = clock or _STOPPED
        self.computed, self.length = computed, length

    @property
    def follows(self) -> bool:
        """True while a clock moves it."""
        return self._clock is not _STOPPED

    @property
    def unread(self) -> int:
        """Tokens that a step in flight draws."""
        return self.length - len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far, those in flight among them."""
        return self.length - self.num_prompt_tokens

    @property
    def generated(self) -> list[int]:
        """The drawn tokens that were read, a copy."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def pending(self) -> int:
        """Tokens that must still run through the model before the next can be drawn."""
        return self.length - self.computed

    @property
    def decoding(self) -> bool:
        """True when only the newest drawn token is uncomputed: one token in, one token out."""
        return self.pending == 1 and self.num_generated > 0

    @property
    def remaining(self) -> int:
        """Tokens that may still be drawn."""
        return self.max_new_tokens - self.num_generated


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many leading entries of two block tables are the same.

    Tables mostly differ in their last few entries, if at all: so pieces are compared as a whole,
    from the end in growing steps, and only the piece with the first difference entry by entry.
    """
    end = min(len(left), len(right))
    begin = end - 4
    while begin > 0 and left[:begin] != right[:begin]:
        begin -= 4 * (end - begin)
    for same in range(max(begin, 0), end):
        if left[same] != right[same]:
            return same
    return end
