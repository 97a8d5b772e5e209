"""The search for the fastest product: what is compared with what, and when the usual one stays."""

import contextlib
import json

import pytest
import torch
from gpu import needs_gpu

from octavo_kernels import ops

if "cuda" not in ops.implementations("cuda"):
    pytest.skip("octavo_kernels._cuda is not built", allow_module_level=True)

from octavo_kernels import cuda_lt, cuda_tune, cuda_tuning_file

N, K = 48, 64
OFFERED = [bytes([i] * 64) for i in range(6)]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(cuda_lt, "found", {})
    monkeypatch.setattr(cuda_lt, "_rounded", {})
    monkeypatch.setattr(cuda_tuning_file, "_read", {})


class Library:
    """Stands for cuBLASLt and the GPU's clock: seconds by algorithm, None for the usual choice."""

    def __init__(self, monkeypatch, seconds, *, offered=OFFERED, in_step=0.5) -> None:
        self.compared: list[list[bytes | None]] = []
        self._seconds, self._in_step = seconds, in_step
        monkeypatch.setattr(cuda_tune, "_own_stream", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(cuda_tune, "_in_turns", self._in_turns)
        monkeypatch.setattr(cuda_lt, "candidates", lambda *args, **named: list(offered))
        monkeypatch.setattr(cuda_lt, "rank", lambda *args: [seconds[a] for a in args[-1]])

    def _in_turns(self, runs):
        algorithms = [run.args[0] if hasattr(run, "args") else None for run in runs]
        if len(algorithms) == 2 and algorithms == [None, None]:  # a step, before and after
            return [[1.0] * 5, [self._in_step] * 5]
        self.compared.append(algorithms)
        # Clocks that fall while it is measured.
        return [[self._seconds[a] * (1 + turn) for turn in range(5)] for a in algorithms]


def weights(count: int = 2) -> list:
    return [(torch.ones(N, K, dtype=torch.bfloat16), None) for _ in range(count)]


def times(usual: float, *of_offered: float) -> dict:
    return {None: usual, **dict(zip(OFFERED, of_offered, strict=True))}


SLOW = 9.0


@pytest.mark.parametrize(
    ("seconds", "compared", "winner"),
    [
        # The heuristic's first is compared however badly it ranks; the best two others too.
        (times(1, 8, 0.9, 0.8, 0.7, 7, 7), [0, 3, 2], 3),
        (times(1, 0.5, 0.9, 0.8, 0.7, 7, 7), [0, 3, 2], 0),
        # 2 % are not enough to win by.
        (times(1, 0.985, 0.99, 1, 1, 1, 1), [0, 1, 2], None),
        (times(1, 0.985, 0.979, 1, 1, 1, 1), [0, 1, 2], 1),
        # Those that do not serve are not run again.
        (times(1, float("inf"), 0.5, *[float("inf")] * 4), [1], 1),
        (times(1, *[float("inf")] * 6), None, None),
    ],
)
def test_who_is_compared_and_who_wins(seconds, compared, winner, monkeypatch) -> None:
    library = Library(monkeypatch, seconds)
    assert cuda_tune.tune_products(weights(), [32]) == 1
    expected = [] if compared is None else [[None, *(OFFERED[i] for i in compared)]]
    assert library.compared == expected
    assert list(cuda_lt.found.values()) == [None if winner is None else OFFERED[winner]]


def test_nothing_is_searched_twice(monkeypatch) -> None:
    Library(monkeypatch, times(1, *[0.5] * 6))
    assert cuda_tune.tune_products(weights(), [32, 64]) == 2
    assert cuda_tune.tune_products(weights(), [32, 64, 96]) == 1
    assert cuda_tune.tune_products([], [32]) == 0


def test_where_nothing_is_offered_the_usual_choice_stays(monkeypatch) -> None:
    Library(monkeypatch, times(1, *[0.5] * 6), offered=[])
    cuda_tune.tune_products(weights(), [32])
    assert list(cuda_lt.found.values()) == [None]


@pytest.mark.parametrize(("in_step", "kept"), [(0.99, True), (0.997, False), (1.04, False)])
def test_what_does_not_win_in_a_step_is_not_kept_for_the_layers(in_step, kept, monkeypatch) -> None:
    Library(monkeypatch, times(1, *[0.5] * 6), in_step=in_step)
    head = [(torch.ones(96, K, dtype=torch.bfloat16), None)]
    assert cuda_tune.tune_products(weights() + head, [32]) == 2
    of_layers, of_head = cuda_lt.found.values()
    assert (of_layers is not None) is kept
    assert of_head is not None  # it is measured as it runs


def test_a_few_rows_must_win_by_what_our_kernel_does_in_passing(monkeypatch) -> None:
    Library(monkeypatch, times(1e-3, *[0.9e-3] * 6), in_step=2.0)
    assert cuda_tune.tune_products(weights(), [16]) == 1
    assert list(cuda_lt.found.values()) == [OFFERED[0]]
    cuda_lt.found.clear()
    Library(monkeypatch, times(10e-6, *[9e-6] * 6))
    cuda_tune.tune_products(weights(), [16])
    assert list(cuda_lt.found.values()) == [None]


def test_the_head_is_not_searched_for_the_rows_of_chunks(monkeypatch) -> None:
    Library(monkeypatch, times(1, *[0.5] * 6))
    assert cuda_tune.tune_products(weights(1), [512, 2048]) == 1


def test_without_memory_the_usual_choice_stays(monkeypatch, caplog) -> None:
    Library(monkeypatch, times(1, *[0.5] * 6))

    def no_memory(*args):
        raise torch.OutOfMemoryError("of 80 GiB")

    monkeypatch.setattr(cuda_lt, "rank", no_memory)
    assert cuda_tune.tune_products(weights(), [32]) == 1
    assert list(cuda_lt.found.values()) == [None]
    assert "no memory to search" in caplog.text


def test_a_next_start_searches_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cuda_tuning_file, "_file", lambda folder, device: folder / "products.json")
    Library(monkeypatch, times(1, *[0.5] * 6))
    ops.keep_tuning(tmp_path)
    try:
        assert cuda_tune.tune_products(weights(), [32]) == 1
        before = dict(cuda_lt.found)
        cuda_lt.found.clear()
        cuda_tuning_file._read.clear()
        assert cuda_tune.tune_products(weights(), [32]) == 0
        assert cuda_lt.found == before
    finally:
        ops.keep_tuning(None)


