"""Mixtures of experts on any device: each token's experts against brute force, what is refused."""

import dataclasses

import pytest
import torch

from octavo_kernels import ops


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts_of(count: int, hidden: int, inner: int, *, bias: bool, **rest) -> ops.Experts:
    return ops.Experts(
        gate_up=normal(count * 2 * inner, hidden, seed=1),
        down=normal(count * hidden, inner, seed=2),
        gate_up_bias=normal(count * 2 * inner, seed=3) if bias else None,
        down_bias=normal(count * hidden, seed=4) if bias else None,
        **rest,
    )


def brute_force(x: torch.Tensor, logits: torch.Tensor, experts: ops.Experts) -> torch.Tensor:
    """Token by token, in float64 and from the definition."""
    (_, hidden), count, inner = x.shape, logits.shape[1], experts.down.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, (token, row) in enumerate(zip(x.double(), logits.double(), strict=True)):
        chosen = sorted(range(count), key=lambda e: (-float(row[e]), e))[: experts.top_k]
        shares = row.softmax(0)[chosen]
        shares = shares / shares.sum() if experts.normalized else shares
        for share, e in zip(shares, chosen, strict=True):
            up_rows = slice(e * 2 * inner, (e + 1) * 2 * inner)
            down_rows = slice(e * hidden, (e + 1) * hidden)
            both = experts.gate_up[up_rows].double() @ token
            if experts.gate_up_bias is not None:
                both = both + experts.gate_up_bias[up_rows].double()
            gate, up = both[:inner], both[inner:]
            if experts.swiglu_limit:
                gate = gate.clamp(max=experts.swiglu_limit)
                up = up.clamp(-experts.swiglu_limit, experts.swiglu_limit) + 1
                gate = gate * torch.sigmoid(experts.swiglu_alpha * gate)
            else:
                gate = torch.nn.functional.silu(gate)
            result = experts.down[down_rows].double() @ (gate * up)
            if experts.down_bias is not None:
                result = result + experts.down_bias[down_rows].double()
            out[t] += share * result
    return out


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("limit", [0.0, 1.5])
def test_mixture(limit, bias, normalized) -> None:
    experts = experts_of(
        6, 8, 16, bias=bias, top_k=3, normalized=normalized, swiglu_alpha=1.7, swiglu_limit=limit
    )
    x, logits = normal(9, 8, seed=5), normal(9, 6, seed=6)
    wanted = brute_force(x, logits, experts)
    torch.testing.assert_close(
        ops.mixture(x, logits, experts).double(), wanted, rtol=1e-4, atol=1e-4
    )


def test_what_does_not_fit_is_refused_by_name() -> None:
    experts = experts_of(6, 8, 16, bias=False, top_k=3, normalized=True)
    x, logits = normal(9, 8), normal(9, 6)
    with pytest.raises(ValueError, match=r"mixture: experts\*2\*inner is 192, but 5 x 32"):
        ops.mixture(x, logits[:, :5].contiguous(), experts)
    with pytest.raises(ValueError, match="top_k is 7; there are 6 experts"):
        ops.mixture(x, logits, dataclasses.replace(experts, top_k=7))
    with pytest.raises(ValueError, match="logits has tokens=8"):
        ops.mixture(x, logits[:8], experts)
