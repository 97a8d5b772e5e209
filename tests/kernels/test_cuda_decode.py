"""Decode attention on a GPU against float64, and what must not move its bits.

The inputs are hostile: whatever the kernels must not read is NaN or an absurd index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops
from octavo_kernels.attention_settings import DecodeSetting

pytestmark = needs_gpu_kernels

ABSURD_BLOCK = 2**30
RAGGED = (1, 15, 0, 16, 17, 255, 256, 257, 0, 600, 4097)
SHORT = (1, 0, 31, 130, 300)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """`lengths` of 0 are padding rows."""

    lengths: tuple[int, ...] = RAGGED
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    variant: ops.Variant = ops.PLAIN
    seed: int = 0


@dataclass
class Inputs:
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    variant: ops.Variant

    def arguments(self) -> tuple:
        return (
            self.query, self.key_cache, self.value_cache, self.block_tables, self.query_start,
            self.seq_lens, self.scale, self.variant,
        )  # fmt: skip


def make(case: Case) -> Inputs:
    """Sequences over shuffled blocks; blocks behind the window are gone, the query is a slice."""
    random = torch.Generator("cuda").manual_seed(case.seed)
    size, window = case.block_size, case.variant.window
    needed = [-(-length // size) for length in case.lengths]
    order = torch.randperm(sum(needed) + 3, generator=random, device="cuda")
    shape = (len(order) * size, case.kv_heads, case.dim)
    caches = [torch.full(shape, float("nan"), dtype=case.dtype, device="cuda") for _ in range(2)]
    tables = torch.full((len(needed), max(needed) + 2), ABSURD_BLOCK, dtype=torch.int32)
    used = 0
    for row, length in enumerate(case.lengths):
        blocks = order[used : used + needed[row]]
        used += needed[row]
        gone = max(0, length - window) // size if window else 0
        tables[row, : needed[row]] = blocks.cpu().int()
        tables[row, :gone] = -1
        token = torch.arange(gone * size, length, device="cuda")
        slots = blocks[token // size] * size + token % size
        for cache in caches:
            drawn = torch.randn((len(token), *shape[1:]), generator=random, device="cuda")
            cache[slots] = drawn.to(case.dtype)
    width = case.heads * case.dim
    fused = torch.randn((len(needed), 2 * width), generator=random, device="cuda")
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    return Inputs(
        query=fused.to(case.dtype)[:, :width].view(-1, case.heads, case.dim),
        key_cache=caches[0].view(-1, size, *shape[1:]),
        value_cache=caches[1].view(-1, size, *shape[1:]),
        block_tables=tables.cuda(),
        query_start=torch.arange(len(needed) + 1, dtype=torch.int32, device="cuda"),
        seq_lens=lengths,
        scale=case.dim**-0.5,
        variant=case.variant,
    )


def work_for(case: Case, max_seqs: int = 0, max_seq_len: int = 8192, **more) -> ops.AttentionWork:
    return ops.attention_work(
        max_seqs=max_seqs or len(case.lengths),
        max_seq_len=max_seq_len,
        heads=case.heads,
        kv_heads=case.kv_heads,
        dim=case.dim,
        device="cuda",
        windows=more.pop("windows", (case.variant.window,)),
        **more,
    )


def attend(inputs: Inputs, work: ops.AttentionWork | None = None) -> torch.Tensor:
    """All sequences as decodes, by the kernel, which must leave its counters as it found them."""
    if work is not None:
        ops.plan_attention(work, inputs.seq_lens, len(inputs.seq_lens))
    with ops.forced("cuda"):
        got = ops.paged_attention(
            *inputs.arguments(), num_decodes=len(inputs.seq_lens), max_query_len=1, work=work
        )
    if work is not None:
        assert not work.ticket.any()
        assert not work.arrivals.any()
    return got


def exact(inputs: Inputs) -> torch.Tensor:
    """One dense softmax a sequence in float64."""
    window, softcap, sinks = inputs.variant.window, inputs.variant.softcap, inputs.variant.sinks
    size = inputs.key_cache.shape[1]
    out = torch.zeros(inputs.query.shape, dtype=torch.float64, device="cuda")
    group = out.shape[1] // inputs.key_cache.shape[2]
    for row, length in enumerate(inputs.seq_lens.tolist()):
        if length == 0:
            continue
        token = torch.arange(max(0, length - window) if window else 0, length, device="cuda")
        block = inputs.block_tables[row].long()[token // size]
        keys = inputs.key_cache[block, token % size].double().repeat_interleave(group, dim=1)
        values = inputs.value_cache[block, token % size].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,khd->hk", inputs.query[row].double(), keys) * inputs.scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(1)[:, : len(token)], values)
    return out


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


def check(inputs: Inputs, got: torch.Tensor) -> None:
    """As near to float64 as the reference in the same type, within a factor of two."""
    assert not got.isnan().any()
    assert not got[inputs.seq_lens == 0].any()
    right = exact(inputs)
    if not right.any():
        return
    with ops.forced("reference"):
        allowed = 2 * error(ops.paged_attention(*inputs.arguments()), right)
    assert error(got, right) <= allowed
    for row in inputs.seq_lens.nonzero().flatten().tolist():  # no row hides behind the others
        assert error(got[row], right[row]) <= max(4 * allowed, ROUNDING[got.dtype])


# Of weights and of the result; a row of one token (a copy of its value) has no error at all.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SINKS = torch.tensor([2.0, -1.0, 0.5, 30.0, 0.0, -40.0, 3.0, 1.0])
SHAPES = [
    *(Case(dim=d, dtype=t) for d in (64, 80, 96, 128, 256) for t in DTYPES),
    *(Case(SHORT, heads=g * 2, kv_heads=2) for g in (1, 3, 4, 7, 8, 9, 16, 24)),
    *(Case(SHORT, heads=16, kv_heads=1, dim=d) for d in (64, 256)),
    Case(SHORT, heads=71, kv_heads=1, dim=64),
    Case(SHORT, heads=32, kv_heads=32, dim=80),
    *(Case(block_size=b) for b in (8, 32, 64, 128)),
    Case((40000, 1, 9000)),
    Case((5,)),
    Case((0, 0)),
]
VARIANTS = [
    *(ops.Variant(window=w) for w in (1, 7, 16, 17, 100, 256, 1000, 10000)),
    ops.Variant(softcap=2.0),
    ops.Variant(softcap=50.0),
    ops.Variant(sinks=SINKS),
    ops.Variant(window=33, softcap=5.0, sinks=SINKS),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_decode_is_attention(case) -> None:
    inputs = make(case)
    check(inputs, attend(inputs, work_for(case)))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("dim", "block_size"), [(64, 8), (128, 16), (256, 64)])
def test_window_softcap_and_sinks(variant, dim, block_size) -> None:
    if variant.sinks is not None:
        variant = replace(variant, sinks=variant.sinks.cuda())
    case = Case(dim=dim, block_size=block_size, variant=variant)
    inputs = make(case)
    check(inputs, attend(inputs, work_for(case, windows=(0, variant.window))))


@pytest.mark.parametrize(("chunk", "most"), [(64, 1), (64, 33), (128, 66), (256, 7), (1024, 32)])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks_per_sm", [1, 2, 3])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_setting_is_attention(chunk, most, stages, blocks_per_sm, dim) -> None:
    case = Case(dim=dim)
    setting = DecodeSetting(chunk, most, stages, blocks_per_sm)
    inputs = make(case)
    check(inputs, attend(inputs, work_for(case, setting=setting)))


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 131, 140])
def test_one_work_serves_steps_of_few_and_of_many(rows) -> None:
    """Up to 16 decodes, more, and so many that they fill the device: three ways to cut."""
    whole = Case((40, 700, 3000, 1, 0, 130, 8000) * 20)
    work = work_for(whole, windows=(0, 100))
    for window in (0, 100):
        variant = ops.Variant(window=window)
        inputs = make(replace(whole, lengths=whole.lengths[:rows], variant=variant))
        check(inputs, attend(inputs, work))


def test_without_work_one_is_made_for_the_call() -> None:
    inputs = make(Case())
    check(inputs, attend(inputs))


def test_many_short_sequences() -> None:
    """More items than run at once, most of them of one tile: the ring goes on across items."""
    lengths = tuple(int(n) for n in torch.randint(0, 90, (700,), generator=torch.manual_seed(1)))
    case = Case(lengths, heads=4, kv_heads=4, dim=64)
    inputs = make(case)
    check(inputs, attend(inputs, work_for(case)))


@pytest.fixture
def deterministic() -> Iterator[None]:
    ops.deterministic(True)
    yield
    ops.deterministic(False)


@pytest.mark.usefixtures("deterministic")
def test_bits_do_not_depend_on_batch_mates_or_on_who_does_the_work() -> None:
    case = Case(heads=16, kv_heads=2)
    inputs = make(case)
    together = attend(inputs, work_for(case))
    for row in range(len(case.lengths)):
        one = slice(row, row + 1)
        alone = replace(
            inputs,
            query=inputs.query[one],
            block_tables=inputs.block_tables[one],
            query_start=inputs.query_start[:2],
            seq_lens=inputs.seq_lens[one],
        )
        assert torch.equal(attend(alone, work_for(case)), together[one])
    turned = replace(
        inputs,
        query=inputs.query.flip(0).contiguous(),
        block_tables=inputs.block_tables.flip(0).contiguous(),
        seq_lens=inputs.seq_lens.flip(0).contiguous(),
    )
    assert torch.equal(attend(turned, work_for(case, max_seqs=99)).flip(0), together)
    for stages, blocks_per_sm in ((1, 1), (2, 2), (4, 1)):
        cut = work_for(case).settings[len(case.lengths)]
        setting = replace(cut, stages=stages, blocks_per_sm=blocks_per_sm)
        assert torch.equal(attend(inputs, work_for(case, setting=setting)), together)
    many = Case(case.lengths * 15, heads=16, kv_heads=2)  # cut as few are
    assert torch.equal(attend(repeated(inputs, 15), work_for(many))[: len(together)], together)
    assert all(torch.equal(attend(inputs, work_for(case)), together) for _ in range(20))


def repeated(inputs: Inputs, times: int) -> Inputs:
    rows = len(inputs.seq_lens) * times
    return replace(
        inputs,
        query=inputs.query.repeat(times, 1, 1),
        block_tables=inputs.block_tables.repeat(times, 1),
        query_start=torch.arange(rows + 1, dtype=torch.int32, device="cuda"),
        seq_lens=inputs.seq_lens.repeat(times),
    )


def test_a_graph_serves_every_length() -> None:
    """Captured once; between replays lengths, block tables and queries change in place."""
    wide = Case((4100,) * 6)
    inputs = make(wide)
    work = work_for(wide, windows=(0, 50))
    window_variant = replace(inputs, variant=ops.Variant(window=50))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        """A plan and two layers, one of them with a window."""
        return attend_planned(inputs, work), attend_planned(window_variant, work)

    ops.plan_attention(work, inputs.seq_lens, 6)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.plan_attention(work, inputs.seq_lens, 6)
        whole, windowed = step()
    for lengths in ((1, 2, 3, 0, 4000, 500), (4100, 0, 0, 0, 0, 0), (0,) * 6, (256, 257) * 3):
        inputs.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        inputs.query.copy_(torch.randn_like(inputs.query.float()))
        graph.replay()
        for got, of in ((whole, inputs), (windowed, window_variant)):
            right = exact(of)
            assert not got.isnan().any()
            assert error(got, right) < 4e-3 or not any(lengths)
            assert not got[inputs.seq_lens == 0].any()
        assert not work.ticket.any()
        assert not work.arrivals.any()


@pytest.mark.parametrize("window", [0, 100])
def test_a_graph_of_any_mix_serves_few_and_many_decodes(window) -> None:
    """Which run as if each of its 40 tokens were one; they are cut as the few of a step are."""
    whole = Case((8000, 130, 1, 17, 4000, 600, 64, 2000) * 5, variant=ops.Variant(window=window))
    inputs = make(whole)
    tokens = len(whole.lengths)
    work = work_for(whole, windows=(0, window), max_seqs=tokens + 1, max_tokens=tokens)
    lengths = torch.zeros(tokens + 1, dtype=torch.int32, device="cuda")
    start = torch.zeros(tokens + 2, dtype=torch.int32, device="cuda")
    tables = torch.cat(
        (inputs.block_tables, torch.full_like(inputs.block_tables[:1], ABSURD_BLOCK))
    )
    fixed = replace(inputs, seq_lens=lengths, query_start=start, block_tables=tables)

    def plan(count: int) -> None:
        lengths.zero_()[:count] = inputs.seq_lens[:count]
        start.fill_(tokens)[: count + 1] = inputs.query_start[: count + 1]
        ops.plan_attention(
            work, lengths[: count + 1], count, query_start=start[: count + 2], tokens=tokens,
            for_graph=True,
        )  # fmt: skip

    def layer() -> torch.Tensor:
        with ops.forced("cuda"):
            return ops.paged_attention(*fixed.arguments(), work=work)

    plan(0)
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    right = exact(inputs)
    for count in (0, 1, 2, 7, 17, 33, tokens, 1, 0):
        out.fill_(float("nan"))
        plan(count)
        graph.replay()
        assert not out[count:].any()  # NaN is any
        if count:
            assert error(out[:count], right[:count]) < 4e-3
        assert not work.ticket.any()
        assert not work.arrivals.any()


def attend_planned(inputs: Inputs, work: ops.AttentionWork) -> torch.Tensor:
    with ops.forced("cuda"):
        return ops.paged_attention(
            *inputs.arguments(), num_decodes=len(inputs.seq_lens), max_query_len=1, work=work
        )


def cuts(length: int, window: int, chunk: int, max_chunks: int) -> list[tuple[int, int, int, int]]:
    """Begin, end, index and count of a sequence's chunks: brute force of decode_plan.cu."""
    first = max(0, length - window) if window else 0
    origin = first // 16 * 16
    size = chunk
    while size * max_chunks < length - origin:
        size += 64
    begins = list(range(origin, length, size)) or [0]
    ends = [*begins[1:], length]
    return [
        (max(first, begin), end, i, len(begins))
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]