def test_what_a_file_tells_holds_for_sizes_that_were_asked_for_before(
    tmp_path, monkeypatch
) -> None:
    """As those of the largest step, which is rehearsed before anything is searched."""
    monkeypatch.setattr(cuda_tuning_file, "_file", lambda folder, device: folder / "products.json")
    x = torch.ones(600, K, dtype=torch.bfloat16)
    [(weight, _), *_] = weights()
    known = cuda_lt.size_of(x, weight, None)._replace(rows=640)
    cuda_tuning_file.add(tmp_path, x.device, {known: OFFERED[0]})
    Library(monkeypatch, times(1, *[0.5] * 6))
    assert cuda_lt.algorithm_of(known._replace(rows=600)) is None
    ops.keep_tuning(tmp_path)
    try:
        assert cuda_tune.tune_products(weights(), [640]) == 0
    finally:
        ops.keep_tuning(None)
    assert cuda_lt.algorithm_of(known._replace(rows=600)) == OFFERED[0]


def test_sizes_that_the_library_is_never_given_keep_our_kernel(monkeypatch) -> None:
    """GPT-2's vocabulary, a gate of one row: what wins there would only drive our kernel out."""
    library = Library(monkeypatch, times(1, *[0.01] * 6))
    odd = [(torch.ones(n, K, dtype=torch.bfloat16), None) for n in (1, 50257, 60) for _ in "ab"]
    assert cuda_tune.tune_products(odd, [8]) == 0
    assert cuda_tune.tune_products(weights() + odd, [8]) == 1
    assert len(library.compared) == 1
    assert len(cuda_lt.found) == 1


def test_weights_that_make_the_cache_cold() -> None:
    each = weights(5)
    size = each[0][0].nbytes
    assert cuda_tune._cold(each, 1) == each[:1]
    assert cuda_tune._cold(each, 2 * size) == each[:2]
    assert cuda_tune._cold(each, 99 * size) == each


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_tuned_products_are_right(dtype, with_bias, tmp_path) -> None:
    few_and_many = [8, 32, 100, 600]
    each = [torch.randn(1000, 512, device="cuda").to(dtype) for _ in range(3)]
    bias = torch.randn(1000, device="cuda").to(dtype) if with_bias else None
    pairs = [(weight, bias) for weight in each]
    ops.keep_tuning(tmp_path)
    try:
        assert ops.tune_products(pairs, few_and_many) == 4
        assert ops.tune_products(pairs, few_and_many) == 0
        [file] = tmp_path.iterdir()
        assert len(json.loads(file.read_text())["found"]) == 4
        cuda_lt.found.clear()
        cuda_tuning_file._read.clear()
        assert ops.tune_products(pairs, few_and_many) == 0  # from the file
    finally:
        ops.keep_tuning(None)
    x = torch.randn(600, 512, device="cuda").to(dtype)
    offered = cuda_lt.candidates(x, each[0], bias, x.new_empty(600, 1000), count=8, split=True)
    for algorithm in (None, *offered):
        for rows in few_and_many:
            cuda_lt.keep(cuda_lt.size_of(x[:rows], each[0], bias), algorithm)
        for rows in (7, 8, 31, 32, 100, 555, 600):
            exact = x[:rows].double() @ each[0].double().T
            exact = exact if bias is None else exact + bias.double()
            out = torch.full((rows, 1000), float("nan"), device="cuda", dtype=dtype)
            for got in (
                ops.linear(x[:rows], each[0], bias),
                ops.linear(x[:rows], each[0], bias, out=out),
            ):
                torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=0.1)
