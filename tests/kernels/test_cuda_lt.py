"""The choice of cuBLASLt's algorithms: what is kept, what is found again, what it computes."""

import json

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
    monkeypatch.setattr(cuda_lt, "_found", {})
    monkeypatch.setattr(cuda_lt, "_rounded", {})
    monkeypatch.setattr(cuda_lt, "_fixed", {})


def known(*rows: int) -> None:
    cuda_lt._found.update({SIZE._replace(rows=r): bytes([r % 251] * 64) for r in rows})


def test_what_was_found_is_found_again(tmp_path) -> None:
    known(32, 64)
    cuda_lt._found[SIZE._replace(rows=128)] = None
    before, file = dict(cuda_lt._found), tmp_path / "folder" / "products.json"
    cuda_lt._save(file)
    cuda_lt._found.clear()
    cuda_lt._load(file)
    assert cuda_lt._found == before
    assert [p.name for p in file.parent.iterdir()] == ["products.json"]


def test_an_older_search_does_not_replace_this_ones(tmp_path) -> None:
    known(32)
    cuda_lt._save(tmp_path / "f.json")
    cuda_lt._found[SIZE._replace(rows=32)] = None
    cuda_lt._load(tmp_path / "f.json")
    assert cuda_lt._found == {SIZE._replace(rows=32): None}


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"size": [1]}]', '{"size": 3}', "[{}]"])
def test_a_file_that_cannot_be_read_is_said_and_passed_over(text, tmp_path, caplog) -> None:
    (tmp_path / "f.json").write_text(text)
    cuda_lt._load(tmp_path / "f.json")
    assert "f.json cannot be used" in caplog.text
    assert not cuda_lt._found


def test_a_missing_file_is_not_an_error(tmp_path, caplog) -> None:
    cuda_lt._load(tmp_path / "f.json")
    assert not caplog.text


def test_many_rows_take_the_next_larger_sizes_algorithm() -> None:
    known(256, 600, 1024, 4096)
    at = lambda rows: cuda_lt._algorithm(SIZE._replace(rows=rows))  # noqa: E731
    assert at(256) == bytes([256 % 251] * 64)
    assert at(255) is None  # few rows: only what was timed
    assert at(513) == bytes([600 % 251] * 64)
    assert at(700) == bytes([1024 % 251] * 64)
    assert at(1025) is None  # 4096 is more than twice as many
    assert at(5000) is None


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch came without CUDA")
def test_the_library_is_the_one_that_torch_brings() -> None:
    assert cuda_lt._cuda.lt_version() >= 130000


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_tuned_products_are_right(dtype, with_bias, tmp_path) -> None:
    weights = [torch.randn(1000, 512, device="cuda").to(dtype) for _ in range(3)]
    bias = torch.randn(1000, device="cuda").to(dtype) if with_bias else None
    pairs = [(weight, bias) for weight in weights]
    assert ops.tune_products(pairs, [32, 100, 600], tmp_path) == 3
    assert ops.tune_products(pairs, [32, 100, 600], tmp_path) == 0
    [file] = tmp_path.iterdir()
    assert len(json.loads(file.read_text())) == 3
    cuda_lt._found.clear()
    assert ops.tune_products(pairs, [32, 100, 600], tmp_path) == 0  # from the file
    for rows in (31, 32, 100, 555, 600):
        x = torch.randn(rows, 512, device="cuda").to(dtype)
        out = torch.full((rows, 1000), float("nan"), device="cuda", dtype=dtype)
        exact = x.double() @ weights[0].double().T
        exact = exact if bias is None else exact + bias.double()
        for got in (ops.linear(x, weights[0], bias), ops.linear(x, weights[0], bias, out=out)):
            torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=0.1)


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