@pytest.mark.parametrize("max_seq_len", [64, 1000, 8192, 200000])
@pytest.mark.parametrize("rows", [9, 60, 1500])
def test_the_plan_covers_every_token_once_and_long_chunks_first(max_seq_len, rows) -> None:
    random = torch.Generator().manual_seed(max_seq_len)
    lengths = torch.randint(0, max_seq_len + 1, (rows,), generator=random).tolist()
    lengths[:6] = [0, 1, 16, 17, max_seq_len, 3 * max_seq_len]
    windows = (0, 1, 40, 4096)
    case = Case(tuple(lengths), heads=2, dim=64)
    work = work_for(case, max_seq_len=max_seq_len, windows=windows)
    ops.plan_attention(work, torch.tensor(lengths, dtype=torch.int32, device="cuda"), len(lengths))
    assert work.decode is not None
    for at, window in enumerate(windows):
        rows = work.chunks[at, : work.counts[at]].tolist()
        got = [(s, begin, end, w & 0xFFFF, w >> 16) for s, begin, end, w in rows]
        right = [
            (s, *cut)
            for s, length in enumerate(lengths)
            for cut in cuts(length, window, work.decode.chunk, work.decode.max_chunks)
        ]
        assert sorted(got) == sorted(right)
        sizes = [end - begin for _, begin, end, _, _ in got]
        assert all(later <= max(2 * size, size + 16) for size, later in pairwise(sizes))


def test_work_that_does_not_fit_the_call_is_refused() -> None:
    case = Case(SHORT)
    inputs = make(case)
    with pytest.raises(ValueError, match="5 decodes, but the work is for 4 sequences"):
        attend(inputs, work_for(case, max_seqs=4))
    with pytest.raises(ValueError, match=r"window 0 is not among the work's windows \(8,\)"):
        attend(inputs, work_for(case, windows=(8,)))
    with pytest.raises(ValueError, match="the work is for 5 sequences and heads"):
        attend(inputs, work_for(replace(case, heads=4)))
    with pytest.raises(ValueError, match="the work has no plan for decodes"):
        attend_planned(inputs, work_for(case))


def test_what_no_kernel_serves_runs_as_the_reference() -> None:
    inputs = make(Case((5, 40), dim=72))
    ops.calls.clear()
    got = ops.paged_attention(*inputs.arguments(), num_decodes=2)
    assert ops.calls == {("paged_attention", "reference"): 1}
    assert error(got, exact(inputs)) < 4e-3
