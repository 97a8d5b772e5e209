"""Products of 17 to 512 rows cut into equal shares: the cuts, and the kernel against float64."""

import itertools

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops

if "cuda" not in ops.implementations("cuda"):
    pytest.skip("octavo_kernels._cuda is not built", allow_module_level=True)

from octavo_kernels import cuda_gemm, cuda_lt, cuda_stream, cuda_tune, cuda_tuning_file
from octavo_kernels.cuda_stream import ADD, GATED, STORE, Plan

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
PAIRS = 66  # of an H100
DTYPES = [torch.bfloat16, torch.float16]
ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROWS = [17, 31, 32, 33, 64, 100, 128, 129, 255, 256, 257, 384, 500, 512]
# qkv, output, gate and up, down
LAYERS = {
    "llama-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "qwen3-0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)],
}
HEADS = [(128256, 4096), (151936, 1024)]
SHAPES = [shape for shapes in LAYERS.values() for shape in shapes]


def on_hopper(test):
    needed = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
    return needs_gpu_kernels(needed(test))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(cuda_lt, "found", {})
    monkeypatch.setattr(cuda_lt, "_rounded", {})


# The cuts


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, *HEADS, (64, 64), (320, 128)])
def test_plans_fit_the_device(n, k, rows) -> None:
    plans = cuda_stream.plans(rows, n, k, PAIRS)
    assert plans
    assert len(set(plans)) == len(plans)
    for plan in plans:
        row_tiles = -(-rows // plan.width)
        assert 1 <= plan.shares <= -(-n // 256) * (k // 64)
        assert row_tiles * plan.shares <= PAIRS


@pytest.mark.parametrize(
    ("rows", "n", "k", "first"),
    [
        # No tile is cut where the tiles nearly are as many as the pairs.
        (32, 28672, 4096, Plan(32, 56)),
        # Every pair is at work where they are not: 112 tiles would take two turns of 66.
        (256, 28672, 4096, Plan(256, 66)),
        # Two tiles of rows walk along w side by side.
        (512, 28672, 4096, Plan(256, 33)),
        # Few tiles: each is cut alike.
        (32, 4096, 14336, Plan(32, 64)),
    ],
)
def test_the_plan_that_should_be_fastest(rows, n, k, first) -> None:
    assert cuda_stream.plans(rows, n, k, PAIRS)[0] == first


def test_a_plan_is_an_algorithm_that_files_keep(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cuda_tuning_file, "_file", lambda folder, device: folder / "products.json")
    monkeypatch.setattr(cuda_tuning_file, "_read", {})
    size = cuda_lt.Size("bfloat16", False, 4096, 4096, 256)
    algorithm = cuda_stream.encoded(Plan(192, 33))
    device = torch.device("cuda", 0)
    cuda_tuning_file.add(tmp_path, device, {size: algorithm})
    assert cuda_tuning_file.read(tmp_path, device) == {size: algorithm}
    assert cuda_stream.plan_of(algorithm) == Plan(192, 33)
    assert cuda_stream.plan_of(bytes(64)) is None
    assert cuda_stream.plan_of(None) is None


def test_a_plan_for_more_blocks_than_the_device_runs_is_searched_again(monkeypatch) -> None:
    """As in a file of the same GPU, when other processes now share it."""
    monkeypatch.setattr(cuda_stream, "_workspace", lambda device: None)
    device = torch.device("cuda", 0)
    for pairs, is_ready in ((66, True), (65, False), (0, False)):
        monkeypatch.setattr(cuda_stream, "pairs_of", lambda device, pairs=pairs: pairs)
        assert cuda_stream.ready(Plan(256, 33), 500, device) is is_ready


def test_what_was_tried_is_in_the_file_s_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cuda_tuning_file, "_machine", lambda device: "gpu")
    device = torch.device("cuda", 0)
    named = set()
    for rows in (range(0), range(17, 513), range(64, 513), range(64, 225)):
        monkeypatch.setattr(cuda_stream, "tried_rows", rows)
        named.add(cuda_tuning_file._file(tmp_path, device))
    assert len(named) == 4


@pytest.mark.parametrize(
    ("rows", "n", "k", "served"),
    [
        (16, 4096, 4096, False), (17, 4096, 4096, True), (512, 4096, 4096, True),
        (513, 4096, 4096, False), (32, 4096, 4128, False), (32, 100, 64, False), (32, 64, 64, True),
    ],
)  # fmt: skip
def test_what_is_served(rows, n, k, served) -> None:
    assert cuda_stream.serves(rows, n, k) is served


@pytest.mark.parametrize(
    ("allowed", "rows", "tried"),
    [(range(64, 65), 64, 2), (range(65, 99), 64, 0), (range(17, 64), 64, 0), (range(1, 99), 16, 0)],
)
def test_who_is_tried(allowed, rows, tried, monkeypatch) -> None:
    monkeypatch.setattr(cuda_stream, "tried_rows", allowed)
    monkeypatch.setattr(cuda_stream, "pairs_of", lambda device: PAIRS)
    monkeypatch.setattr(cuda_stream, "_workspace", lambda device: None)
    x, w = torch.zeros(rows, 128, dtype=torch.bfloat16), torch.zeros(256, 128, dtype=torch.bfloat16)
    out = torch.zeros(rows, 256, dtype=torch.bfloat16)
    offered = cuda_stream.candidates(x, w, out, count=2)
    assert len(offered) == tried
    assert all(len(algorithm) == 64 for algorithm in offered)


def test_nothing_is_tried_when_off_or_deterministic(monkeypatch) -> None:
    monkeypatch.setattr(cuda_stream, "pairs_of", lambda device: PAIRS)
    monkeypatch.setattr(cuda_stream, "_workspace", lambda device: None)
    x, w = torch.zeros(64, 128, dtype=torch.bfloat16), torch.zeros(256, 128, dtype=torch.bfloat16)
    out = torch.zeros(64, 256, dtype=torch.bfloat16)
    monkeypatch.setattr(cuda_stream, "tried_rows", range(0))
    assert cuda_stream.candidates(x, w, out, count=2) == []
    monkeypatch.setattr(cuda_stream, "tried_rows", range(17, 513))
    ops.deterministic(True)
    try:
        assert cuda_stream.candidates(x, w, out, count=2) == []
        cuda_lt.keep(cuda_lt.size_of(x, w, None), cuda_stream.encoded(Plan(64, 1)))
        assert cuda_gemm._plan_of(x, w, None) is None
    finally:
        ops.deterministic(False)
    assert cuda_gemm._plan_of(x, w, None) == Plan(64, 1)


# The kernel


def made(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


def weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    w = made(n, k, dtype=dtype, scale=k**-0.5, seed=1)
    torch.cuda.synchronize()  # products read weights ahead of the stream
    return w


def pairs() -> int:
    return cuda_stream.pairs_of(torch.device("cuda", 0))


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    limit = roundings * ULP[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=limit, atol=limit / 4)


def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """In float64, of as many rows of w at a time as there is memory for."""
    parts = [x.double() @ rows.double().T for rows in w.split(16384)]
    return torch.cat(parts, dim=1)


def check(x: torch.Tensor, w: torch.Tensor, plan: Plan, bias: torch.Tensor | None = None) -> None:
    """All epilogues."""
    dtype, rows, n = x.dtype, len(x), len(w)
    wanted = exact(x, w) + (0 if bias is None else bias.double())
    out = torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)
    cuda_stream.product(x, w, bias, out, plan, epilogue=STORE)
    close(out, wanted, dtype)

    residual = made(rows, n, dtype=dtype, seed=2)
    added = residual.double() + wanted
    cuda_stream.product(x, w, bias, residual, plan, epilogue=ADD)
    # The product is rounded before it is added, so that its size and not the sum's is the measure.
    atol = ULP[dtype] * float(wanted.abs().max())
    torch.testing.assert_close(residual.double(), added, rtol=ULP[dtype], atol=atol)

    gate, up = wanted.chunk(2, dim=1)
    gated = torch.full((rows, n // 2), float("nan"), device="cuda", dtype=dtype)
    cuda_stream.product(x, w, bias, gated, plan, epilogue=GATED)
    close(gated, torch.nn.functional.silu(gate) * up, dtype, 2)


def plans_of(rows: int, n: int, k: int) -> list[Plan]:
    """The two fastest, and one whose shares end in the middle of tiles."""
    offered = cuda_stream.plans(rows, n, k, pairs())
    row_tiles = -(-rows // offered[0].width)
    most = min(pairs() // row_tiles, -(-n // 256) * (k // 64))
    return [*offered[:2], Plan(offered[0].width, max(1, most - 1))]


@on_hopper
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_of_layers(n, k, rows) -> None:
    x, w = made(rows, k, dtype=torch.bfloat16), weight(n, k, torch.bfloat16)
    for plan in plans_of(rows, n, k):
        check(x, w, plan)


@on_hopper
@pytest.mark.parametrize("rows", [17, 100, 257, 512])
@pytest.mark.parametrize(("n", "k"), HEADS)
def test_products_of_heads(n, k, rows) -> None:
    x, w = made(rows, k, dtype=torch.bfloat16), weight(n, k, torch.bfloat16)
    out = x.new_empty(rows, n)
    cuda_stream.product(x, w, None, out, cuda_stream.plans(rows, n, k, pairs())[0])
    close(out, exact(x, w), torch.bfloat16)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 64, 128, 192, 256])
@pytest.mark.parametrize(
    ("n", "k", "shares"),
    [
        (64, 64, 1),  # less than a tile
        (256, 1024, 1),  # one tile whole
        (256, 1024, 16),  # in steps, all of which add up where there are units for all
        (256, 1024, 5),
        (320, 640, 3),  # the last tile is mostly empty
        (1024, 320, 7),  # a share has the end of a tile, and the begin of the next
        (1216, 576, 2),  # and whole tiles between
        (1024, 192, 12),
    ],
)
def test_cuts(n, k, shares, width, dtype) -> None:
    bias = made(n, dtype=dtype, seed=3)
    w = weight(n, k, dtype)
    for rows in (width - 15, width, min(512, 2 * width - 3)):
        x = made(rows, k, dtype=dtype)
        for _ in range(3):  # counts and stages are used again
            check(x, w, Plan(width, shares), bias)
    _, arrivals = cuda_stream._workspace(x.device)
    assert not arrivals.any()


@on_hopper
@pytest.mark.parametrize(("rows", "plan"), [(40, Plan(64, 5)), (300, Plan(192, 5))])
def test_nothing_beyond_the_ends_is_read_or_written(rows, plan) -> None:
    """NaN all around x and the weight and in the workspace; a fence behind the result."""
    n, k, dtype = 320, 192, torch.bfloat16
    nan = float("nan")
    wide = torch.full((rows + 300, 256), nan, device="cuda", dtype=dtype)
    tall = torch.full((n + 256, k), nan, device="cuda", dtype=dtype)
    wide[:rows, :k], tall[:n] = made(rows, k, dtype=dtype), weight(n, k, dtype)
    partials, _ = cuda_stream._workspace(wide.device)
    fenced = torch.full((rows * n + 4096,), 7.0, device="cuda", dtype=dtype)
    out = fenced[: rows * n].view(rows, n)
    partials.view(torch.float32).fill_(nan)
    torch.cuda.synchronize()
    cuda_stream.product(wide[:rows, :k], tall[:n], None, out, plan)
    close(out, exact(wide[:rows, :k], tall[:n]), dtype)
    assert bool((fenced[rows * n :] == 7.0).all())


@on_hopper
@pytest.mark.parametrize("rows", [32, 128, 256, 500])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (1024, 3072), (28672, 4096)])
def test_replays_give_the_same_bits_every_time(n, k, rows) -> None:
    """Of a graph in which each product begins before the one ahead has ended."""
    x, w = made(rows, k, dtype=torch.bfloat16), weight(n, k, torch.bfloat16)
    plans = plans_of(rows, n, k)
    outs = [x.new_empty(rows, n) for _ in plans]

    def products() -> None:
        for plan, out in zip(plans, outs, strict=True):
            cuda_stream.product(x, w, None, out, plan)

    products()
    torch.cuda.synchronize()
    first = [out.clone() for out in outs]
    close(first[0], exact(x, w), torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    same = torch.ones((), device="cuda", dtype=torch.bool)
    for _ in range(200):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for out, wanted in zip(outs, first, strict=True):
            same &= (out == wanted).all()
    assert bool(same)


@on_hopper
def test_x_that_the_kernel_before_writes_is_waited_for() -> None:
    """Products in a chain, each of what the one before gave, as in a step."""
    rows, size, dtype = 200, 1024, torch.bfloat16
    weights = [weight(size, size, dtype).roll(i, 0).contiguous() for i in range(4)]
    start = made(rows, size, dtype=dtype)
    torch.cuda.synchronize()
    for plan in (Plan(64, 4), Plan(128, 33), Plan(256, 33)):
        apart, x = start, start
        for w in itertools.chain.from_iterable([weights] * 5):
            out = torch.empty_like(start)
            cuda_stream.product(apart, w, None, out, plan)
            torch.cuda.synchronize()
            apart = out
        for w in itertools.chain.from_iterable([weights] * 5):
            out = torch.empty_like(start)
            cuda_stream.product(x, w, None, out, plan)
            x = out
        assert torch.equal(x, apart)


@on_hopper
def test_operations_take_what_the_search_chose(monkeypatch) -> None:
    monkeypatch.setattr(cuda_stream, "tried_rows", range(17, 513))
    ran: list[int] = []
    kernel = cuda_stream.product

    def noted(*args, epilogue=STORE) -> None:
        ran.append(epilogue)
        kernel(*args, epilogue=epilogue)

    monkeypatch.setattr(cuda_stream, "product", noted)
    rows, n, k, dtype = 100, 512, 256, torch.bfloat16
    x, w = made(rows, k, dtype=dtype), weight(n, k, dtype)
    wanted = exact(x, w)
    residual = made(rows, n, dtype=dtype, seed=2)
    added = residual.double() + wanted
    cuda_lt.keep(cuda_lt.size_of(x, w, None), cuda_stream.encoded(Plan(128, 5)))
    with ops.forced("cuda"):
        close(ops.linear(x, w), wanted, dtype)
        ops.linear_add(x, w, residual)
        gate, up = wanted.chunk(2, dim=1)
        close(ops.gated_linear(x, w, "silu"), torch.nn.functional.silu(gate) * up, dtype, 2)
        assert ran == [STORE, ADD, GATED]
        ops.gated_linear(x, w, "gelu")  # the gate by its own kernel
    assert ran == [STORE, ADD, GATED, STORE]
    atol = ULP[dtype] * float(wanted.abs().max())
    torch.testing.assert_close(residual.double(), added, rtol=ULP[dtype], atol=atol)


@on_hopper
def test_the_search_tries_it(monkeypatch) -> None:
    monkeypatch.setattr(cuda_stream, "tried_rows", range(17, 513))
    tried = []
    run = cuda_lt.run

    def noted(x, w, bias, out, algorithm, **named):
        tried.append(cuda_stream.plan_of(algorithm))
        return run(x, w, bias, out, algorithm, **named)

    monkeypatch.setattr(cuda_lt, "run", noted)
    each = [(weight(4096, 1024, torch.bfloat16), None) for _ in range(3)]
    assert cuda_tune.tune_products(each, [64, 256, 1024]) == 3
    assert {plan.width for plan in tried if plan is not None} <= {32, 64, 128, 192, 256}
    assert any(plan is not None for plan in tried)
