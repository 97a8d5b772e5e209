"""Products with a weight matrix on any device: what the fused ones mean, what is refused."""

import pytest
import torch
from torch.nn.functional import linear

from octavo_kernels import ops


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, WEIGHT, BIAS = normal(3, 16), normal(10, 16, seed=1), normal(10, seed=2)
NORM = ops.Norm(normal(16, seed=3), 1e-5, 1.0)


def test_linear_is_torchs() -> None:
    assert torch.equal(ops.linear(X, WEIGHT), linear(X, WEIGHT))
    assert torch.equal(ops.linear(X, WEIGHT, BIAS), linear(X, WEIGHT, BIAS))


def test_linear_norms_its_input_first() -> None:
    normed = ops.rms_norm(X, NORM.weight, NORM.eps, offset=NORM.offset)
    assert torch.equal(ops.linear(X, WEIGHT, BIAS, NORM), linear(normed, WEIGHT, BIAS))


def test_gated_linear_joins_the_halves_of_a_product() -> None:
    wanted = ops.act_and_mul(ops.linear(X, WEIGHT, BIAS, NORM), "gelu_tanh")
    assert torch.equal(ops.gated_linear(X, WEIGHT, "gelu_tanh", BIAS, NORM), wanted)


def test_linear_add_adds_in_place() -> None:
    residual = normal(3, 10, seed=4)
    wanted = residual + linear(X, WEIGHT, BIAS)
    ops.linear_add(X, WEIGHT, residual, BIAS)
    assert torch.equal(residual, wanted)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"linear: weight has k=15 .* but x has k=16"):
        ops.linear(X, WEIGHT[:, :15].contiguous())
    with pytest.raises(ValueError, match=r"linear: norm.weight has k=8"):
        ops.linear(X, WEIGHT, norm=ops.Norm(NORM.weight[:8], 1e-5))
    with pytest.raises(ValueError, match=r"linear_add: residual has n=9"):
        ops.linear_add(X, WEIGHT, normal(3, 9))
    with pytest.raises(ValueError, match="gated_linear: weight has 9 rows"):
        ops.gated_linear(X, WEIGHT[:9], "silu")
