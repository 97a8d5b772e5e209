"""What drawing means: the reference of the kernels against the engine's own sampler."""

import math

import pytest
import torch

from octavo.engine.logits import Draw
from octavo.engine.logprobs import token_logprobs
from octavo.engine.sampler import draw_key, draw_stream, sample
from octavo.params import SamplingParams
from octavo_kernels import ops, sampling

KINDS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.25},
    {"temperature": 1.5, "top_k": 40},
    {"top_p": 0.875},
    {"top_p": 0.5, "top_k": 50},
    {"min_p": 0.0625},
    {"min_p": 0.03125, "top_p": 0.9375, "top_k": 100},
    {"top_k": 1},
    {"top_p": 2.0**-20},
    {"top_p": 1 - 2.0**-20},
    {"temperature": 0.0078125, "top_p": 0.875},
]


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **changes})


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def sampling_of(wanted: list[SamplingParams], counts: list[int], **more) -> sampling.Sampling:
    """As the engine would fill it for sequences 0, 1, … of an engine with seed 5."""
    streams = [signed(draw_stream(p, 5, i)) for i, p in enumerate(wanted)]
    return sampling.Sampling(
        temperature=torch.tensor([p.temperature for p in wanted], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in wanted], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in wanted], dtype=torch.float32),
        min_p=torch.tensor([p.min_p for p in wanted], dtype=torch.float32),
        stream=torch.tensor(streams),
        count=torch.tensor(counts),
        **more,
    )


def draws_of(wanted: list[SamplingParams], counts: list[int], histories=None) -> list[Draw]:
    histories = histories or [((), ())] * len(wanted)
    return [
        Draw(p, draw_key(p, 5, i, n), n, (*prompt, *drawn), len(prompt))
        for i, (p, n, (prompt, drawn)) in enumerate(zip(wanted, counts, histories, strict=True))
    ]


