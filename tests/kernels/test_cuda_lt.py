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
    at = lambda rows: cuda_lt.algorithm_of(SIZE._replace(rows=rows))  # noqa: E731
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
