"""Draws on a GPU against the reference on the CPU: the same tokens for the same keys."""

import dataclasses
import math

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops, reference_sampling, sampling

DEVICE = "cuda"

pytestmark = needs_gpu_kernels

GREEDY, PLAIN = (0.0, -1, 1.0, 0.0), (1.0, -1, 1.0, 0.0)
# temperature, top_k, top_p, min_p
KINDS = [
    GREEDY,
    PLAIN,
    (0.25, -1, 1.0, 0.0),
    (2.0, -1, 1.0, 0.0),
    (1e-5, -1, 1.0, 0.0),
    (1.5, 40, 1.0, 0.0),
    (1.0, 20, 0.95, 0.0),
    (1.0, -1, 0.9, 0.0),
    (0.75, -1, 0.5, 0.0),
    (1.0, -1, 1.0, 0.05),
    (1.0, 1000, 0.95, 0.02),
    (1.0, 1, 1.0, 0.0),
    (1.0, -1, 1e-6, 0.0),
    (1.0, -1, 0.999999, 0.0),
    (0.01, -1, 0.9, 0.0),
    (1.0, 3000, 1.0, 0.0),
    (2.0, 5000, 0.97, 0.0),
    (1.0, 1 << 30, 1.0, 1.0),
]
# vocab, spread, type, elements between rows that are not theirs
SHAPES = [
    (151936, 3.0, torch.bfloat16, 0),
    (50257, 2.0, torch.bfloat16, 0),
    (32000, 0.0, torch.bfloat16, 0),
    (20011, 1.0, torch.float16, 5),
    (30001, 0.3, torch.float32, 3),
    (8192, 0.05, torch.float16, 0),
    (17, 5.0, torch.bfloat16, 3),
    (3, 1.0, torch.float32, 0),
    (1, 1.0, torch.bfloat16, 7),
]


def sampling_of(kinds: list[tuple], counts: list[int] | None = None, **more) -> sampling.Sampling:
    columns = list(zip(*kinds, strict=True))
    random = torch.Generator().manual_seed(len(kinds))
    limit = 2**63 - 1
    return sampling.Sampling(
        temperature=torch.tensor(columns[0], dtype=torch.float32),
        top_k=torch.tensor(columns[1], dtype=torch.int32),
        top_p=torch.tensor(columns[2], dtype=torch.float32),
        min_p=torch.tensor(columns[3], dtype=torch.float32),
        stream=torch.randint(-limit, limit, (len(kinds),), generator=random),
        count=torch.tensor(counts or range(len(kinds))),
        **more,
    )


def moved(record, device: str | None = None):
    """A dataclass of tensors on the device."""
    changes = {
        field.name: value.to(device or DEVICE, copy=True)
        for field in dataclasses.fields(record)
        if isinstance(value := getattr(record, field.name), torch.Tensor)
    }
    if getattr(record, "adjustments", None) is not None:
        changes["adjustments"] = moved(record.adjustments, device)
    return dataclasses.replace(record, **changes)


