"""Mixtures of experts on a GPU: against float64, for any routing, in graphs, batch by batch."""

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops

pytestmark = needs_gpu_kernels

# [experts, top_k, hidden, inner]
SIZES = [
    (1, 1, 8, 8),
    (8, 2, 256, 512),
    (60, 4, 128, 88),
    (32, 4, 360, 360),
    (128, 8, 512, 192),
    (512, 32, 64, 40),
]


def normal(*shape: int, dtype=torch.bfloat16, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


def logits_of(tokens: int, count: int, dtype=torch.bfloat16, seed: int = 6) -> torch.Tensor:
    """Within about -4..4 and no two of a row equal, so that there is one right choice."""
    generator = torch.Generator("cuda").manual_seed(seed)
    ranks = torch.rand((tokens, count), generator=generator, device="cuda").argsort(dim=-1)
    return ((ranks - count // 2) * 2.0 ** (4 - count.bit_length())).to(dtype)


def experts_of(count, top_k, hidden, inner, dtype=torch.bfloat16, *, bias=False, **rest):
    return ops.Experts(
        gate_up=normal(count * 2 * inner, hidden, dtype=dtype, seed=1, scale=hidden**-0.5),
        down=normal(count * hidden, inner, dtype=dtype, seed=2, scale=inner**-0.5),
        gate_up_bias=normal(count * 2 * inner, dtype=dtype, seed=3) if bias else None,
        down_bias=normal(count * hidden, dtype=dtype, seed=4) if bias else None,
        top_k=top_k,
        **{"normalized": True, **rest},
    )


def exact(x: torch.Tensor, logits: torch.Tensor, experts: ops.Experts) -> torch.Tensor:
    """In float64, all experts for all tokens, those not chosen by a weight of zero."""
    (tokens, hidden), count = x.shape, logits.shape[1]
    shares = logits.double().softmax(-1)
    top = shares.topk(experts.top_k, dim=-1)
    kept = torch.zeros_like(shares).scatter(1, top.indices, top.values)
    kept = kept / kept.sum(-1, keepdim=True) if experts.normalized else kept
    out = torch.zeros(tokens, hidden, dtype=torch.float64, device="cuda")
    for e in range(count):
        both = x.double() @ experts.gate_up.view(count, -1, hidden)[e].double().T
        if experts.gate_up_bias is not None:
            both = both + experts.gate_up_bias.view(count, -1)[e].double()
        gate, up = both.chunk(2, dim=-1)
        if experts.swiglu_limit:
            gate = gate.clamp(max=experts.swiglu_limit)
            up = up.clamp(-experts.swiglu_limit, experts.swiglu_limit) + 1
            inner = gate * torch.sigmoid(experts.swiglu_alpha * gate) * up
        else:
            inner = torch.nn.functional.silu(gate) * up
        result = inner @ experts.down.view(count, hidden, -1)[e].double().T
        if experts.down_bias is not None:
            result = result + experts.down_bias.view(count, -1)[e].double()
        out += kept[:, e, None] * result
    return out


def check(x: torch.Tensor, logits: torch.Tensor, experts: ops.Experts) -> None:
    """No further from the truth than one expert after the other in torch, or little."""
    with ops.forced("cuda"):
        got = ops.mixture(x, logits, experts).double()
    with ops.forced("reference"):
        torchs = ops.mixture(x, logits, experts).double()
    wanted = exact(x, logits, experts)
    assert got.isfinite().all()
    assert (got - wanted).norm() <= 1.5 * (torchs - wanted).norm() + 1e-5 * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 64, 300])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mixture(size, tokens) -> None:
    x = normal(tokens, size[2], seed=5)
    check(x, logits_of(tokens, size[0]), experts_of(*size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("normalized", [False, True])
def test_variants(normalized, limit, dtype) -> None:
    experts = experts_of(
        16,
        4,
        136,
        72,
        dtype,
        bias=True,
        normalized=normalized,
        swiglu_alpha=1.7,
        swiglu_limit=limit,
    )
    for tokens in (3, 200):
        x, logits = (
            normal(tokens, 136, dtype=dtype, seed=5),
            logits_of(tokens, 16, dtype),
        )
        check(x, logits, experts)


def test_all_tokens_to_the_same_experts() -> None:
    """The fullest tiles there can be, and experts with none."""
    for tokens in (40, 500):
        logits = logits_of(1, 64).expand(tokens, -1).contiguous()
        check(normal(tokens, 128, seed=5), logits, experts_of(64, 2, 128, 64))


def test_equal_logits_go_to_the_first_experts() -> None:
    experts = experts_of(40, 3, 64, 64)
    x, logits = normal(5, 64, seed=5), torch.zeros(5, 40, device="cuda", dtype=torch.bfloat16)
    ahead = logits.clone()
    ahead[:, :3] = 1
    got, wanted = (ops.mixture(x, of, experts) for of in (logits, ahead))
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-3)


def test_a_token_of_nan_harms_no_other() -> None:
    experts = experts_of(40, 3, 64, 64)
    x, logits = normal(20, 64, seed=5), logits_of(20, 40)
    before = ops.mixture(x, logits, experts)
    x[7], logits[7] = float("nan"), float("nan")
    after = ops.mixture(x, logits, experts)
    others = [t for t in range(20) if t != 7]
    assert torch.equal(after[others], before[others])
    assert after[7].isnan().all()


def test_a_tokens_bits_do_not_depend_on_the_others() -> None:
    experts = experts_of(32, 4, 256, 128)
    x, logits = normal(600, 256, seed=5), logits_of(600, 32)
    full = ops.mixture(x, logits, experts)
    for tokens in (1, 3, 100, 127, 129):
        assert torch.equal(ops.mixture(x[:tokens], logits[:tokens], experts), full[:tokens])


def test_a_graph_follows_new_routing() -> None:
    experts = experts_of(64, 4, 128, 64)
    x, logits = normal(12, 128), logits_of(12, 64)
    ops.mixture(x, logits, experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mixture(x, logits, experts)
    for seed in range(5):
        x.copy_(normal(12, 128, seed=seed + 10))
        logits.copy_(logits_of(12, 64, seed=seed + 20))
        graph.replay()
        assert torch.equal(out, ops.mixture(x, logits, experts))


def test_sizes_without_a_kernel_take_the_reference(caplog) -> None:
    experts = experts_of(4, 2, 20, 12)
    x, logits = normal(5, 20), logits_of(5, 4)
    assert ops.mixture(x, logits, experts).shape == (5, 20)
    assert "sizes that are multiples of 8" in caplog.text
