"""Log-probabilities against torch.log_softmax, alone and in batches."""

import pytest
import torch

from octavo.core.step import ScheduledSequence
from octavo.engine import logprobs
from octavo.engine.logits import Draw
from octavo.engine.logprobs import drawn_logprobs, prompt_logprobs, token_logprobs
from octavo.params import SamplingParams

VOCAB = 1003


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_values_and_ranks_are_those_of_log_softmax(count):
    logits = rows(30)
    expected = torch.log_softmax(logits, -1)
    for i, row in enumerate(logits):
        token = (i * 37) % VOCAB
        found = token_logprobs(row, token, count)
        order = expected[i].argsort(descending=True)
        assert found.token_id == token
        assert found.logprob == pytest.approx(float(expected[i, token]), abs=2e-5)
        assert found.rank == order.tolist().index(token) + 1
        assert found.top_ids == order[:count].tolist()
        assert found.top_logprobs == pytest.approx(expected[i, order[:count]].tolist(), abs=2e-5)


def test_equals_share_a_rank_and_are_listed_by_id():
    found = token_logprobs(torch.zeros(50), 30, 3)
    assert (found.rank, found.top_ids) == (1, [0, 1, 2])


def test_a_small_vocabulary_gives_what_it_has():
    assert token_logprobs(torch.tensor([1.0, 2.0]), 0, 20).top_ids == [1, 0]


def test_only_those_that_asked_and_drew_a_token_get_some():
    asked, silent = SamplingParams(logprobs=2), SamplingParams()
    draws = [Draw(asked, 0, 0), Draw(silent, 0, 0), Draw(asked, 0, 0), Draw(asked, 0, 0)]
    logits = rows(4)
    found = drawn_logprobs(logits, [5, 6, -1, 7], draws, [10, 11, 12, 13])
    assert set(found) == {10, 13}
    assert found[13] == token_logprobs(logits[3].clone(), 7, 2)


def share(seq_id, tokens, start, count, wanted, prompt=None, generated=0):
    return ScheduledSequence(
        seq_id, tokens[start : start + count], start, [], False,
        SamplingParams(prompt_logprobs=wanted), generated, tokens, prompt or len(tokens),
    )  # fmt: skip


def test_prompts_are_covered_by_any_chunks(monkeypatch):
    monkeypatch.setattr(logprobs, "PROMPT_ROWS", 3)
    tokens = list(range(100, 117))
    logits = rows(17)
    whole = prompt_logprobs([share(1, tokens, 0, 17, 2)], logits[:16], lambda h: h)[1]
    assert [p.token_id for p in whole] == tokens[1:]
    assert whole == [token_logprobs(logits[i], tokens[i + 1], 2) for i in range(16)]
    pieces = []
    for start, count in ((0, 1), (1, 9), (10, 6), (16, 1)):
        piece = share(1, tokens, start, count, 2)
        wanted = logits[[start + i for i in piece.prompt_logprob_rows]]
        pieces += prompt_logprobs([piece], wanted, lambda h: h).get(1, [])
    assert pieces == whole


def test_several_prompts_share_one_step():
    logits = rows(7)
    shares = [
        share(1, [5, 6, 7, 8], 0, 4, 0),
        share(2, [1, 2, 3], 0, 3, None),
        share(3, [9, 8, 7, 6, 5], 0, 5, 1),
        share(4, [9, 8, 7, 6], 0, 4, 1, prompt=3, generated=1),  # a replay: they were sent before
    ]
    found = prompt_logprobs(shares, logits, lambda h: h)
    assert set(found) == {1, 3}
    assert found[3] == [token_logprobs(logits[3 + i], 8 - i, 1) for i in range(4)]