def normal(*shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_the_reference_draws_as_the_engine_does(spread, dtype) -> None:
    wanted = [params(**kind) for kind in KINDS]
    counts = [3 * i for i in range(len(KINDS))]
    for seed in range(3):
        logits = normal(len(KINDS), 1003, dtype=dtype, seed=seed) * spread
        expected = sample(logits.float(), draws_of(wanted, counts), ())
        assert ops.sample(logits, sampling_of(wanted, counts)).tolist() == expected


def test_scale_and_softcap_come_first() -> None:
    wanted = [params(**kind) for kind in KINDS]
    counts = [1] * len(KINDS)
    logits = normal(len(KINDS), 300) * 40
    capped = 8 * torch.tanh(logits * 0.5 / 8)
    expected = sample(capped, draws_of(wanted, counts), ())
    found = ops.sample(logits, sampling_of(wanted, counts), scale=0.5, softcap=8.0)
    assert found.tolist() == expected


def adjusted(vocab: int, eos: int) -> tuple[list[SamplingParams], list, sampling.Adjustments]:
    """Requests that change logits, their histories, and the pool that says the same."""
    prompt, drawn = (1, 2, 2, 3, 9), (2, 4, 4, 4)
    wanted = [
        params(repetition_penalty=1.5, temperature=0.5),
        params(presence_penalty=1.25, frequency_penalty=0.5),
        params(presence_penalty=-0.5, repetition_penalty=0.75, top_k=5),
        params(logit_bias={4: 2.5, 7: -100.0, 11: 3.0}, temperature=0.0),
        params(allowed_token_ids=(3, 4, 5, 6), top_p=0.75),
        params(min_tokens=6, stop_token_ids=(8,), allowed_token_ids=(8, eos)),
        params(min_tokens=4, stop_token_ids=(8,), allowed_token_ids=(8, eos)),
        params(bad_words_ids=((5,), (6,)), logit_bias={5: 100.0, 6: 100.0}, temperature=0.0),
        params(),
    ]
    pool = sampling.new_adjustments(len(wanted), vocab, 8, torch.device("cpu"))
    for row, p in enumerate(wanted):
        stops = ((*p.stop_token_ids, eos), p.min_tokens) if p.min_tokens else ((), 0)
        listed = [(i, b, 1 << 40) for i, b in (p.logit_bias or {}).items()]
        listed += [(i, -math.inf, stops[1]) for i in stops[0]]
        listed += [(ids[0], -math.inf, 1 << 40) for ids in p.bad_words_ids]
        sampling.restart_adjustment(
            pool, row, prompt=prompt, drawn=drawn, allowed=p.allowed_token_ids, listed=listed,
            repetition=p.repetition_penalty, presence=p.presence_penalty,
            frequency=p.frequency_penalty,
        )  # fmt: skip
    return wanted, [(prompt, drawn)] * len(wanted), pool


@pytest.mark.parametrize("seed", range(4))
def test_adjustments_are_the_engine_s_parameters(seed) -> None:
    eos, vocab = 10, 50
    wanted, histories, pool = adjusted(vocab, eos)
    counts = [len(drawn) for _, drawn in histories]
    logits = normal(len(wanted), vocab, seed=seed) * 2
    expected = sample(logits, draws_of(wanted, counts, histories), (eos,))
    assert expected[5] == sampling.NOTHING_ALLOWED
    rows = torch.arange(len(wanted), dtype=torch.int32)
    rows[-1] = -1
    before = pool.marks.clone()
    found = ops.sample(logits, sampling_of(wanted, counts, adjusted=rows, adjustments=pool))
    assert found.tolist() == expected
    for row, token in enumerate(expected[:-1]):
        if token >= 0:
            before[row, token] += 1
    assert torch.equal(pool.marks, before)


def test_a_list_that_is_too_long_is_refused() -> None:
    pool = sampling.new_adjustments(1, 50, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 listed tokens, but the pool has room for 2"):
        sampling.restart_adjustment(pool, 0, listed=[(1, 0.5, 9), (2, 0.5, 9), (3, 0.5, 9)])


def test_ends_say_why() -> None:
    logits = torch.zeros(4, 6)
    logits[0, 3] = logits[1, 4] = logits[2, 3] = 9.0
    logits[3] = math.nan
    stop_ids = torch.full((4, sampling.STOP_IDS), -1, dtype=torch.int32)
    stop_ids[:, 7] = 3
    flags = torch.full((4,), 99, dtype=torch.uint8)
    ends = sampling.Ends(stop_ids, torch.tensor([9, 5, 5, 9]), flags)
    wanted = sampling_of([params(temperature=0.0)] * 4, [4] * 4)
    assert ops.sample(logits, wanted, ends=ends).tolist() == [3, 4, 3, -1]
    stopped, full = sampling.STOPPED, sampling.FULL
    assert flags.tolist() == [stopped, full, stopped | full, sampling.FAILED]


def test_slots_name_parameters_and_padding() -> None:
    logits = normal(3, 100)
    wanted = [params(temperature=0.0), params(top_k=3), params(seed=4)]
    slots = torch.tensor([2, -1, 1], dtype=torch.int32)
    found = ops.sample(logits, sampling_of(wanted, [0, 0, 0]), slots=slots)
    expected = sample(logits, [draws_of(wanted, [0, 0, 0])[i] for i in (2, 0, 1)], ())
    assert found.tolist() == [expected[0], 0, expected[2]]


def test_token_logprobs_are_the_engine_s() -> None:
    logits = (normal(4, 500, seed=1) * 3).round()  # with ties
    tokens = torch.tensor([0, 7, -1, 499], dtype=torch.int32)
    wanted = torch.tensor([0, 20, 5, 3], dtype=torch.int32)
    found = ops.token_logprobs(logits, tokens, wanted, 20)
    for row in (0, 1, 3):
        count = int(wanted[row])
        expected = token_logprobs(logits[row], int(tokens[row]), count)
        assert float(found.logprob[row]) == pytest.approx(expected.logprob, abs=1e-5)
        assert int(found.rank[row]) == expected.rank
        assert found.top_ids[row, :count].tolist() == list(expected.top_ids)
        assert found.top_logprobs[row, :count].tolist() == pytest.approx(
            list(expected.top_logprobs), abs=1e-5
        )


def test_wrong_tensors_are_refused_by_name() -> None:
    logits, wanted = torch.zeros(3, 10), sampling_of([params()] * 2, [0, 0])
    with pytest.raises(ValueError, match="3 rows of logits, but 2 slots"):
        ops.sample(logits, wanted)
    with pytest.raises(ValueError, match="scale must be above 0"):
        ops.sample(logits[:2], wanted, scale=0.0)
    pool = sampling.new_adjustments(1, 8, 1, torch.device("cpu"))
    rows = torch.zeros(2, dtype=torch.int32)
    short = sampling_of([params()] * 2, [0, 0], adjusted=rows, adjustments=pool)
    with pytest.raises(ValueError, match="marks of 8 tokens for a vocabulary of 10"):
        ops.sample(logits[:2], short)
