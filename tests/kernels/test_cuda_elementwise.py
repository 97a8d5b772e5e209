"""Norms, activations, embedding, heads and block copies on a GPU: against the reference.

The reference runs on the same device. Where only copies and single products are made the bits are
equal; where a row is summed, its order differs, and a result may be one rounding away.
"""

import pytest
import torch
from gpu import needs_gpu

from octavo_kernels import ops

pytestmark = needs_gpu

DTYPES = [torch.bfloat16, torch.float16]
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
# One lane, less than a warp, odd numbers of warps, all registers of a block, two packs a thread.
WIDTHS = [8, 72, 256, 1000, 1024, 4096, 5120, 8192, 8200, 12288, 16384]
ROWS = [1, 3, 129]
HEADS = [(4, 2), (7, 1), (32, 8)]


@pytest.fixture(autouse=True)
def kernels_ran():
    """Whatever a test calls runs on our kernels or fails, unless it asks for the reference."""
    ops.calls.clear()
    with ops.forced("cuda"):
        yield
    assert any(ran == "cuda" for _, ran in ops.calls)


def normal(*shape: int, dtype=torch.bfloat16, seed=0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    made = torch.randn(shape, generator=generator, device="cuda").to(dtype)
    torch.cuda.synchronize()  # weights are read ahead of the stream
    return made


def one_rounding(got: torch.Tensor, wanted: torch.Tensor, share: float = 0.02) -> None:
    """Every element is at most one rounding away, before the weight or after it, and few are."""
    torch.testing.assert_close(got, wanted, rtol=2 * ULP[got.dtype], atol=1e-6)
    assert (got != wanted).float().mean() <= share + 1 / got.numel()


def reference(op, *args, **named):
    with ops.forced("reference"):
        return op(*args, **named)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows, width, dtype) -> None:
    x, weight = normal(rows, width, dtype=dtype), normal(width, dtype=dtype, seed=1)
    for offset in (0.0, 1.0):
        wanted = reference(ops.rms_norm, x, weight, 1e-5, offset=offset)
        one_rounding(ops.rms_norm(x, weight, 1e-5, offset=offset), wanted)
        mine, theirs = (normal(rows, width, dtype=dtype, seed=2) for _ in range(2))
        got = ops.rms_norm(x, weight, 1e-5, mine, offset=offset)
        one_rounding(got, reference(ops.rms_norm, x, weight, 1e-5, theirs, offset=offset))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm(with_bias, width, dtype) -> None:
    x, weight = normal(5, width, dtype=dtype) + 3, normal(width, dtype=dtype, seed=1)
    bias = normal(width, dtype=dtype, seed=2) if with_bias else None
    mine, theirs = (normal(5, width, dtype=dtype, seed=3) for _ in range(2))
    got = ops.layer_norm(x, weight, bias, 1e-5, mine)
    assert torch.equal(mine, reference(torch.add, theirs, x))
    wide = [None if t is None else t.double() for t in (mine, weight, bias)]
    wanted = torch.nn.functional.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-5)
    limit = ULP[dtype] / 2
    torch.testing.assert_close(got.double(), wanted, rtol=1.01 * limit, atol=limit / 50)


def test_a_row_keeps_its_bits_among_others() -> None:
    x, weight = normal(300, 4096), normal(4096, seed=1)
    normed, layered = ops.rms_norm(x, weight, 1e-5), ops.layer_norm(x, weight, None, 1e-5)
    for row in (0, 131, 299):
        one = x[row : row + 1].clone()
        assert torch.equal(ops.rms_norm(one, weight, 1e-5)[0], normed[row])
        assert torch.equal(ops.layer_norm(one, weight, None, 1e-5)[0], layered[row])


