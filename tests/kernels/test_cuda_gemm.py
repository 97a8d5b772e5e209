"""Products of few rows on a GPU against float64, and what must not move their bits."""

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops

pytestmark = needs_gpu_kernels

DTYPES = [torch.bfloat16, torch.float16]
# One rounding of the result, and for the fused ones of what lies between.
ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROWS = [1, 2, 3, 7, 8, 9, 15, 16]
# [n, k]: less than a group of rows, of columns, of a stage; odd ends; more groups than a pass;
# a ring that goes round.
SHAPES = [
    (1, 8), (7, 24), (8, 32), (9, 40), (100, 1000), (1024, 1024), (1030, 1032), (264, 2048),
    (4096, 896), (1024, 3072), (512, 14336), (20000, 1024),
]  # fmt: skip


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


def weight(n: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    made = normal(n, k, dtype=dtype, seed=seed, scale=k**-0.5)
    torch.cuda.synchronize()  # products read weights ahead of the stream
    return made


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    limit = roundings * ULP[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=limit, atol=limit / 4)


def normed(x: torch.Tensor, norm: ops.Norm) -> torch.Tensor:
    with ops.forced("reference"):
        return ops.rms_norm(x, norm.weight, norm.eps, offset=norm.offset)


@pytest.fixture(autouse=True)
def kernel_ran():
    """Each test counts: what it called ran on the GPU, in one kernel."""
    ops.calls.clear()
    with ops.forced("cuda"):
        yield
    assert ops.calls
    assert not [call for call in ops.calls if call[1] == "composed"], ops.calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n, k, rows, dtype) -> None:
    x, w, bias = normal(rows, k, dtype=dtype), weight(n, k, dtype), normal(n, dtype=dtype, seed=2)
    exact = x.double() @ w.double().T
    close(ops.linear(x, w), exact, dtype)
    close(ops.linear(x, w, bias), exact + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 16384), (2, 8192), (3, 4096), (7, 2000), (16, 1024)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_linear_with_norm(rows, k, offset, dtype) -> None:
    x, w = normal(rows, k, dtype=dtype, scale=3), weight(300, k, dtype)
    norm = ops.Norm(normal(k, dtype=dtype, seed=3), 1e-5, offset)
    close(ops.linear(x, w, norm=norm), normed(x, norm).double() @ w.double().T, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("rows", "inner", "k"), [(1, 3072, 1024), (5, 12, 64), (16, 1001, 512)])
def test_gated_linear(rows, inner, k, function, dtype) -> None:
    x, w = normal(rows, k, dtype=dtype), weight(2 * inner, k, dtype)
    bias, norm = (
        normal(2 * inner, dtype=dtype, seed=2),
        ops.Norm(normal(k, dtype=dtype, seed=3), 1e-6),
    )
    for bias_or_none, norm_or_none in ((None, None), (bias, norm)):
        source = x if norm_or_none is None else normed(x, norm)
        product = source.double() @ w.double().T
        product = product if bias_or_none is None else product + bias.double()
        with ops.forced("reference"):
            wanted = ops.act_and_mul(product, function)
        got = ops.gated_linear(x, w, function, bias_or_none, norm_or_none)
        close(got, wanted, dtype, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1024, 2048), (4, 4096, 512), (16, 17, 3072)])
