"""How the KV cache is cut: which layers share a block, and how many blocks a request can hold.

Standard library only. Layers whose cache behaves alike form a kind: those that attend to all
tokens, and those with a sliding window of one size. Every kind is cut into groups of equally many
layers, so that one physical block fits any group; each group has a block table of its own, and the
groups of a windowed kind give up the blocks that lie behind the window. Other kinds of cache
(latent attention's narrower rows, the state of a linear attention, which never grows) would be
further kinds here, with blocks of the same bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

# Groups cost host time and table entries, empty planes cost memory: one group more is worth this
# share of the planes.
GROUP_WORTH = 0.02


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The groups of a model's layers. `windows` are theirs, None for one that keeps everything.

    Layer i has its keys and values in plane `places[i][1]` of the blocks of group `places[i][0]`.
    """

    windows: tuple[int | None, ...]
    layers_per_group: int
    places: tuple[tuple[int, int], ...]

    @property
    def padded_layers(self) -> int:
        """Planes of one block row that no layer uses: memory lost to equal groups."""
        return len(self.windows) * self.layers_per_group - len(self.places)


def kv_layout(windows: Sequence[int | None], max_model_len: int) -> KvLayout:
    """The groups for layers with these windows; groups that keep everything come first.

    A window that no sequence outgrows is none. One kind is one group; where the counts of several
    do not divide, few groups are weighed against few planes without a layer.
    """
    if not windows:
        raise ValueError("a layout needs at least one layer")
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kept = None if window is None or window >= max_model_len else window
        kinds.setdefault(kept, []).append(layer)
    size = _group_size([len(layers) for layers in kinds.values()])
    found: list[int | None] = []
    places = [(0, 0)] * len(windows)
    for kind in sorted(kinds, key=lambda window: window or 0):
        for index, layer in enumerate(kinds[kind]):
            places[layer] = (len(found) + index // size, index % size)
        found += [kind] * -(-len(kinds[kind]) // size)
    return KvLayout(tuple(found), size, tuple(places))


def _group_size(counts: Collection[int]) -> int:
    def cost(size: int) -> float:
        groups = sum(-(-count // size) for count in counts)
        return 1 - sum(counts) / (groups * size) + GROUP_WORTH * groups

    return min(range(max(counts), 0, -1), key=cost)


@dataclass(frozen=True, slots=True)
class KvGroups:
    """The groups as the scheduler sees them: windows alone, no layers.

    A sequence's block table holds all groups', a row for each `block_size` tokens: entry
    `row * count + group`. With one group that is the plain table.
    """

    block_size: int
    windows: tuple[int | None, ...] = (None,)
    count: int = field(init=False)
    # Group and window of those that slide.
    sliding: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.windows))
        sliding = [(group, w) for group, w in enumerate(self.windows) if w is not None]
        object.__setattr__(self, "sliding", tuple(sliding))

    def rows(self, tokens: int) -> int:
        """Table rows for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def blocks(self, lengths: Collection[int], prompt: int = 0, chunk: int = 1) -> int:
        """The most blocks that a request holds at once, whose branches have `lengths` tokens.

        The full blocks of the `prompt` are in every branch's table and count once. A step runs at
        most `chunk` of the request's tokens: all of them are in blocks while it runs, and in a
        windowed group the tokens that the first of them sees.
        """
        branches = len(lengths)
        shared = prompt // self.block_size if branches > 1 else 0
        rows = shared + sum(-(-tokens // self.block_size) - shared for tokens in lengths)
        if not self.sliding:
            return rows * self.count
        total = rows * (self.count - len(self.sliding))
        # A chunk's tokens beyond each branch's first, however they are divided among branches.
        beyond = self.rows(chunk - 1) + branches - 1
        for _, window in self.sliding:
            total += min(rows, branches * self.reach(window) + beyond)
        return total

    def settled(self, tokens: int) -> int:
        """Blocks of one sequence of `tokens` tokens between steps; as `blocks`, only quicker."""
        rows = -(-tokens // self.block_size)
        if not self.sliding:
            return rows * self.count
        total = rows * (self.count - len(self.sliding))
        return total + sum(min(rows, self.reach(window)) for _, window in self.sliding)

    def reach(self, window: int) -> int:
        """The most blocks that `window` tokens in a row lie in."""
        return self.rows(window - 1) + 1

    def behind(self, window: int, computed: int) -> int:
        """Rows that no token from position `computed` on can see."""
        return max(0, computed + 1 - window) // self.block_size

    def longest(
        self, num_blocks: int, most: int, *, branches: int = 1, prompt: int = 0, chunk: int = 1
    ) -> int:
        """The length, up to `most`, that each branch can reach with `num_blocks` for all."""

        def needed(tokens: int) -> int:
            return self.blocks([tokens] * branches, prompt, chunk)

        return bisect_right(range(most + 1), num_blocks, key=needed) - 1
