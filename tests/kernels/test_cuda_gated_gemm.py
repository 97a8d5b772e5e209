"""Gated products of many rows in one kernel, against float64."""

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo_kernels import ops

if "cuda" not in ops.implementations("cuda"):
    pytest.skip("octavo_kernels._cuda is not built", allow_module_level=True)

from octavo_kernels import cuda_gemm

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [needs_gpu_kernels, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernel_ran(monkeypatch):
    monkeypatch.setattr(cuda_gemm, "gated_from", 1)
    ops.calls.clear()
    with ops.forced("cuda"):
        yield
    assert set(ops.calls) == {("gated_linear", "cuda")}


def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ w.double().T).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def made(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 700, 2048])
@pytest.mark.parametrize(("inner", "k"), [(128, 64), (384, 320), (3072, 1024)])
def test_gated_products(inner, k, rows, dtype) -> None:
    x, w = made(rows, k, dtype=dtype), made(2 * inner, k, dtype=dtype, scale=k**-0.5)
    wanted = exact(x, w)
    for _ in range(3):  # stages and their barriers are used again
        got = ops.gated_linear(x, w, "silu")
        torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=2**-8)


def test_rows_apart_and_what_lies_around() -> None:
    rows, k, inner = 200, 192, 256
    wide = torch.full((rows + 56, 256), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[:rows, :k] = made(rows, k, dtype=torch.bfloat16)
    w = made(2 * inner, k, dtype=torch.bfloat16, scale=k**-0.5)
    x, fenced = wide[:rows, :k], torch.full((rows + 56, inner), 7.0, device="cuda").bfloat16()
    cuda_gemm.gated_gemm(x, w, "silu", fenced[:rows])
    assert bool((fenced[rows:] == 7.0).all())
    torch.testing.assert_close(fenced[:rows].double(), exact(x, w), rtol=2**-7, atol=2**-8)
    assert torch.equal(ops.gated_linear(x, w, "silu"), fenced[:rows])


def test_large_sizes_give_the_same_bits_every_time() -> None:
    """Many tiles a block: a stage must not be filled again while either block reads it."""
    x = made(2048, 4096, dtype=torch.bfloat16)
    w = made(28672, 4096, dtype=torch.bfloat16, scale=4096**-0.5)
    first = ops.gated_linear(x, w, "silu")
    torch.testing.assert_close(first[:256].double(), exact(x[:256], w), rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(first[-256:].double(), exact(x[-256:], w), rtol=2**-7, atol=2**-8)
    for _ in range(20):
        assert torch.equal(ops.gated_linear(x, w, "silu"), first)


def test_extreme_gates() -> None:
    x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    x[:, 0] = torch.linspace(-200, 200, 64, device="cuda")
    w = torch.zeros(256, 64, device="cuda", dtype=torch.bfloat16)
    w[:, 0] = 1
    got = ops.gated_linear(x, w, "silu").double()
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, exact(x, w), rtol=2**-7, atol=2**-8)