def test_linear_add(rows, n, k, dtype) -> None:
    x, w = normal(rows, k, dtype=dtype), weight(n, k, dtype)
    residual = normal(rows, n, dtype=dtype, seed=2)
    product = x.double() @ w.double().T
    wanted = residual.double() + product
    ops.linear_add(x, w, residual)
    # The product is rounded before it is added, so that its size and not the sum's is the measure.
    limit = ULP[dtype]
    scale = float(product.abs().max())
    torch.testing.assert_close(residual.double(), wanted, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_a_ring_that_goes_round_gives_the_same_bits_every_time(rows, dtype) -> None:
    """A stage must not be filled again while it is read."""
    x, w = normal(rows, 14336, dtype=dtype), weight(4096, 14336, dtype)
    first = ops.linear(x, w)
    for _ in range(100):
        x.double() @ w[:64].double().T  # another kernel before, which changes the timing
        assert torch.equal(ops.linear(x, w), first)


@pytest.mark.parametrize("n", [1, 7, 1024, 5000])
def test_what_is_brought_nearer_changes_nothing(n) -> None:
    x, w = normal(2, 1024, dtype=torch.bfloat16), weight(1024, 1024, torch.bfloat16)
    ahead = weight(n, 1032, torch.bfloat16, seed=7)
    before = ahead.clone()
    residual = normal(2, 1024, dtype=torch.bfloat16, seed=8)
    wanted = residual.clone()
    assert torch.equal(ops.linear(x, w, ahead=ahead), ops.linear(x, w))
    assert torch.equal(ops.gated_linear(x, w, "silu", ahead=ahead), ops.gated_linear(x, w, "silu"))
    ops.linear_add(x, w, residual, ahead=ahead)
    ops.linear_add(x, w, wanted)
    assert torch.equal(residual, wanted)
    assert torch.equal(ahead, before)


@pytest.mark.parametrize("rows", [1, 9])
def test_however_many_lanes_give_a_stage_back_the_bits_are_the_same(rows) -> None:
    from octavo_kernels import _cuda

    x, w = normal(rows, 14336, dtype=torch.bfloat16), weight(512, 14336, torch.bfloat16)
    found = {}
    for lanes in (32, 1):
        _cuda.set_releasing_lanes(lanes)
        found[lanes] = ops.linear(x, w)
    assert torch.equal(found[32], found[1])


def test_x_may_be_columns_of_something_wider() -> None:
    wide, w = normal(5, 4096, dtype=torch.bfloat16), weight(64, 1024, torch.bfloat16)
    x = wide[:, 1024:2048]
    assert torch.equal(ops.linear(x, w), ops.linear(x.contiguous(), w))


def test_nothing_beyond_the_ends_is_read_or_written() -> None:
    """NaN all around x and the weight; a fence behind the result."""
    rows, n, k = 3, 13, 40
    wide = torch.full((rows, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    tall = torch.full((n + 8, k), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[:, :k] = normal(rows, k, dtype=torch.bfloat16)
    tall[:n] = weight(n, k, torch.bfloat16)
    fenced = torch.full((rows * n + 64,), 7.0, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    out = fenced[: rows * n].view(rows, n)
    out.zero_()
    ops.linear_add(wide[:, :k], tall[:n], out)
    close(out, wide[:, :k].double() @ tall[:n].double().T, torch.bfloat16)
    assert bool((fenced[rows * n :] == 7.0).all())


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (100, 1000), (256, 14336)])
def test_a_rows_bits_do_not_depend_on_the_others(n, k) -> None:
    x, w = normal(16, k, dtype=torch.bfloat16), weight(n, k, torch.bfloat16)
    full = ops.linear(x, w)
    for rows in (1, 2, 8, 9, 15):
        assert torch.equal(ops.linear(x[:rows], w), full[:rows])
    residual = torch.zeros_like(full)
    ops.linear_add(x, w, residual)
    assert torch.equal(residual, full)


def test_a_chain_of_dependent_products_in_a_graph() -> None:
    """Kernels overlap; each must see what the one before wrote, replay after replay."""
    weights = [weight(1024, 1024, torch.bfloat16, seed=s) for s in range(12)]
    norm = ops.Norm(normal(1024, dtype=torch.bfloat16, seed=99), 1e-6)
    start = normal(2, 1024, dtype=torch.bfloat16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for w in weights:
            inner = ops.linear(x, w, norm=norm)
            ops.linear_add(inner, w, x)
        return x

    wanted = chain(start.clone())
    torch.cuda.synchronize()
    x = start.clone()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chain(x.clone())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chain(x)
    for _ in range(20):
        x.copy_(start)
        graph.replay()
        assert torch.equal(x, wanted)
    assert wanted.isfinite().all()
