"""Paged attention: against torch's own attention, and against itself under regrouping.

The inputs are hostile: whatever an operation must not read is NaN or an absurd index.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS

from octavo_kernels import ops

pytestmark = pytest.mark.skipif(
    "cpu" not in ops.implementations(), reason="octavo_kernels._core is not built"
)

ABSURD_BLOCK = 2**30


@dataclass(frozen=True)
class Case:
    """`sequences` are (new tokens, tokens in all) pairs."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class Inputs:
    """Arguments of paged attention, with the dense keys and values they were made of."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def arguments(self) -> tuple:
        return (
            self.query, self.key_cache, self.value_cache, self.block_tables,
            self.query_start, self.seq_lens, self.scale,
        )  # fmt: skip


def make(case: Case, fused: bool = True) -> Inputs:
    """Scatter random sequences over shuffled blocks; the query is a slice of a fused projection."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(case.dtype)

    size = case.block_size
    needed = [-(-total // size) for _, total in case.sequences]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=random).tolist()
    shape = (blocks, size, case.kv_heads, case.dim)
    key_cache = torch.full(shape, float("nan"), dtype=case.dtype)
    value_cache = key_cache.clone()
    tables = torch.full((len(needed), max(needed) + 2), ABSURD_BLOCK, dtype=torch.int32)
    keys, values = [], []
    for row, (_, total) in enumerate(case.sequences):
        table = torch.tensor([order.pop() for _ in range(needed[row])], dtype=torch.int64)
        tables[row, : needed[row]] = table
        keys.append(normal(total, case.kv_heads, case.dim))
        values.append(normal(total, case.kv_heads, case.dim))
        position = torch.arange(total)
        key_cache[table[position // size], position % size] = keys[-1]
        value_cache[table[position // size], position % size] = values[-1]
    new = torch.tensor([0] + [count for count, _ in case.sequences])
    tokens = int(new.sum())
    width = case.heads * case.dim
    projection = normal(tokens, width + (2 * case.kv_heads * case.dim if fused else 0))
    query = projection[:, :width].view(tokens, case.heads, case.dim)
    lengths = torch.tensor([total for _, total in case.sequences], dtype=torch.int32)
    return Inputs(
        query, key_cache, value_cache, tables, new.cumsum(0).to(torch.int32), lengths,
        case.dim**-0.5, keys, values,
    )  # fmt: skip


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MIXED = ((5, 5), (1, 77), (33, 100), (0, 7), (1, 1), (64, 64))

CORRECTNESS = [
    *(Case(MIXED, dim=d, dtype=t) for d in (64, 80, 96, 128, 256) for t in TOLERANCE),
    *(Case(MIXED, block_size=b) for b in (1, 2, 8, 16, 32, 64, 128)),
    *(Case(MIXED, heads=h, kv_heads=k) for h, k in ((1, 1), (8, 8), (8, 1), (12, 4), (71, 1))),
]
CORNERS = [
    Case(((1, 1),), heads=1, kv_heads=1, dim=2, block_size=1),
    Case(((7, 7),), dim=18, block_size=3),
    Case(tuple((1, n) for n in (31, 32, 33, 63, 64, 65))),
    Case(((0, 0), (3, 3), (0, 9))),
    Case(((200, 333),), heads=6, kv_heads=3, dim=20),
]


def dense(inputs) -> torch.Tensor:
    """torch's scaled_dot_product_attention, a sequence at a time, on the dense keys and values."""
    rows = []
    for s, (keys, values) in enumerate(zip(inputs.keys, inputs.values, strict=True)):
        query = inputs.query[inputs.query_start[s] : inputs.query_start[s + 1]].float()
        new, total = len(query), len(keys)
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1),
                keys.float().transpose(0, 1),
                values.float().transpose(0, 1),
                attn_mask=mask,
                scale=inputs.scale,
                enable_gqa=True,
            ).transpose(0, 1)
        )
    return torch.cat(rows)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", [*CORRECTNESS, *CORNERS], ids=str)
def test_native_is_dense_attention(case, instruction_set) -> None:
    inputs = make(case)
    before = ops.calls["paged_attention", "cpu"]
    with ops.forced_instruction_set(instruction_set):
        got = ops.paged_attention(*inputs.arguments())
    assert ops.calls["paged_attention", "cpu"] == before + 1
    assert got.dtype == case.dtype
    assert not got.isnan().any()
    limit = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.float(), dense(inputs), rtol=limit, atol=limit)


@pytest.mark.parametrize("case", [*CORRECTNESS[:6], *CORNERS], ids=str)
def test_reference_is_dense_attention(case) -> None:
    inputs = make(case)
    with ops.forced("reference"):
        got = ops.paged_attention(*inputs.arguments())
    limit = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.float(), dense(inputs), rtol=limit, atol=limit)


def subset(inputs, sequences: list[int]) -> tuple:
    """The arguments for some of the sequences only, in the order given."""
    starts = inputs.query_start.tolist()
    rows = [inputs.query[starts[s] : starts[s + 1]] for s in sequences]
    counts = torch.tensor([0] + [len(r) for r in rows])
    return (
        torch.cat(rows), inputs.key_cache, inputs.value_cache,
        inputs.block_tables[sequences].contiguous(), counts.cumsum(0).to(torch.int32),
        inputs.seq_lens[sequences].contiguous(), inputs.scale,
    )  # fmt: skip


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_do_not_depend_on_batch_mates(dtype, instruction_set) -> None:
    inputs = make(Case(MIXED, dim=80, dtype=dtype))
    starts = inputs.query_start.tolist()
    with ops.forced_instruction_set(instruction_set):
        together = ops.paged_attention(*inputs.arguments())
        for s in range(len(MIXED)):
            alone = ops.paged_attention(*subset(inputs, [s]))
            assert torch.equal(alone, together[starts[s] : starts[s + 1]])
        turned = ops.paged_attention(*subset(inputs, [5, 2, 0]))
    assert torch.equal(turned[:64], together[starts[5] : starts[6]])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("cuts", [(1,), (31, 32, 33), (64,), tuple(range(1, 150)), (100, 149)])
def test_bits_do_not_depend_on_chunking(cuts, instruction_set) -> None:
    inputs = make(Case(((150, 150),), heads=6, kv_heads=2))
    with ops.forced_instruction_set(instruction_set):
        whole = ops.paged_attention(*inputs.arguments())
        for begin, end in zip((0, *cuts), (*cuts, 150), strict=True):
            chunk = ops.paged_attention(
                inputs.query[begin:end], inputs.key_cache, inputs.value_cache,
                inputs.block_tables, torch.tensor([0, end - begin], dtype=torch.int32),
                torch.tensor([end], dtype=torch.int32), inputs.scale,
            )  # fmt: skip
            assert torch.equal(chunk, whole[begin:end])


def masked(inputs, window: int, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
    """Windowed, capped attention with sinks, written as one dense softmax a head and sequence."""
    rows = []
    for s, (keys, values) in enumerate(zip(inputs.keys, inputs.values, strict=True)):
        query = inputs.query[inputs.query_start[s] : inputs.query_start[s + 1]].double()
        new, total, heads = len(query), len(keys), query.shape[1]
        group = heads // keys.shape[1]
        out = torch.zeros(new, heads, query.shape[2], dtype=torch.float64)
        for q in range(new):
            at = total - new + q
            first = max(0, at + 1 - window) if window else 0
            for h in range(heads):
                scores = keys[first : at + 1, h // group].double() @ query[q, h] * inputs.scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                share = scores.softmax(0)[: at + 1 - first]
                out[q, h] = share @ values[first : at + 1, h // group].double()
        rows.append(out)
    return torch.cat(rows).float()


SINKS = torch.tensor([2.0, -1.0, 0.5, 30.0])
MASKS = {
    "window 1": (1, 0.0, None),
    "window 7": (7, 0.0, None),
    "window 32": (32, 0.0, None),
    "window 33": (33, 0.0, None),
    "window beyond": (1000, 0.0, None),
    "softcap": (0, 2.0, None),
    "sinks": (0, 0.0, SINKS),
    "all": (20, 5.0, SINKS),
}
SPREAD = ((5, 5), (1, 77), (9, 70), (0, 7), (1, 1), (40, 40))


def hide_behind(inputs, window: int, block_size: int) -> None:
    """Take away whole blocks that no query sees, as a sliding-window cache does."""
    counts = inputs.query_start.diff().tolist()
    for s, (new, total) in enumerate(zip(counts, inputs.seq_lens.tolist(), strict=True)):
        gone = max(0, total - new + 1 - window) // block_size if window else 0
        inputs.block_tables[s, :gone] = -1


@pytest.mark.parametrize("implementation", [*INSTRUCTION_SETS, "reference"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_window_softcap_and_sinks(mask, implementation) -> None:
    window, softcap, sinks = mask
    for dim, block_size in ((64, 16), (20, 3)):
        inputs = make(Case(SPREAD, dim=dim, block_size=block_size))
        hide_behind(inputs, window, block_size)
        how = (
            ops.forced("reference")
            if implementation == "reference"
            else ops.forced_instruction_set(implementation)
        )
        with how:
            got = ops.paged_attention(*inputs.arguments(), ops.Variant(window, softcap, sinks))
        expected = masked(inputs, window, softcap, sinks)
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_bits_do_not_depend_on_chunks_or_mates(mask, instruction_set) -> None:
    window, softcap, sinks = mask
    variant = ops.Variant(window, softcap, sinks)
    inputs = make(Case(((150, 150), (3, 90))))
    with ops.forced_instruction_set(instruction_set):
        together = ops.paged_attention(*inputs.arguments(), variant)
        cuts = (0, 1, 31, 64, 97, 150)
        for begin, end in itertools.pairwise(cuts):
            chunk = ops.paged_attention(
                inputs.query[begin:end], inputs.key_cache, inputs.value_cache,
                inputs.block_tables[:1], torch.tensor([0, end - begin], dtype=torch.int32),
                torch.tensor([end], dtype=torch.int32), inputs.scale, variant,
            )  # fmt: skip
            assert torch.equal(chunk, together[begin:end])
        alone = ops.paged_attention(*subset(inputs, [1]), variant)
        assert torch.equal(alone, together[150:])


@pytest.mark.parametrize("bad", [{"window": -1}, {"softcap": -1.0}, {"softcap": float("nan")}])
def test_a_negative_window_or_softcap_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="window and softcap must be 0 or more"):
        ops.paged_attention(*make(Case(((4, 20),))).arguments(), ops.Variant(**bad))


def test_sinks_are_one_for_each_head() -> None:
    with pytest.raises(ValueError, match="sinks has heads=3"):
        ops.paged_attention(*make(Case(((4, 20),))).arguments(), ops.Variant(sinks=torch.zeros(3)))


@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
def test_bits_do_not_depend_on_block_size(block_size) -> None:
    case = Case(((9, 140),))
    whole = make(case)
    regrouped = make(dataclasses.replace(case, block_size=block_size))
    # The same tokens in other blocks: scatter the first case's keys, values and queries again.
    table = regrouped.block_tables[0].long()
    at = torch.arange(140)
    regrouped.key_cache[table[at // block_size], at % block_size] = whole.keys[0]
    regrouped.value_cache[table[at // block_size], at % block_size] = whole.values[0]
    regrouped.query = whole.query
    assert torch.equal(
        ops.paged_attention(*whole.arguments()), ops.paged_attention(*regrouped.arguments())
    )


def test_bits_do_not_depend_on_threads() -> None:
    inputs = make(Case(MIXED, heads=8, kv_heads=4, dim=128))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.paged_attention(*inputs.arguments()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_large_scores_do_not_overflow() -> None:
    inputs = make(Case(((4, 70),)))
    inputs.scale = 1e4
    got = ops.paged_attention(*inputs.arguments())
    torch.testing.assert_close(got, dense(inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.block_tables.fill_(10**6), r"block_tables\[0\] is 1000000 at 0"),
        (lambda i: i.block_tables.fill_(-1), r"block_tables\[0\] is -1 at 0"),
        (lambda i: i.seq_lens.fill_(10**6), r"seq_lens\[0\] is 1000000, which needs 62500 blocks"),
        (lambda i: i.seq_lens.fill_(1), r"seq_lens\[0\] is 1, fewer than its 4 queries"),
        (lambda i: i.query_start.fill_(0), "query_start must run from 0 to the 6 tokens"),
        (lambda i: i.query_start.copy_(torch.tensor([0, 9, 6])), "query_start falls at 2"),
    ],
)
def test_stray_indices_are_refused_before_any_read(change, message) -> None:
    inputs = make(Case(((4, 20), (2, 9))))
    change(inputs)
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(*inputs.arguments())


@pytest.mark.parametrize(
    ("index", "replacement", "error", "message"),
    [
        (0, torch.zeros(6, 4, 32), ValueError, "key_cache has dim=64"),
        (0, torch.zeros(6, 3, 64), ValueError, "3 heads, not a multiple of the 2 heads"),
        (1, torch.zeros(7, 16, 2), ValueError, r"key_cache must have dimensions \[blocks"),
        (2, torch.zeros(2, 16, 2, 64), ValueError, "value_cache has blocks=2"),
        (3, torch.zeros(2, 5, dtype=torch.int64), TypeError, "block_tables must be torch.int32"),
        (4, torch.zeros(2, dtype=torch.int32), ValueError, "query_start has 2 entries for 2"),
        (5, torch.zeros(4, dtype=torch.int32)[::2], ValueError, "seq_lens must be contiguous"),
        (0, torch.zeros(6, 4, 64, dtype=torch.float16), TypeError, "key_cache is torch.float32"),
    ],
)
def test_wrong_tensors_are_named(index, replacement, error, message) -> None:
    arguments = list(make(Case(((4, 20), (2, 9)))).arguments())
    arguments[index] = replacement
    with pytest.raises(error, match=message):
        ops.paged_attention(*arguments)