def test_nan_stays_in_its_row() -> None:
    x = normal(4, 4096)
    x[1, 77] = float("nan")
    got = ops.rms_norm(x, normal(4096, seed=1), 1e-5)
    assert got[1].isnan().all()
    assert not got[[0, 2, 3]].isnan().any()
    assert torch.equal(ops.rms_norm(x[:0], normal(4096), 1e-5), x[:0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("width", [8, 136, 3072, 14336])
def test_activations(width, function, dtype) -> None:
    x = normal(5, 2 * width, dtype=dtype) * 4
    x[0, :8] = torch.tensor([-1e4, -90.0, -20.0, -0.0, 1e-7, 20.0, 90.0, float("nan")])
    for op in (ops.act, ops.act_and_mul):
        got, wanted = op(x, function), reference(op, x, function)
        torch.testing.assert_close(got, wanted, rtol=ULP[dtype], atol=2e-6, equal_nan=True)
        assert (got != wanted).float().mean() <= 0.05 + 2 / got.numel()


def test_more_rows_than_a_grid_has() -> None:
    x = normal(70_000, 16)
    assert torch.equal(ops.act(x, "relu"), x.relu())
    ids = torch.arange(70_000, device="cuda").flip(0)
    assert torch.equal(ops.embed(ids, x), x.flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (96, 96), (128, 128), (256, 64)])
def test_rope_has_the_references_bits(dim, rotary, interleaved, dtype) -> None:
    mine, theirs = (normal(9, 8 * dim, dtype=dtype) for _ in range(2))
    positions = torch.tensor([3, 0, 99, 99, 1, 7, 50, 2, 98], device="cuda")
    table = normal(100, rotary, dtype=torch.float32, seed=3)

    def turn(qkv: torch.Tensor) -> None:
        query, key = qkv[:, : 5 * dim].view(9, 5, dim), qkv[:, 5 * dim : 7 * dim].view(9, 2, dim)
        ops.rope(query, key, positions, table, interleaved=interleaved)

    turn(mine)
    reference(turn, theirs)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, normal(9, 8 * dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rotary", "interleaved"), [(0, False), (32, False), (64, True)])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_heads_on_their_way_to_attention(
    heads, kv_heads, dim, rotary, interleaved, normed, dtype
) -> None:
    tokens = 11
    qkv = normal(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    norm = rotation = None
    if normed:
        weights = normal(dim, dtype=dtype, seed=1), normal(dim, dtype=dtype, seed=2)
        norm = ops.HeadNorm(*weights, 1e-6, offset=1.0 if heads == 7 else 0.0)
    if rotary:
        positions = torch.randint(0, 60, (tokens,), device="cuda")
        angle = normal(60, rotary // 2, dtype=torch.float32, seed=3)
        table = torch.cat((angle.cos(), angle.sin()), dim=1)
        rotation = ops.Rotation(positions, table, interleaved)
    slots = torch.tensor([17, -1, 0, 63, 5, -1, 6, 31, 32, 1, 40], device="cuda")
    caches = [torch.full((4, 16, kv_heads, dim), 9.0, dtype=dtype, device="cuda") for _ in range(4)]
    query = ops.qk_norm_rope_write(qkv, caches[0], caches[1], slots, norm, rotation)
    copy = normal(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    wanted = reference(ops.qk_norm_rope_write, copy, caches[2], caches[3], slots, norm, rotation)
    assert ops.calls["qk_norm_rope_write", "cuda"] == 1
    assert torch.equal(caches[1], caches[3])
    assert int((caches[0] == 9.0).all(-1).all(-1).sum()) == 64 - 9
    if normed:  # the sum of a head's squares has another order
        limit = 4 * ULP[dtype]  # of what was turned, which may nearly cancel
        torch.testing.assert_close(query, wanted, rtol=limit, atol=limit)
        torch.testing.assert_close(caches[0], caches[2], rtol=limit, atol=limit)
        assert (query != wanted).float().mean() < 0.02
    else:
        assert torch.equal(query, wanted)
        assert torch.equal(caches[0], caches[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 80, 256])
def test_write_kv(dim, dtype) -> None:
    qkv = normal(6, 5 * dim, dtype=dtype)
    key, value = qkv[:, dim : 3 * dim].view(6, 2, dim), qkv[:, 3 * dim :].view(6, 2, dim)
    slots = torch.tensor([5, -1, 0, 11, -1, 6], device="cuda")
    caches = [torch.full((3, 4, 2, dim), 9.0, dtype=dtype, device="cuda") for _ in range(4)]
    ops.write_kv(key, value, caches[0], caches[1], slots)
    reference(ops.write_kv, key, value, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 45.254833995939045])
def test_embed(scale, dtype) -> None:
    table, position_table = normal(1000, 1032, dtype=dtype), normal(50, 1032, dtype=dtype, seed=1)
    ids = torch.tensor([0, 999, 7, 7, -1, -2, 500], device="cuda")
    positions = torch.tensor([0, 49, 3, 4, 5, 6, 7], device="cuda")
    for named in ({}, {"positions": positions, "position_table": position_table}):
        got = ops.embed(ids, table, scale=scale, **named)
        assert torch.equal(got, reference(ops.embed, ids, table, scale=scale, **named))
    assert not ops.embed(ids, table)[4:6].any()


def test_copy_blocks_keeps_the_order_of_the_pairs() -> None:
    mine, theirs = (normal(6, 9, 16, 2, 64) for _ in range(2))
    pairs = torch.tensor([[0, 3], [3, 1], [2, 2], [4, 0], [1, 8], [8, 7]], device="cuda")
    ops.copy_blocks(mine, pairs)
    reference(ops.copy_blocks, theirs, pairs)
    assert torch.equal(mine, theirs)
    assert torch.equal(mine[:, 7], normal(6, 9, 16, 2, 64)[:, 0])
    ops.copy_blocks(mine, pairs[:0])


@pytest.mark.parametrize("planes", [2, 64])
def test_blocks_leave_for_host_memory_and_come_back(planes) -> None:
    cache = normal(planes, 9, 16, 8, 128)
    before = cache.clone()
    host = torch.zeros(7, planes, 16, 8, 128, dtype=torch.bfloat16).pin_memory()
    ops.swap_blocks(cache, host, torch.tensor([[8, 0], [3, 6]], device="cuda"), "out")
    torch.cuda.synchronize()
    assert torch.equal(host[0].cuda(), before[:, 8])
    assert torch.equal(host[6].cuda(), before[:, 3])
    assert not host[1:6].any()
    ops.swap_blocks(cache, host, torch.tensor([[6, 0], [0, 1]], device="cuda"), "in")
    assert torch.equal(cache[:, 0], before[:, 3])
    assert torch.equal(cache[:, 1], before[:, 8])
    assert torch.equal(cache[:, 2:], before[:, 2:])


def test_shapes_without_a_kernel_run_on_torch_and_are_counted() -> None:
    x, weight = normal(3, 20), normal(20, seed=1)
    with pytest.raises(NotImplementedError, match="a multiple of 8 elements"):
        ops.rms_norm(x, weight, 1e-5)
    ops.act(normal(1, 8), "relu")
    from octavo_kernels import dispatch

    dispatch._forced = None  # as in production: the reference serves what the kernel does not
    got = ops.rms_norm(x, weight, 1e-5)
    assert ops.calls["rms_norm", "reference"] == 1
    assert torch.equal(got, reference(ops.rms_norm, x, weight, 1e-5))


class Chain:
    """Small kernels that each need what the one before has written, many times over."""

    def __init__(self, rows: int) -> None:
        self.x = normal(rows, 3 * 1024)
        self.weight = normal(1024, seed=1)
        self.head_norm = ops.HeadNorm(normal(128, seed=2), normal(128, seed=3), 1e-6)
        self.slots = torch.arange(rows, device="cuda")
        self.rotation = ops.Rotation(self.slots, normal(rows, 128, dtype=torch.float32, seed=4))
        self.cache = torch.zeros(2, rows, 1, 8, 128, dtype=torch.bfloat16, device="cuda")

    def run(self) -> torch.Tensor:
        qkv, residual = self.x.clone(), torch.zeros_like(self.x[:, :1024])
        for _ in range(40):
            ops.qk_norm_rope_write(
                qkv, self.cache[0], self.cache[1], self.slots, self.head_norm, self.rotation
            )
            keys = self.cache[0].view(len(qkv), 1024)
            normed = ops.rms_norm(keys, self.weight, 1e-5, residual)
            qkv = torch.cat((ops.act(normed, "silu"), normed, residual), dim=1)
        return torch.cat((qkv, self.cache.view(len(qkv), -1)), dim=1)


@pytest.mark.parametrize("rows", [1, 300])
def test_overlapping_kernels_wait_for_each_other(rows) -> None:
    """Also within a graph, whose replays read new inputs."""
    from octavo_kernels import _cuda

    chain = Chain(rows)
    _cuda.set_overlap(False)
    try:
        alone = chain.run()
        torch.cuda.synchronize()
    finally:
        _cuda.set_overlap(True)
    for _ in range(5):
        assert torch.equal(chain.run(), alone)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain.run()
    for seed in (0, 5, 6):
        chain.x.copy_(normal(rows, 3 * 1024, seed=seed))
        graph.replay()
        assert torch.equal(captured, chain.run())


def test_the_device_is_one_of_ours() -> None:
    from octavo_kernels import cuda

    report = cuda.device_report()
    assert report["capability"] >= 80
    assert report["multiprocessors"] == torch.cuda.get_device_properties(0).multi_processor_count
    assert report["binary_version"] == report["capability"] or report["capability"] != 90
    with pytest.raises(RuntimeError, match="there is no CUDA device 99"):
        cuda.device_report(99)
    ops.act(normal(1, 8), "relu")
