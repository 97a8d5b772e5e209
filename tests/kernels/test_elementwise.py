"""Norm, rotary positions, activation, cache writes and copies: native against reference."""

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS

from octavo_kernels import ops

pytestmark = pytest.mark.skipif(
    "cpu" not in ops.implementations(), reason="octavo_kernels._core is not built"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place of each type, relative.
ULP = {torch.float32: 4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
WIDTHS = [1, 3, 15, 16, 17, 64, 100, 256, 1000, 4096]


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request):
    with ops.forced_instruction_set(request.param):
        yield request.param


def normal(*shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    limit = ULP[got.dtype]
    torch.testing.assert_close(got, expected, rtol=2 * limit, atol=limit)


def reference(op, *args):
    with ops.forced("reference"):
        return op(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width, dtype) -> None:
    x, weight = normal(5, width, dtype=dtype), normal(width, dtype=dtype, seed=1)
    close(ops.rms_norm(x, weight, 1e-5), reference(ops.rms_norm, x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_adds_the_residual_in_place(width, dtype) -> None:
    x, weight = normal(5, width, dtype=dtype), normal(width, dtype=dtype, seed=1)
    mine, theirs = (normal(5, width, dtype=dtype, seed=2) for _ in range(2))
    out = ops.rms_norm(x, weight, 1e-5, mine)
    close(out, reference(ops.rms_norm, x, weight, 1e-5, theirs))
    assert torch.equal(mine, theirs)


def test_rms_norm_of_zeros_and_nan() -> None:
    weight = torch.ones(20)
    assert torch.equal(ops.rms_norm(torch.zeros(1, 20), weight, 1e-5), torch.zeros(1, 20))
    x = torch.zeros(2, 20)
    x[0, 3] = float("nan")
    got = ops.rms_norm(x, weight, 1e-5)
    assert got[0].isnan().all()
    assert not got[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 18, 64, 80, 128, 256])
def test_rope_turns_slices_of_a_fused_projection(dim, dtype) -> None:
    mine, theirs = (normal(7, 6 * dim, dtype=dtype) for _ in range(2))
    positions = torch.tensor([0, 1, 5, 5, 99, 42, 7])
    table = normal(100, dim, seed=3).clamp(-1, 1)

    def turn(qkv: torch.Tensor) -> None:
        query = qkv[:, : 3 * dim].view(7, 3, dim)
        key = qkv[:, 3 * dim : 5 * dim].view(7, 2, dim)
        ops.rope(query, key, positions, table)

    turn(mine)
    reference(turn, theirs)
    close(mine, theirs)
    untouched = normal(7, 6 * dim, dtype=dtype)
    assert torch.equal(mine[:, 5 * dim :], untouched[:, 5 * dim :])
    assert not torch.equal(mine[:, : 5 * dim], untouched[:, : 5 * dim])


def test_rope_refuses_a_position_beyond_the_table() -> None:
    query, key, table = normal(1, 1, 4), normal(1, 1, 4), normal(8, 4)
    for position in (8, -1):
        with pytest.raises(ValueError, match=rf"positions\[0\] is {position}; cos_sin has 8 rows"):
            ops.rope(query, key, torch.tensor([position]), table)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [2, 6, 32, 64])
def test_rope_turns_the_first_elements_of_a_head(rotary, interleaved, dtype) -> None:
    query, key = normal(5, 3, 64, dtype=dtype), normal(5, 2, 64, dtype=dtype, seed=1)
    mine, theirs = (query.clone(), key.clone()), (query.clone(), key.clone())
    positions, table = torch.tensor([3, 0, 9, 9, 1]), normal(10, rotary, seed=3)
    ops.rope(*mine, positions, table, interleaved=interleaved)
    with ops.forced("reference"):
        ops.rope(*theirs, positions, table, interleaved=interleaved)
    close(mine[0], theirs[0])
    close(mine[1], theirs[1])
    assert torch.equal(mine[0][..., rotary:], query[..., rotary:])
    assert not torch.equal(mine[0], query)


def test_interleaved_rope_is_multiplication_of_complex_numbers() -> None:
    x, positions, angle = normal(4, 2, 8), torch.arange(4), normal(4, 4)
    expected = torch.view_as_complex(x.view(4, 2, 4, 2)) * torch.polar(
        torch.ones(4, 1, 4), angle[:, None]
    )
    table = torch.cat((angle.cos(), angle.sin()), dim=1)
    query, key = x.clone(), x.clone()
    ops.rope(query, key, positions, table, interleaved=True)
    close(query, torch.view_as_real(expected).flatten(2))
    assert torch.equal(query, key)


def test_rope_refuses_a_table_wider_than_a_head() -> None:
    query, key = normal(1, 1, 4), normal(1, 1, 4)
    for width in (6, 3):
        with pytest.raises(ValueError, match=f"cos_sin turns {width} elements of a head"):
            ops.rope(query, key, torch.tensor([0]), normal(8, width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_with_an_offset(width, dtype) -> None:
    x, weight = normal(5, width, dtype=dtype), normal(width, dtype=dtype, seed=1)
    got = ops.rms_norm(x, weight, 1e-5, offset=1.0)
    with ops.forced("reference"):
        close(got, ops.rms_norm(x, weight, 1e-5, offset=1.0))
    if dtype == torch.float32:
        torch.testing.assert_close(got, ops.rms_norm(x, weight + 1, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width, dtype) -> None:
    x, weight = normal(5, width, dtype=dtype) + 3, normal(width, dtype=dtype, seed=1)
    for bias in (None, normal(width, dtype=dtype, seed=2)):
        mine, theirs = (normal(5, width, dtype=dtype, seed=3) for _ in range(2))
        limit = 4 * ULP[dtype] if width > 1 else 1e-2  # a row of one is all cancellation
        wanted = torch.nn.functional.layer_norm(x.float(), (width,), weight.float(), None, 1e-5)
        wanted = wanted if bias is None else wanted + bias.float()
        got = ops.layer_norm(x, weight, bias, 1e-5)
        torch.testing.assert_close(got, wanted.to(dtype), rtol=2 * limit, atol=2 * limit)
        ops.layer_norm(x, weight, bias, 1e-5, mine)
        reference(ops.layer_norm, x, weight, bias, 1e-5, theirs)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(width, function, dtype) -> None:
    x = normal(5, 2 * width, dtype=dtype) * 4
    limit = max(ULP[dtype], 2e-6)  # the tails of gelu are differences of nearly equal numbers
    for op in (ops.act, ops.act_and_mul):
        got, wanted = op(x, function), reference(op, x, function)
        torch.testing.assert_close(got, wanted, rtol=limit, atol=2 * limit)


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "relu"])
def test_activations_at_the_ends_of_the_range(function) -> None:
    x = torch.tensor([[-1e30, -200.0, -6.0, -0.0, 1e-7, 0.5, 88.0, 1e30, float("nan")]])
    got, wanted = ops.act(x, function), reference(ops.act, x, function)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_silu_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -0.0, 88.0, 200.0, 1e30]])
    got = ops.act_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1), "silu")
    torch.testing.assert_close(got, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types_round_like_torch(dtype) -> None:
    # silu of a large number is that number, so this is a pure conversion there and back.
    x = torch.cat((torch.linspace(20, 6e4, 5000), 2.0 ** torch.arange(5, 16))).to(dtype)
    ones = torch.ones_like(x)
    assert torch.equal(ops.act_and_mul(torch.stack((x, ones)).reshape(1, -1), "silu")[0], x)
    small = (normal(1, 4000) * 2.0**-16).to(dtype)  # subnormal where the type is float16
    scaled = ops.rms_norm(small, torch.full((4000,), 2.0**-14, dtype=dtype), 1.0)
    wanted = reference(ops.rms_norm, small, torch.full((4000,), 2.0**-14, dtype=dtype), 1.0)
    torch.testing.assert_close(scaled, wanted, rtol=1e-6, atol=6e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_skips_slot_minus_one_and_nothing_else(dtype) -> None:
    qkv = normal(6, 5 * 8, dtype=dtype)
    key, value = qkv[:, 8:24].view(6, 2, 8), qkv[:, 24:].view(6, 2, 8)
    slots = torch.tensor([5, -1, 0, 11, -1, 6])
    caches = [torch.full((3, 4, 2, 8), 9.0, dtype=dtype) for _ in range(4)]
    ops.write_kv(key, value, caches[0], caches[1], slots)
    reference(ops.write_kv, key, value, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])
    assert torch.equal(caches[0].flatten(0, 1)[5], key[0])
    assert int((caches[0].flatten(0, 1) == 9.0).all(-1).all(-1).sum()) == 12 - 4


@pytest.mark.parametrize("slot", [12, -2, 2**40])
def test_write_kv_refuses_a_stray_slot(slot) -> None:
    key, cache = normal(1, 2, 8), torch.zeros(3, 4, 2, 8)
    with pytest.raises(ValueError, match=rf"slots\[0\] is {slot}; the cache has 12 slots"):
        ops.write_kv(key, key, cache, cache.clone(), torch.tensor([slot]))
    assert not cache.any()


def test_copy_blocks_copies_every_plane_in_order() -> None:
    mine, theirs = (normal(6, 5, 4, 2, 8) for _ in range(2))
    pairs = torch.tensor([[0, 3], [3, 1], [2, 2], [4, 0]])
    ops.copy_blocks(mine, pairs)
    reference(ops.copy_blocks, theirs, pairs)
    assert torch.equal(mine, theirs)
    assert torch.equal(mine[:, 1], normal(6, 5, 4, 2, 8)[:, 0])


def test_copy_blocks_refuses_a_stray_block() -> None:
    cache = torch.zeros(2, 5, 4, 2, 8)
    with pytest.raises(ValueError, match=r"pairs\[1\] names block 5; the cache has 5"):
        ops.copy_blocks(cache, torch.tensor([[0, 1], [1, 5]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_batch_mates_or_threads(dtype) -> None:
    width, before = 1000, torch.get_num_threads()
    x, weight = normal(80, 2 * width, dtype=dtype), normal(2 * width, dtype=dtype, seed=1)
    try:
        torch.set_num_threads(3)
        normed, activated = ops.rms_norm(x, weight, 1e-5), ops.act_and_mul(x, "silu")
        torch.set_num_threads(1)
        for row in (0, 17, 79):
            one = x[row : row + 1].clone()
            assert torch.equal(ops.rms_norm(one, weight, 1e-5)[0], normed[row])
            assert torch.equal(ops.act_and_mul(one, "silu")[0], activated[row])
    finally:
        torch.set_num_threads(before)


def test_empty_batches_are_no_work() -> None:
    assert ops.rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert ops.act_and_mul(torch.zeros(0, 8), "silu").shape == (0, 4)
