"""Queries, keys and values on their way to attention; embedding and swaps: what they mean."""

import pytest
import torch

from octavo_kernels import ops

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 5


def normal(*shape: int, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ops.implementations(), autouse=True)
def back_end(request):
    with ops.forced(request.param):
        yield request.param


def one_by_one(qkv, norm, rotation) -> torch.Tensor:
    """Every head by itself, in complex numbers."""
    out = qkv.view(TOKENS, HEADS + 2 * KV_HEADS, DIM).clone()
    for token in range(TOKENS):
        for head in range(HEADS + KV_HEADS):
            x = out[token, head].clone()
            if norm is not None:
                weight = norm.query if head < HEADS else norm.key
                x = x / (x.square().mean() + norm.eps).sqrt() * (norm.offset + weight)
            if rotation is not None:
                cos, sin = rotation.cos_sin[rotation.positions[token]].chunk(2)
                n = len(cos)
                at = torch.arange(n)
                low, high = (2 * at, 2 * at + 1) if rotation.interleaved else (at, at + n)
                turned = torch.complex(x[low], x[high]) * torch.complex(cos, sin)
                x[low], x[high] = turned.real, turned.imag
            out[token, head] = x
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 6, DIM])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_each_head_is_normed_turned_and_stored(offset, rotary, interleaved) -> None:
    qkv = normal(TOKENS, (HEADS + 2 * KV_HEADS) * DIM)
    norm = rotation = None
    if offset is not None:
        norm = ops.HeadNorm(normal(DIM, seed=1), normal(DIM, seed=2), 1e-6, offset)
    if rotary:
        table = normal(9, rotary, seed=3)
        rotation = ops.Rotation(torch.tensor([0, 8, 3, 3, 1]), table, interleaved)
    wanted = one_by_one(qkv, norm, rotation)
    slots = torch.tensor([7, 0, -1, 3, 11])
    caches = [torch.full((3, 4, KV_HEADS, DIM), 9.0) for _ in range(2)]
    query = ops.qk_norm_rope_write(qkv.clone(), *caches, slots, norm, rotation)
    torch.testing.assert_close(query, wanted[:, :HEADS], rtol=1e-5, atol=1e-5)
    kept = slots >= 0
    for cache, part in zip(caches, wanted[:, HEADS:].split(KV_HEADS, dim=1), strict=True):
        stored = cache.flatten(0, 1)
        torch.testing.assert_close(stored[slots[kept]], part[kept], rtol=1e-5, atol=1e-5)
        assert int((stored == 9.0).all(-1).all(-1).sum()) == 12 - 4


def test_a_row_that_is_no_queries_keys_and_values_is_refused() -> None:
    caches = [torch.zeros(3, 4, KV_HEADS, DIM) for _ in range(2)]
    for width in (2 * KV_HEADS * DIM, 5 * DIM + 1):
        with pytest.raises(ValueError, match=f"rows of {width} elements, which are not queries"):
            ops.qk_norm_rope_write(normal(1, width), *caches, torch.zeros(1, dtype=torch.int64))
    rotation = ops.Rotation(torch.tensor([0]), normal(4, 18))
    with pytest.raises(ValueError, match="cos_sin turns 18 elements"):
        ops.qk_norm_rope_write(
            normal(1, 6 * DIM), *caches, torch.zeros(1, dtype=torch.int64), None, rotation
        )


def test_embed_scales_adds_positions_and_knows_no_token() -> None:
    table, position_table = normal(10, 8), normal(6, 8, seed=1)
    ids, positions = torch.tensor([3, -1, 9, 3]), torch.tensor([0, 5, 2, 1])
    scaled = ops.embed(ids, table, scale=2.0)
    assert torch.equal(scaled[[0, 2, 3]], 2 * table[[3, 9, 3]])
    assert not scaled[1].any()
    with_positions = ops.embed(ids, table, positions=positions, position_table=position_table)
    assert torch.equal(with_positions[3], table[3] + position_table[1])
    assert torch.equal(with_positions[1], position_table[5])


def test_blocks_leave_and_come_back_elsewhere() -> None:
    cache, host = normal(4, 5, 2, 2, 8), torch.zeros(3, 4, 2, 2, 8)
    before = cache.clone()
    ops.swap_blocks(cache, host, torch.tensor([[4, 0], [1, 2]]), "out")
    assert torch.equal(host[0], before[:, 4])
    assert torch.equal(host[2], before[:, 1])
    assert not host[1].any()
    ops.swap_blocks(cache, host, torch.tensor([[2, 3]]), "in")
    assert torch.equal(cache[:, 3], before[:, 1])
    assert torch.equal(cache[:, :3], before[:, :3])
    with pytest.raises(ValueError, match="host has planes=4"):
        ops.swap_blocks(cache[:2].clone(), host, torch.tensor([[0, 0]]), "out")