def normal(rows: int, vocab: int, *, dtype=torch.float32, seed=0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn((rows, vocab), generator=random).to(dtype)


def apart(logits: torch.Tensor, gap: int) -> torch.Tensor:
    """On the device, with so many NaN between the rows, so that most rows begin unaligned."""
    rows, vocab = logits.shape
    wide = torch.full((rows, vocab + gap), math.nan, dtype=logits.dtype)
    wide[:, :vocab] = logits
    return wide.to(DEVICE)[:, :vocab]


def reference(logits: torch.Tensor, wanted: sampling.Sampling, **more) -> list[int]:
    with ops.forced("reference"):
        return ops.sample(logits.cpu(), wanted, **more).tolist()


@pytest.fixture(autouse=True)
def on_the_device():
    with ops.forced(DEVICE):
        yield


@pytest.mark.parametrize(("vocab", "spread", "dtype", "gap"), SHAPES)
def test_the_tokens_are_the_reference_s(vocab, spread, dtype, gap) -> None:
    wanted = sampling_of(KINDS)
    for seed in range(2):
        logits = normal(len(KINDS), vocab, dtype=dtype, seed=seed) * spread
        if vocab == 50257:  # as models have them: few tokens have most of the probability
            order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
            logits = (logits - 1.2 * torch.log1p(order)).to(dtype)
        found = ops.sample(apart(logits, gap), moved(wanted)).tolist()
        assert found == reference(logits, wanted)


@pytest.mark.parametrize("vocab", [5000, 40000])
def test_of_equals_the_lower_ids_are_kept(vocab) -> None:
    """Two values only: cuts by number and by share fall among thousands of equal logits."""
    kinds = [(1.0, k, p, 0.0) for k in (-1, 1, 700, 2048, 2049, 4000) for p in (1.0, 0.75, 0.01)]
    logits = (normal(len(kinds), vocab) > 0.5).to(torch.bfloat16) * 2
    wanted = sampling_of(kinds)
    assert ops.sample(logits.to(DEVICE), moved(wanted)).tolist() == reference(logits, wanted)


@pytest.mark.parametrize("kind", ["smooth", "ties", "few"])
def test_the_first_k_are_found_by_their_segments(kind) -> None:
    """As many as there are segments and more, among equals, and where fewer are allowed."""
    kinds = [
        (1.0, k, p, m) for k in (1, 20, 255, 256, 257, 300) for p in (1.0, 0.9) for m in (0.0, 0.05)
    ]
    logits = normal(len(kinds), 256 * 256 + 9) * 2
    if kind == "ties":
        logits = (logits * 2).round() / 2
    if kind == "few":
        logits[:, 37:-5] = -math.inf
    logits, wanted = logits.to(torch.bfloat16), sampling_of(kinds)
    assert ops.sample(logits.to(DEVICE), moved(wanted)).tolist() == reference(logits, wanted)


@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_as_many_are_kept_as_in_the_reference(spread) -> None:
    """Not only the draw: where the row is cut, as far as the kernel lists what it keeps."""
    from octavo_kernels import cuda_sampling

    kinds = [(1.0, -1, 0.5, 0.0), (1.0, 50, 0.9, 0.0), (0.5, 7, 1.0, 0.0), (1.0, 300, 0.6, 0.01)]
    logits, wanted = normal(4, 4000) * spread, sampling_of(kinds)
    kept = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    cuda_sampling.sample(logits.to(DEVICE), moved(wanted), None, 1.0, 0.0, None, kept)
    expected = [
        len(reference_sampling.kept(row, t, k, p, m))
        for row, (t, k, p, m) in zip(logits, kinds, strict=True)
    ]
    assert kept.tolist() == expected


def test_scale_and_softcap() -> None:
    kinds = [kind for kind in KINDS if kind[0] != 1e-5]  # saturated logits are near-ties there
    logits, wanted = normal(len(kinds), 3001) * 9, sampling_of(kinds)
    found = ops.sample(logits.to(DEVICE), moved(wanted), scale=0.5, softcap=8.0).tolist()
    assert found == reference(logits, wanted, scale=0.5, softcap=8.0)


def test_what_are_no_numbers_hurts_no_neighbour() -> None:
    vocab, kinds = 3000, [GREEDY, PLAIN, (1.0, 5, 1.0, 0.0), (1.0, -1, 0.9, 0.0)] * 5
    logits = normal(len(kinds), vocab, dtype=torch.bfloat16)
    logits[4:8, 2999] = math.nan
    logits[8:12, 7] = math.inf
    logits[12:16] = -math.inf
    logits[16:20] = -math.inf
    logits[16:20, 1234] = -3e38
    wanted = sampling_of(kinds)
    found = ops.sample(logits.to(DEVICE), moved(wanted)).tolist()
    assert found == reference(logits, wanted)
    assert found[4:16] == [sampling.NO_TOKEN] * 12
    assert found[16:] == [1234] * 4


def test_a_token_depends_on_its_row_alone() -> None:
    """Neither on batch mates nor on how rows are spread over blocks."""
    kinds = (KINDS * 30)[:500]
    logits = normal(len(kinds), 32000, dtype=torch.bfloat16).to(DEVICE)
    wanted = moved(sampling_of(kinds))
    together = ops.sample(logits, wanted).tolist()
    for r in (0, 1, 7, 16, 33, 250, 499):
        slot = torch.tensor([r], dtype=torch.int32, device=DEVICE)
        assert ops.sample(logits[r : r + 1], wanted, slots=slot).tolist() == [together[r]]
    backwards = torch.arange(len(kinds) - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    assert ops.sample(logits.flip(0), wanted, slots=backwards).tolist() == together[::-1]


@pytest.mark.parametrize("vocab", [2049, 5003])
def test_a_token_does_not_depend_on_where_its_row_begins(vocab) -> None:
    """Rows that can be read sixteen bytes at once, and copies of them that cannot."""
    rows = 64
    logits = normal(rows, vocab, dtype=torch.bfloat16).to(DEVICE)
    for kind in (GREEDY, PLAIN, (1.0, -1, 0.9, 0.0), (1.0, 40, 1.0, 0.0)):
        wanted = moved(sampling_of([kind] * rows))
        found = []
        for gap in (-vocab % 8, -vocab % 8 + 1, -vocab % 8 + 4):
            wide = torch.full((rows, vocab + gap), math.nan, dtype=torch.bfloat16, device=DEVICE)
            wide[:, :vocab] = logits
            found.append(ops.sample(wide[:, :vocab], wanted).tolist())
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
def test_numbers_at_the_ends_of_the_range(temperature) -> None:
    """Whole segments of -infinity, and finite logits whose exponents no float32 holds."""
    vocab, kinds = 6000, [(temperature, *rest) for rest in [(-1, 1.0, 0.0), (9, 1.0, 0.0)] * 4]
    logits = torch.full((len(kinds), vocab), -math.inf)
    logits[0:2, 3000:3020] = 3e38
    logits[2:4, 5990] = -3e38
    logits[4:6, ::7] = torch.linspace(-3e38, 3e38, len(logits[0, ::7]))
    logits[6:8, 1000:5000] = normal(2, 4000)
    logits[6:8, 2500] = 1e30
    wanted = sampling_of(kinds)
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits.to(dtype)
        assert ops.sample(rows.to(DEVICE), moved(wanted)).tolist() == reference(rows, wanted)


def test_draws_follow_the_distribution_across_segments() -> None:
    """Twelve tokens at the edges of segments and inside them, among many that are forbidden."""
    rows, ids = (
        20000,
        torch.tensor([0, 255, 256, 511, 512, 900, 1023, 1024, 1500, 2047, 2048, 2050]),
    )
    row = torch.full((2051,), -math.inf)
    row[ids] = torch.log1p(torch.arange(12.0))
    for kind in (PLAIN, (1.0, -1, 0.97, 0.0)):
        wanted = sampling_of([kind] * rows)
        tokens = ops.sample(row.to(DEVICE).expand(rows, -1).contiguous(), moved(wanted)).cpu()
        of_kept = reference_sampling.kept(row, *kind)
        of_kept = of_kept[row[of_kept] > -math.inf]
        counts = torch.bincount(tokens, minlength=2051)[of_kept]
        assert int(counts.sum()) == rows
        expected = torch.softmax(row[of_kept].double(), 0) * rows
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 3 * (len(of_kept) - 1) + 15


@pytest.mark.parametrize(
    ("kind", "kept"), [(PLAIN, 12), ((1.0, 5, 1.0, 0.0), 5), ((1.0, -1, 0.8, 0.0), None)]
)
def test_draws_follow_the_distribution(kind, kept) -> None:
    rows = 20000
    row = -1.0 * torch.log1p(torch.arange(12.0))
    wanted = sampling_of([kind] * rows)
    tokens = ops.sample(row.repeat(rows, 1).to(DEVICE), moved(wanted)).cpu()
    ids = reference_sampling.kept(row, *kind)
    assert kept is None or len(ids) == kept
    counts = torch.bincount(tokens, minlength=12)
    assert int(counts.sum()) == int(counts[ids].sum())
    expected = torch.softmax(row[ids].double(), 0) * rows
    chi_square = float(((counts[ids] - expected) ** 2 / expected).sum())
    assert chi_square < 3 * (len(ids) - 1) + 15  # far beyond 0.1 % for 2 to 11 degrees


def test_slots_and_ends() -> None:
    logits = normal(4, 1000)
    logits[0, 77] = logits[3, 77] = 99.0
    stop_ids = torch.full((5, sampling.STOP_IDS), -1, dtype=torch.int32)
    stop_ids[:, 5] = 77
    ends = sampling.Ends(
        stop_ids, torch.tensor([9, 9, 9, 5, 1]), torch.full((6,), 99, dtype=torch.uint8)
    )
    slots = torch.tensor([3, -1, 0, 4], dtype=torch.int32)
    wanted, there = sampling_of(KINDS[:5], [4] * 5), moved(ends)
    more = {"slots": slots.to(DEVICE), "ends": there}
    found = ops.sample(logits.to(DEVICE), moved(wanted), **more).tolist()
    assert found == reference(logits, wanted, slots=slots, ends=ends)
    assert found[1] == 0
    assert there.flags.tolist() == ends.flags.tolist()


def pool_of(rows: int, vocab: int, device: str) -> sampling.Adjustments:
    """Row by row another set of adjustments, over histories with repetitions."""
    pool = sampling.new_adjustments(rows, vocab, 16, torch.device(device))
    random = torch.Generator().manual_seed(rows)

    def ids(count: int) -> list[int]:
        return torch.randint(0, vocab, (count,), generator=random).tolist()

    for row in range(rows):
        prompt, drawn, some = ids(200), ids(50) + [3] * row, ids(20)
        sampling.restart_adjustment(
            pool, row, prompt=prompt, drawn=drawn,
            allowed=some if row % 4 == 3 else None,
            listed=[(i, 1.5, 99) for i in set(some[:5])] + [(i, -math.inf, row) for i in some[5:8]],
            repetition=(1.0, 1.25, 0.5)[row % 3], presence=0.25 * (row % 2),
            frequency=0.5 * (row % 5 == 1),
        )  # fmt: skip
    return pool


def test_adjustments_and_what_they_count() -> None:
    vocab, kinds = 20011, KINDS
    rows = torch.tensor([i if i % 5 else -1 for i in range(len(kinds))], dtype=torch.int32)
    with ops.forced("reference"):
        pool = pool_of(len(kinds), vocab, "cpu")
    there = pool_of(len(kinds), vocab, DEVICE)
    assert torch.equal(there.marks.cpu(), pool.marks)
    logits = normal(len(kinds), vocab, dtype=torch.bfloat16) * 2
    wanted = sampling_of(kinds, adjusted=rows, adjustments=pool)
    on_device = dataclasses.replace(moved(wanted), adjustments=there)
    for _ in range(3):
        assert ops.sample(apart(logits, 5), on_device).tolist() == reference(logits, wanted)
        assert torch.equal(there.marks.cpu(), pool.marks)


def test_a_count_stays_at_its_largest() -> None:
    drawn = [5] * (sampling.COUNT_MASK + 9)
    pool = sampling.new_adjustments(1, 16, 1, torch.device(DEVICE))
    sampling.restart_adjustment(pool, 0, prompt=[5], drawn=drawn)
    full = torch.tensor(sampling.IN_PROMPT | sampling.COUNT_MASK).to(torch.int16)
    assert pool.marks[0, 5].cpu() == full
    rows = torch.zeros(1, dtype=torch.int32)
    wanted = dataclasses.replace(moved(sampling_of([GREEDY], adjusted=rows)), adjustments=pool)
    logits = torch.zeros(1, 16, device=DEVICE)
    logits[0, 5] = 1.0
    assert ops.sample(logits, wanted).tolist() == [5]
    assert pool.marks[0, 5].cpu() == full


def test_where_nothing_is_allowed() -> None:
    pool = sampling.new_adjustments(1, 100, 4, torch.device(DEVICE))
    listed = [(7, -math.inf, 9), (8, -math.inf, 9)]
    sampling.restart_adjustment(pool, 0, allowed=(7, 8), listed=listed)
    for kind in (GREEDY, PLAIN, (1.0, 3, 0.5, 0.0)):
        rows = torch.zeros(2, dtype=torch.int32)
        wanted = moved(sampling_of([kind] * 2, [8, 9], adjusted=rows))
        wanted = dataclasses.replace(wanted, adjustments=pool)
        tokens = ops.sample(torch.zeros(2, 100, device=DEVICE), wanted).tolist()
        assert tokens[0] == sampling.NOTHING_ALLOWED
        assert tokens[1] in (7, 8)


@pytest.mark.parametrize(("vocab", "spread", "dtype", "gap"), SHAPES)
def test_token_logprobs(vocab, spread, dtype, gap) -> None:
    rows, top = 6, min(20, vocab)
    logits = normal(rows, vocab, dtype=dtype, seed=4) * spread
    tokens = torch.tensor([0, vocab - 1, -1, vocab // 2, 1 % vocab, 0], dtype=torch.int32)
    wanted = torch.tensor([top, 0, 3, -1, 5, 1000], dtype=torch.int32)
    with ops.forced("reference"):
        expected = ops.token_logprobs(logits, tokens, wanted, top)
    found = ops.token_logprobs(apart(logits, gap), tokens.to(DEVICE), wanted.to(DEVICE), top)
    for row, count in ((0, top), (1, 0), (4, min(5, top)), (5, top)):
        assert int(found.rank[row]) == int(expected.rank[row])
        assert float(found.logprob[row]) == pytest.approx(float(expected.logprob[row]), abs=1e-5)
        assert found.top_ids[row, :count].tolist() == expected.top_ids[row, :count].tolist()
        mine, theirs = found.top_logprobs[row, :count].cpu(), expected.top_logprobs[row, :count]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_token_logprobs_of_many_and_of_equals() -> None:
    """More equal logits than the list takes, and as many wanted as there may be."""
    logits = (normal(3, 30000) > 1).to(torch.bfloat16)
    tokens, wanted = torch.zeros(3, dtype=torch.int32), torch.full((3,), 1024, dtype=torch.int32)
    with ops.forced("reference"):
        expected = ops.token_logprobs(logits, tokens, wanted, 1024, scale=2.0, softcap=1.5)
    found = ops.token_logprobs(
        logits.to(DEVICE), tokens.to(DEVICE), wanted.to(DEVICE), 1024, scale=2.0, softcap=1.5
    )
    assert torch.equal(found.top_ids.cpu(), expected.top_ids)
    torch.testing.assert_close(found.top_logprobs.cpu(), expected.top_logprobs, rtol=0, atol=1e-5)


def test_a_graph_serves_whatever_the_rows_ask_for() -> None:
    """Captured once, replayed with other logits, parameters and slots; each replay is checked."""
    rows, vocab = len(KINDS), 32000
    wanted = sampling_of(KINDS, [0] * rows)
    there = moved(wanted)
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    tokens = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    asked = torch.full((rows,), 4, dtype=torch.int32, device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.sample(logits, there)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens.copy_(ops.sample(logits, there))
        logprobs = ops.token_logprobs(logits, tokens, asked, 4)
    for step in range(6):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(step))
        wanted = sampling_of([KINDS[i] for i in order], [step] * rows)
        fresh = normal(rows, vocab, dtype=torch.bfloat16, seed=step) * (1 + step)
        for name in ("temperature", "top_k", "top_p", "min_p", "stream", "count"):
            getattr(there, name).copy_(getattr(wanted, name))
        logits.copy_(fresh)
        graph.replay()
        expected = reference(fresh, wanted)
        assert tokens.tolist() == expected
        with ops.forced("reference"):
            theirs = ops.token_logprobs(fresh, tokens.cpu(), asked.cpu(), 4)
        assert torch.equal(logprobs.top_ids.cpu(), theirs.top_ids)
        assert torch.equal(logprobs.rank.cpu(), theirs.rank)
