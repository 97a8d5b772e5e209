"""That no product of half precision reaches the library where oracles must do without them."""

import pytest
import test_cuda_persistent as persistent
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wide_products import WideProducts

from octavo_kernels import ops

BF16 = torch.bfloat16


class Seen(TorchDispatchMode):
    """What the library is asked for: operations, each with its first tensor's type."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if tensors and "mm" in str(func):
            self.asked.add((str(func), tensors[0].dtype))
        return func(*args, **kwargs or {})


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(BF16)


def a_mixture() -> torch.Tensor:
    experts = ops.Experts(
        gate_up=normal(8 * 2 * 40, 72), down=normal(8 * 72, 40), gate_up_bias=normal(8 * 2 * 40),
        down_bias=normal(8 * 72), top_k=2, normalized=True, swiglu_limit=1.0, swiglu_alpha=1.7,
    )  # fmt: skip
    return ops.mixture(normal(5, 72), normal(5, 8), experts)


def layers() -> torch.Tensor:
    stack = persistent.Stack(device="cpu", kv_heads=1, dim=64, blocks=40)
    return persistent.Step(stack, [70, 0, 17]).wanted(stack.cache.clone())


@pytest.mark.parametrize("oracle", [a_mixture, layers])
def test_oracles_say_the_same_without_them(oracle) -> None:
    with ops.forced("reference"):
        with Seen() as usual:
            wanted = oracle()
        with Seen() as seen, WideProducts():
            got = oracle()
    assert BF16 in {dtype for _, dtype in usual.asked}
    assert torch.float64 in {dtype for _, dtype in seen.asked}
    assert BF16 not in {dtype for _, dtype in seen.asked}
    assert got.dtype == BF16
    assert (got.float() - wanted.float()).norm() <= 2**-7 * wanted.float().norm()


def test_none_slips_by() -> None:
    x, w = normal(3, 16), normal(10, 16)
    with WideProducts():
        assert torch.equal(x @ w.T, (x.double() @ w.double().T).to(BF16))
        with pytest.raises(NotImplementedError, match="half precision"):
            torch.mm(x, w.T, out=torch.empty(3, 10, dtype=BF16))
        with pytest.raises(NotImplementedError, match="half precision"):
            torch.zeros(3, 10, dtype=BF16).addmm_(x, w.T)


@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        lambda x, w: torch.nn.functional.linear(x, w.T),
        lambda x, w: torch.einsum("ij,jk->ik", x, w),
    ],
)
def test_none_slips_by_in_inference_mode(product) -> None:
    """What comes whole there is refused: let by, it would be the library's in half precision."""
    x, w = normal(3, 16), normal(16, 10)
    with WideProducts():
        assert product(x, w).dtype == BF16
        with torch.inference_mode(), pytest.raises(NotImplementedError, match="half precision"):
            product(x, w)
