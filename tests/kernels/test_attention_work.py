"""What attention on a GPU is given beforehand: sizes, checks, and that a CPU does without."""

import pytest
import torch

from octavo_kernels import ops
from octavo_kernels.attention_settings import DecodeSetting

SIZES = {"max_seqs": 4, "heads": 8, "kv_heads": 2, "dim": 64, "device": "cpu"}


@pytest.mark.parametrize("chunk", [-64, 0, 32, 100, 257])
def test_a_chunk_has_as_many_tokens_for_each_warp(chunk) -> None:
    with pytest.raises(ValueError, match="chunk must be a multiple of 64"):
        ops.attention_work(**SIZES, max_seq_len=100, setting=DecodeSetting(chunk, 1))


@pytest.mark.parametrize("windows", [(), (0, -1)])
def test_windows_are_named(windows) -> None:
    with pytest.raises(ValueError, match="windows must be 0 or more each"):
        ops.attention_work(**SIZES, max_seq_len=100, windows=windows)


def decodes() -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 64, generator=random)
    keys, values = torch.randn(2, 4, 16, 2, 64, generator=random)
    tables = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    start, lengths = torch.tensor([0, 1, 2]), torch.tensor([20, 3])
    return query, keys, values, tables, start.int(), lengths.int()


@pytest.mark.parametrize("name", ops.implementations("cpu"))
def test_a_cpu_takes_no_notice_of_work(name) -> None:
    arguments = decodes()
    work = ops.attention_work(**SIZES, max_seq_len=100, windows=(0, 0, 8))
    assert work.windows == (0, 8)
    assert work.values.numel() == 0
    assert work.nbytes == 4 * (len(work.windows) * 2 + 1)
    with ops.forced(name):
        ops.plan_attention(work, arguments[-1], 2)
        plain = ops.paged_attention(*arguments, 0.125)
        told = ops.paged_attention(*arguments, 0.125, num_decodes=2, max_query_len=1, work=work)
    assert torch.equal(plain, told)


@pytest.mark.parametrize("num_decodes", [-1, 3])
def test_more_decodes_than_sequences_are_refused(num_decodes) -> None:
    arguments = decodes()
    work = ops.attention_work(**SIZES, max_seq_len=100)
    with pytest.raises(ValueError, match=f"num_decodes is {num_decodes}, but there are 2"):
        ops.paged_attention(*arguments, 0.125, num_decodes=num_decodes)
    with pytest.raises(ValueError, match=f"num_decodes is {num_decodes}, but there are 2"):
        ops.plan_attention(work, arguments[-1], num_decodes)
