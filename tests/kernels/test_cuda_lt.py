"""Products by cuBLASLt: by which algorithm, and what they compute."""

import pytest
import torch
from gpu import needs_gpu

from octavo_kernels import ops

if "cuda" not in ops.implementations("cuda"):
    pytest.skip("octavo_kernels._cuda is not built", allow_module_level=True)

from octavo_kernels import cuda_lt
from octavo_kernels.cuda_lt import Size

SIZE = Size("bfloat16", False, 64, 32, 0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(cuda_lt, "found", {})
    monkeypatch.setattr(cuda_lt, "_rounded", {})
    monkeypatch.setattr(cuda_lt, "_fixed", {})


def test_many_rows_take_the_next_larger_sizes_algorithm() -> None:
    for rows in (256, 600, 1024, 4096):
        cuda_lt.keep(SIZE._replace(rows=rows), bytes([rows % 251] * 64))

    def at(rows: int) -> bytes | None:
        return cuda_lt.algorithm_of(SIZE._replace(rows=rows))

    assert at(256) == bytes([256 % 251] * 64)
    assert at(255) is None  # few rows: only what was timed
    assert at(513) == bytes([600 % 251] * 64)
    assert at(700) == bytes([1024 % 251] * 64)
    assert at(1025) is None  # 4096 is more than twice as many
    assert at(5000) is None
    cuda_lt.keep(SIZE._replace(rows=2000), None)
    assert at(1025) is None
    cuda_lt.keep(SIZE._replace(rows=1100), bytes(64))
    assert at(1025) == bytes(64)  # what was kept for it before the last search is not


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch came without CUDA")
def test_the_library_is_the_one_that_torch_brings() -> None:
    assert cuda_lt._cuda.lt_version() >= 130000


@needs_gpu
def test_under_the_deterministic_profile_no_row_depends_on_the_others() -> None:
    x = torch.randn(700, 1024, device="cuda", dtype=torch.bfloat16)
    ops.deterministic(True)
    try:
        for n in (1024, 6144):
            w = torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16)
            full = ops.linear(x, w)
            for rows in (1, 2, 16, 17, 64, 100, 256, 512):
                assert torch.equal(ops.linear(x[:rows], w), full[:rows]), rows
                assert torch.equal(ops.linear(x[-rows:], w), full[-rows:]), rows
    finally:
        ops.deterministic(False)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [17, 300, 2048])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_of_many_rows_are_added_in_one_kernel(rows, with_bias, dtype) -> None:
    x = torch.randn(rows, 512, device="cuda").to(dtype)
    w = (torch.randn(1024, 512, device="cuda") / 16).to(dtype)
    bias = torch.randn(1024, device="cuda").to(dtype) if with_bias else None
    residual = torch.randn(rows, 1024, device="cuda").to(dtype)
    exact = residual.double() + x.double() @ w.double().T
    exact = exact if bias is None else exact + bias.double()
    for _ in range(2):  # found, then known
        out = residual.clone()
        with ops.forced("cuda"):
            ops.calls.clear()
            ops.linear_add(x, w, out, bias)
        assert list(ops.calls) == [("linear_add", "cuda")]
        torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=0.02)


@needs_gpu
def test_rows_that_no_promise_of_alignment_holds_for_are_torchs() -> None:
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(1001, 64, device="cuda", dtype=torch.bfloat16)
    cuda_lt.keep(cuda_lt.size_of(x, w, None), bytes(64))
    torch.testing.assert_close(ops.linear(x, w), torch.nn.functional.linear(x, w))
    residual = torch.zeros(40, 1001, device="cuda", dtype=torch.bfloat16)
    ops.linear_add(x, w, residual)
    torch.testing.assert_close(residual, torch.nn.functional.linear(x, w))
