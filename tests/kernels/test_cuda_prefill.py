"""Prefill on a GPU against float64; whatever must not be read is NaN or an absurd index."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops
from octavo_kernels.attention_settings import PrefillSetting

pytestmark = needs_gpu_kernels

ABSURD_BLOCK = 2**30
LENGTHS = (2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 300)
PREFIXES = (0, 1, 16, 17, 250)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DTYPES = (torch.bfloat16, torch.float16)
DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Case:
    """`sequences` are (new tokens, tokens in all) pairs; the first `num_decodes` have one each."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    num_decodes: int = 0
    min_span: int = 512
    warpgroups: bool = False


@dataclass
class Inputs:
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    variant: ops.Variant
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make(case: Case) -> Inputs:
    """Scatter random sequences over shuffled blocks; the query is a slice of a fused projection."""
    random = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device="cuda").to(case.dtype)

    size = case.block_size
    needed = [-(-total // size) for _, total in case.sequences]
    order = torch.randperm(sum(needed) + 3).tolist()
    shape = (len(order), size, case.kv_heads, case.dim)
    key_cache = torch.full(shape, float("nan"), dtype=case.dtype, device="cuda")
    value_cache = key_cache.clone()
    tables = torch.full((len(needed), max(needed) + 2), ABSURD_BLOCK, dtype=torch.int32)
    keys, values = [], []
    for row, (new, total) in enumerate(case.sequences):
        table = torch.tensor([order.pop() for _ in range(needed[row])], dtype=torch.int64)
        behind = max(0, total - new + 1 - case.window) if case.window else 0
        tables[row, : needed[row]] = table
        tables[row, : behind // size] = -1
        keys.append(normal(total, case.kv_heads, case.dim))
        values.append(normal(total, case.kv_heads, case.dim))
        at = torch.arange(behind, total)  # what lies behind all windows stays NaN
        key_cache[table[at // size], at % size] = keys[-1][behind:]
        value_cache[table[at // size], at % size] = values[-1][behind:]
    new = torch.tensor([0] + [count for count, _ in case.sequences])
    width = (case.heads + 2 * case.kv_heads) * case.dim
    query = normal(int(new.sum()), width)[:, : case.heads * case.dim]
    sinks = torch.linspace(-3, 20, case.heads, device="cuda") if case.sinks else None
    return Inputs(
        query.unflatten(1, (case.heads, case.dim)), key_cache, value_cache, tables.cuda(),
        new.cumsum(0).to(torch.int32).cuda(),
        torch.tensor([total for _, total in case.sequences], dtype=torch.int32).cuda(),
        ops.Variant(case.window, case.softcap, sinks), keys, values,
    )  # fmt: skip


def plan_of(case: Case, inputs: Inputs):
    from octavo_kernels.cuda_prefill import plan_prefill

    return plan_prefill(
        inputs.query_start,
        inputs.seq_lens,
        tokens=len(inputs.query),
        heads=case.heads,
        kv_heads=case.kv_heads,
        dim=case.dim,
        num_decodes=case.num_decodes,
        max_query_len=max((new for new, _ in case.sequences[case.num_decodes :]), default=0),
        setting=PrefillSetting(case.min_span, case.warpgroups),
    )


def attend(case: Case, inputs: Inputs, plan=None) -> torch.Tensor:
    """What prefill writes over NaN."""
    out = torch.full_like(inputs.query, float("nan"), memory_format=torch.contiguous_format)
    (plan or plan_of(case, inputs)).attend(
        inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables,
        case.dim**-0.5, inputs.variant, out,
    )  # fmt: skip
    return out


def exact(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """Each sequence's rows, as one dense softmax a head in float64."""
    rows = []
    starts, group = inputs.query_start.tolist(), case.heads // case.kv_heads
    for s, (new, total) in enumerate(case.sequences):
        query = inputs.query[starts[s] : starts[s + 1]].double()
        keys = inputs.keys[s].double().repeat_interleave(group, dim=1)
        values = inputs.values[s].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, keys) * case.dim**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        position = torch.arange(total - new, total, device="cuda")[:, None]
        of_key = torch.arange(total, device="cuda")[None, :]
        unseen = of_key > position
        if case.window:
            unseen |= of_key <= position - case.window
        scores = scores.masked_fill(unseen, float("-inf"))
        if inputs.variant.sinks is not None:
            column = inputs.variant.sinks.double()[:, None, None].expand(-1, new, 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(dim=-1)[..., :total]
        rows.append(torch.einsum("hqk,khd->qhd", weights, values))
    return rows


def check(case: Case) -> None:
    """Twice the error of one rounding of the exact result is what rounded weights may add."""
    inputs = make(case)
    got = attend(case, inputs)
    starts = inputs.query_start.tolist()
    assert got[: case.num_decodes].isnan().all()
    assert not got[case.num_decodes :].isnan().any()
    for s, wanted in enumerate(exact(case, inputs)):
        if s < case.num_decodes:
            continue
        rows = got[starts[s] : starts[s + 1]].double()
        rounding = (wanted.to(case.dtype).double() - wanted).norm()
        error = (rows - wanted).norm()
        assert error <= 2 * rounding + 1e-6 * wanted.norm(), (s, case.sequences[s])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_lengths_and_prefixes(prefix, dim, dtype) -> None:
    check(Case(tuple((n, n + prefix) for n in LENGTHS), dim=dim, dtype=dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_sequence_alone(prefix, length) -> None:
    check(Case(((length, length + prefix),)))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (6, 6), (6, 2), (8, 1), (7, 1), (24, 1), (71, 1), (64, 8)]
)
def test_groups(heads, kv_heads) -> None:
    check(Case(((5, 9), (130, 300), (33, 33)), heads=heads, kv_heads=kv_heads, dim=64))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("dim", [64, 256])
def test_block_sizes(block_size, dim) -> None:
    check(Case(((5, 9), (130, 300), (33, 333)), block_size=block_size, dim=dim))


MASKS = {
    **{f"window {n}": {"window": n} for n in (1, 7, 16, 31, 64, 65, 100, 5000)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 40, "softcap": 5.0, "sinks": True},
}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask, dim) -> None:
    check(Case(((2, 2), (129, 400), (17, 267), (300, 300)), dim=dim, **mask))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunk", [2, 16, 17, 200])
def test_keys_split_into_spans(chunk, mask) -> None:
    """A lone chunk leaves most of a GPU idle, so its keys are split and put together again."""
    case = Case(((chunk, 3000 + chunk),), min_span=64, **mask)
    assert plan_of(case, make(case)).splits
    check(case)


@pytest.mark.parametrize("dim", DIMS)
def test_spans_of_several_sequences(dim) -> None:
    check(Case(((40, 1000), (1, 1), (2, 650), (9, 64), (0, 30)), dim=dim, min_span=64))


needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_warpgroups(prefix, dim, dtype) -> None:
    sequences = tuple((n, n + prefix) for n in (*LENGTHS, 1000))
    case = Case(sequences, dim=dim, dtype=dtype, warpgroups=True)
    assert plan_of(case, make(case)).warpgroups
    check(case)


@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_warpgroups_with_masks(mask, dim) -> None:
    check(Case(((2, 2), (129, 400), (17, 267), (300, 900)), dim=dim, warpgroups=True, **mask))


@needs_hopper
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_warpgroups_with_spans(mask) -> None:
    case = Case(((40, 3000), (2, 1000), (200, 250)), min_span=128, warpgroups=True, **mask)
    assert plan_of(case, make(case)).splits
    check(case)


@needs_hopper
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (7, 1), (24, 1), (64, 8)])
@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_warpgroups_with_groups_and_block_sizes(block_size, heads, kv_heads) -> None:
    """More items than blocks that run at once: each takes several."""
    sequences = ((700, 900), (5, 9), (130, 300), (0, 40), (1500, 1500))
    check(Case(sequences, heads, kv_heads, block_size=block_size, warpgroups=True))


@needs_hopper
def test_warpgroups_do_not_race() -> None:
    case = Case(((2000, 3000), (300, 300)), heads=16, kv_heads=4, warpgroups=True)
    inputs = make(case)
    first = attend(case, inputs)
    assert all(torch.equal(first, attend(case, inputs)) for _ in range(20))


@needs_hopper
def test_warpgroups_write_zeros_for_padding() -> None:
    case = Case(((140, 190), (3, 70)), warpgroups=True)
    inputs = make(case)
    inputs.seq_lens[1] = 0
    inputs.block_tables[1] = ABSURD_BLOCK
    got = attend(case, inputs)
    assert not got[:140].isnan().any()
    assert torch.equal(got[140:], torch.zeros_like(got[140:]))


@needs_hopper
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("new", "total"), [(64, 64), (64, 400), (200, 200), (200, 3000)])
def test_what_is_fastest_is_attention(new, total, dim) -> None:
    """By the operation, as layers call it, with a plan and without one."""
    case = Case(((1, 300), (new, total), (3, 40)), dim=dim, num_decodes=1)
    inputs = make(case)
    wanted = torch.cat(exact(case, inputs))
    work = ops.attention_work(
        max_seqs=4, max_seq_len=3000, heads=case.heads, kv_heads=case.kv_heads, dim=dim,
        device="cuda",
    )  # fmt: skip
    ops.plan_attention(
        work, inputs.seq_lens, 1, query_start=inputs.query_start, tokens=len(inputs.query),
        max_query_len=new, max_seq_len=total,
    )  # fmt: skip
    assert work.prefill is not None
    assert work.prefill.warpgroups == (dim != 80 and (new, total) != (64, 64))
    with ops.forced("cuda"):
        for planned in (work, None):
            got = ops.paged_attention(
                inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables,
                inputs.query_start, inputs.seq_lens, dim**-0.5, num_decodes=1, max_query_len=new,
                work=planned,
            )  # fmt: skip
            torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


def test_under_the_deterministic_profile_neither_spans_nor_warpgroups_are_used() -> None:
    from octavo_kernels.cuda_prefill import plan_prefill

    case = Case(((200, 3000),))
    inputs = make(case)
    sizes = {"tokens": 200, "heads": case.heads, "kv_heads": case.kv_heads, "dim": case.dim}
    assert plan_prefill(inputs.query_start, inputs.seq_lens, **sizes).splits
    ops.deterministic(True)
    try:
        plan = plan_prefill(inputs.query_start, inputs.seq_lens, **sizes)
    finally:
        ops.deterministic(False)
    assert not plan.splits
    assert not plan.warpgroups


def test_decodes_are_left_alone() -> None:
    check(Case(((1, 70), (1, 5), (1, 300), (64, 100), (3, 3), (1, 900)), num_decodes=3))


def test_a_decode_and_a_chunk_in_one_call() -> None:
    case = Case(((1, 70), (1, 5), (64, 100), (3, 3)), num_decodes=2)
    inputs = make(case)
    with ops.forced("cuda"):
        got = ops.paged_attention(
            inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables,
            inputs.query_start, inputs.seq_lens, case.dim**-0.5, num_decodes=2, max_query_len=64,
        )  # fmt: skip
    wanted = torch.cat(exact(case, inputs))
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("min_span", [0, 64])
def test_padding_becomes_zeros_and_reads_nothing(min_span) -> None:
    case = Case(((40, 90), (3, 70)), min_span=min_span)
    inputs = make(case)
    inputs.seq_lens[1] = 0
    inputs.block_tables[1] = ABSURD_BLOCK
    got = attend(case, inputs)
    assert not got[:40].isnan().any()
    assert torch.equal(got[40:], torch.zeros_like(got[40:]))


def test_no_chunks_are_no_work() -> None:
    case = Case(((1, 70), (1, 5)), num_decodes=2)
    assert attend(case, make(case)).isnan().all()


def test_many_short_chunks() -> None:
    check(Case(tuple((2 + i % 5, 20 + 7 * i) for i in range(300)), heads=4, kv_heads=1, dim=64))


@pytest.mark.parametrize("mask", [MASKS["sinks"], MASKS["window 31"], {}], ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_bits_do_not_depend_on_chunks_or_mates(dim, mask) -> None:
    whole = Case(((150, 150), (129, 400)), dim=dim, min_span=0, **mask)
    inputs = make(whole)
    together = attend(whole, inputs)
    for begin, end in itertools.pairwise((0, 1, 31, 64, 97, 150)):
        case = dataclasses.replace(whole, sequences=((end - begin, end),))
        chunk = dataclasses.replace(
            inputs,
            query=inputs.query[begin:end],
            block_tables=inputs.block_tables[:1].contiguous(),
            query_start=torch.tensor([0, end - begin], dtype=torch.int32, device="cuda"),
            seq_lens=torch.tensor([end], dtype=torch.int32, device="cuda"),
        )
        assert torch.equal(attend(case, chunk), together[begin:end])


def test_the_same_call_gives_the_same_bits() -> None:
    case = Case(((40, 3000), (300, 300)), min_span=64)
    inputs = make(case)
    first = attend(case, inputs)
    assert all(torch.equal(first, attend(case, inputs)) for _ in range(5))


def test_a_captured_graph_serves_other_lengths() -> None:
    """As many sequences and no more tokens, blocks and longest chunk than it was captured for."""
    case = Case(((100, 2000), (60, 60)))
    inputs = make(case)
    attend(case, inputs)  # loads the kernels
    out = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan_of(case, inputs).attend(
            inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables,
            case.dim**-0.5, inputs.variant, out,
        )  # fmt: skip
    for sequences in ((100, 2000), (60, 60)), ((30, 300), (90, 1500)), ((1, 1), (1, 17)):
        other = dataclasses.replace(case, sequences=sequences)
        fresh = make(other)
        inputs.query[: len(fresh.query)] = fresh.query
        inputs.query_start.copy_(fresh.query_start)
        inputs.seq_lens.copy_(fresh.seq_lens)
        inputs.key_cache[: len(fresh.key_cache)] = fresh.key_cache
        inputs.value_cache[: len(fresh.value_cache)] = fresh.value_cache
        inputs.block_tables.fill_(ABSURD_BLOCK)
        inputs.block_tables[:, : fresh.block_tables.shape[1]] = fresh.block_tables
        graph.replay()
        wanted = torch.cat(exact(other, fresh))
        torch.testing.assert_close(out[: len(wanted)].double(), wanted, rtol=2e-2, atol=2e-2)


# (new tokens, tokens in all), decodes first; what is left of a graph's tokens is padding.
MIXES = {
    "nothing": (),
    "one decode": ((1, 700),),
    "decodes": ((1, 3000), (1, 1), (1, 64), (1, 17), (1, 129)),
    "a short chunk": ((2, 2),),
    "a chunk far behind": ((11, 4000),),
    "short chunks": ((2, 5), (3, 3), (2, 900), (4, 130), (2, 2)),
    "both": ((1, 2000), (1, 40), (9, 9), (3, 1500)),
    "exactly full": ((1, 16), (6, 70), (9, 9)),
    "a large chunk": ((1, 300), (60, 60)),
    "a large chunk behind a prefix": ((1, 9), (57, 2500)),
    "large chunks": ((130, 130), (100, 700), (26, 26)),
}


def in_place(fixed: Inputs, fresh: Inputs) -> None:
    """Put the inputs where a graph finds them; what is not theirs is NaN or absurd, or padding."""
    tokens, seqs = len(fresh.query), len(fresh.seq_lens)
    fixed.query.fill_(float("nan"))[:tokens] = fresh.query
    fixed.block_tables.fill_(ABSURD_BLOCK)
    fixed.block_tables[:seqs, : fresh.block_tables.shape[1]] = fresh.block_tables
    for fixed_cache, cache in (
        (fixed.key_cache, fresh.key_cache),
        (fixed.value_cache, fresh.value_cache),
    ):
        fixed_cache.fill_(float("nan"))[: len(cache)] = cache
    fixed.query_start.fill_(len(fixed.query))[: seqs + 1] = fresh.query_start
    fixed.seq_lens.fill_(0)[:seqs] = fresh.seq_lens


def fixed_inputs(case: Case, tokens: int, rows: int) -> Inputs:
    inputs = make(dataclasses.replace(case, sequences=((tokens, 6000),)))
    width = inputs.block_tables.shape[1]
    return dataclasses.replace(
        inputs,
        block_tables=torch.zeros(rows, width, dtype=torch.int32, device="cuda"),
        query_start=torch.zeros(rows + 1, dtype=torch.int32, device="cuda"),
        seq_lens=torch.zeros(rows, dtype=torch.int32, device="cuda"),
    )


@pytest.mark.parametrize("mask", [{}, MASKS["window 31"], MASKS["all"]], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_one_graph_serves_every_mix_of_decodes_and_chunks(tokens, dim, mask) -> None:
    """Captured for nothing but padding; each mix is planned ahead of its replay."""
    case = Case((), dim=dim, **mask)
    rows = 9
    inputs = fixed_inputs(case, tokens, rows)
    work = ops.attention_work(
        max_seqs=rows, max_seq_len=6000, heads=case.heads, kv_heads=case.kv_heads, dim=dim,
        device="cuda", windows=(0, case.window), max_tokens=256,
    )  # fmt: skip

    def plan(num_decodes: int, seqs: int) -> None:
        ops.plan_attention(
            work, inputs.seq_lens[:seqs], num_decodes, query_start=inputs.query_start[: seqs + 1],
            tokens=tokens, for_graph=True,
        )  # fmt: skip

    def layer() -> torch.Tensor:
        with ops.forced("cuda"):
            return ops.paged_attention(
                inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_tables,
                inputs.query_start, inputs.seq_lens, dim**-0.5, inputs.variant, work=work,
            )  # fmt: skip

    inputs.query_start[1:] = tokens
    plan(0, 1)
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    served = 0
    for sequences in MIXES.values():
        used = sum(new for new, _ in sequences)
        if used > tokens:
            continue
        decodes = sum(new == 1 for new, _ in sequences)
        mix = dataclasses.replace(case, sequences=sequences, num_decodes=decodes)
        fresh = make(mix) if sequences else None
        if fresh is None:
            inputs.query_start.fill_(tokens)[:1] = 0
            inputs.seq_lens.fill_(0)
        else:
            in_place(inputs, fresh)
        out.fill_(float("nan"))
        plan(decodes, len(sequences) + 1)
        graph.replay()
        assert not work.ticket.any()
        assert not work.arrivals.any()
        assert torch.equal(out[used:], torch.zeros_like(out[used:]))
        if fresh is not None:
            wanted = torch.cat(exact(mix, fresh))
            torch.testing.assert_close(out[:used].double(), wanted, rtol=2e-2, atol=2e-2)
        served += 1
    assert served > 6


def test_plans_for_graphs_split_keys_where_few_tiles_leave_the_device_idle() -> None:
    """What the host cannot know when it captures: the plan decides on the device."""
    case = Case((), heads=32, kv_heads=8)
    inputs = fixed_inputs(case, 256, 4)
    work = ops.attention_work(
        max_seqs=4, max_seq_len=6000, heads=32, kv_heads=8, dim=128, device="cuda", max_tokens=2048
    )
    for tokens, length, is_split in ((40, 5000, True), (250, 5000, True), (250, 250, False)):
        inputs.query_start.copy_(torch.tensor([0, tokens, 256, 256, 256]))
        inputs.seq_lens.copy_(torch.tensor([length, 0, 0, 0]))
        ops.plan_attention(
            work, inputs.seq_lens[:2], 0, query_start=inputs.query_start[:3], tokens=256,
            for_graph=True,
        )  # fmt: skip
        assert work.prefill_buffers is not None
        items, splits = work.prefill_buffers.lists[:2].tolist()
        assert (splits > 0) == is_split
        assert items >= -(-tokens * 4 // 128)
    full = ops.attention_work(
        max_seqs=4, max_seq_len=6000, heads=32, kv_heads=8, dim=128, device="cuda", max_tokens=2048
    )
    inputs.query_start.copy_(torch.tensor([0, 2000, 2048, 2048, 2048]))
    inputs.seq_lens.copy_(torch.tensor([6000, 0, 0, 0]))
    ops.plan_attention(
        full, inputs.seq_lens[:2], 0, query_start=inputs.query_start[:3], tokens=2048,
        for_graph=True,
    )  # fmt: skip
    assert full.prefill_buffers is not None
    assert full.prefill_buffers.lists[:2].tolist() == [65, 0]  # tiles of 32 tokens


def test_graphs_larger_than_the_work_are_refused() -> None:
    inputs = make(Case(((40, 90),)))
    work = ops.attention_work(
        max_seqs=4, max_seq_len=100, heads=8, kv_heads=2, dim=128, device="cuda", max_tokens=32
    )
    with pytest.raises(ValueError, match="a graph of 40 tokens needs query_start and work for as"):
        ops.plan_attention(
            work, inputs.seq_lens, 0, query_start=inputs.query_start, tokens=40, for_graph=True
        )


def test_a_query_of_odd_alignment_is_served() -> None:
    case = Case(((40, 90),), dim=64)
    inputs = make(case)
    width = case.heads * case.dim
    shifted = torch.empty(40, width + 3, dtype=case.dtype, device="cuda")[:, 1 : width + 1]
    shifted.copy_(inputs.query.flatten(1))
    moved = dataclasses.replace(inputs, query=shifted.unflatten(1, (case.heads, case.dim)))
    assert torch.equal(attend(case, moved), attend(case, inputs))


def test_large_scores_do_not_overflow() -> None:
    case = Case(((40, 90),))
    inputs = make(case)
    inputs.query *= 1000
    assert not attend(case, inputs).isnan().any()


@pytest.mark.parametrize("change", [{"dim": 48}, {"block_size": 4}])
def test_what_has_no_kernel_is_said(change) -> None:
    case = Case(((40, 90),), **change)
    with pytest.raises(NotImplementedError, match="prefill has kernels for head dims 64, 80, 96"):
        attend(case, make(case))
