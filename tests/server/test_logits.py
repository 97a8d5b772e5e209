"""What parameters do to logits, against transformers' processors and warpers as oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as oracle

from octavo.core.step import NOTHING_ALLOWED
from octavo.engine import logits as logits_module
from octavo.engine.logits import Draw, adjust, candidates, changes
from octavo.engine.sampler import draw_key, sample
from octavo.params import SamplingParams

VOCAB = 257
INF = float("inf")


def row(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Our distribution over the whole vocabulary."""
    scaled, ids = candidates(logits, params)
    full = torch.full((VOCAB,), -INF, dtype=torch.float64)
    full[ids] = scaled
    return torch.softmax(full, -1)


def warped(logits: torch.Tensor, *warpers) -> torch.Tensor:
    scores = logits[None].double()
    for warper in warpers:
        scores = warper(torch.zeros(1, 0, dtype=torch.long), scores)
    return torch.softmax(scores[0], -1)


WARPERS = {
    "temperature": oracle.TemperatureLogitsWarper,
    "min_p": oracle.MinPLogitsWarper,
    "top_k": oracle.TopKLogitsWarper,
    "top_p": oracle.TopPLogitsWarper,
    "typical_p": oracle.TypicalLogitsWarper,
}


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    values=st.fixed_dictionaries(
        {"temperature": st.floats(0.05, 2)},
        optional={
            "min_p": st.floats(1e-4, 0.9),
            "top_k": st.integers(1, VOCAB - 1),
            "top_p": st.floats(0.01, 0.99),
            "typical_p": st.floats(0.01, 0.99),
        },
    ),
)
def test_the_distribution_is_that_of_transformers(seed, values):
    logits = row(seed)
    ours = filtered(logits, SamplingParams(**values))
    theirs = warped(logits, *(WARPERS[name](values[name]) for name in WARPERS if name in values))
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    penalty=st.floats(0.1, 2),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=20),
)
def test_repetition_penalty_is_that_of_transformers(seed, penalty, prompt, output):
    params = SamplingParams(repetition_penalty=penalty)
    history = [*prompt, *output, 7, 8]  # what was appended later does not count
    ours = adjust(row(seed), Draw(params, 0, len(output), history, len(prompt)), ())
    theirs = oracle.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + output]), row(seed)[None]
    )
    torch.testing.assert_close(ours, theirs[0])


def test_presence_and_frequency_count_the_output_alone():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
    logits = row(1)
    ours = adjust(logits, Draw(params, 0, 4, [9, 9, 5, 6, 5, 5, 200], 2), ())
    expected = logits.clone()
    expected[5] -= 0.5 - 0.25 * 3
    expected[6] -= 0.5 - 0.25
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_before_the_first_token_there_is_nothing_to_penalise(penalty):
    draw = Draw(SamplingParams(**{penalty: 2.0}), 0, 0, [5, 6], 2)
    assert torch.equal(adjust(row(1), draw, ()), row(1))


def test_logit_bias_is_added_and_the_logits_stay_as_they_are():
    logits = row(2)
    before = logits.clone()
    biased = adjust(logits, Draw(SamplingParams(logit_bias={3: 5.0, 200: -100.0}), 0, 0), ())
    theirs = oracle.SequenceBiasLogitsProcessor([[[3], 5.0], [[200], -100.0]])
    torch.testing.assert_close(biased, theirs(torch.tensor([[0]]), before.clone()[None])[0])
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    output=st.lists(st.integers(0, 3), max_size=6),
)
def test_bad_words_are_those_of_transformers(words, output):
    params = SamplingParams(bad_words_ids=tuple(map(tuple, words)))
    # transformers looks into the prompt too, so it is given the output alone.
    prompt = [100, 101]
    ours = adjust(row(3), Draw(params, 0, len(output), prompt + output, 2), ())
    theirs = oracle.NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=[250])
    expected = theirs(torch.tensor([[99, *output]]), row(3)[None])[0]
    assert torch.equal(ours, expected)


def test_allowed_tokens_keep_their_logits_and_the_others_are_forbidden():
    params = SamplingParams(allowed_token_ids=(4, 8, 15))
    ours = adjust(row(4), Draw(params, 0, 0), ())
    assert torch.isfinite(ours).nonzero().flatten().tolist() == [4, 8, 15]
    assert torch.equal(ours[[4, 8, 15]], row(4)[[4, 8, 15]])


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_min_tokens_forbids_what_would_end_the_sequence_and_nothing_else(ignore_eos):
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,), ignore_eos=ignore_eos)
    early = adjust(row(5), Draw(params, 0, 1), (1, 2))
    forbidden = [7] if ignore_eos else [1, 2, 7]
    assert torch.isinf(early).nonzero().flatten().tolist() == forbidden
    assert not changes(Draw(params, 0, 2))


def test_when_everything_is_forbidden_that_row_says_so_and_no_other():
    all_bad = SamplingParams(allowed_token_ids=(5,), bad_words_ids=((5,),))
    waits = SamplingParams(allowed_token_ids=(1,), min_tokens=1, temperature=0)
    logits = torch.stack([row(6)] * 4)
    draws = [Draw(all_bad, 1, 0), Draw(waits, 1, 0), Draw(SamplingParams(temperature=0), 1, 0)]
    draws.append(Draw(SamplingParams(allowed_token_ids=(5,)), 1, 0))
    tokens = sample(logits, draws, (1,))
    assert tokens == [NOTHING_ALLOWED, NOTHING_ALLOWED, int(row(6).argmax()), 5]


def test_of_equals_the_lower_ids_stay():
    logits = torch.zeros(VOCAB)
    for params in (SamplingParams(top_k=3), SamplingParams(top_p=2.5 / VOCAB)):
        assert sorted(candidates(logits, params)[1].tolist()) == [0, 1, 2]
    assert candidates(logits, SamplingParams(min_p=1.0))[1].tolist() == list(range(VOCAB))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_right_beyond_the_shortlist(monkeypatch, scale, top_p):
    whole = candidates(row(9, scale), SamplingParams(top_p=top_p))
    monkeypatch.setattr(logits_module, "_SHORTLIST", 5)
    short = candidates(row(9, scale), SamplingParams(top_p=top_p))
    assert torch.equal(whole[0], short[0])
    assert torch.equal(whole[1], short[1])


KINDS = [
    {}, {"temperature": 0.0}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"typical_p": 0.7},
    {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "temperature": 0.0},
    {"frequency_penalty": 0.5, "top_k": 9, "top_p": 0.5}, {"logit_bias": {5: 9.0}},
    {"allowed_token_ids": (3, 99, 500)}, {"bad_words_ids": ((7, 8), (3,))},
    {"min_tokens": 9, "stop_token_ids": (4,)},
    {"temperature": 2.0, "min_p": 0.01, "top_p": 0.95, "typical_p": 0.9, "top_k": 300},
]  # fmt: skip


@pytest.mark.parametrize("vocab", [1000, 1003])
def test_a_draw_is_the_same_alone_and_in_any_batch(vocab):
    random = torch.Generator().manual_seed(vocab)
    rows = 3 * len(KINDS)
    logits = torch.randn(rows, vocab, generator=random) * 2
    history = torch.randint(0, vocab, (rows, 12), generator=random).tolist()
    draws = []
    for i in range(rows):
        params = SamplingParams(**KINDS[i % len(KINDS)])
        draws.append(Draw(params, draw_key(params, 5, i, 4), 4, history[i], 8))
    together = sample(logits, draws, (1,))
    alone = [sample(logits[i : i + 1], [draws[i]], (1,))[0] for i in range(rows)]
    order = torch.randperm(rows, generator=random).tolist()
    shuffled = sample(logits[order], [draws[i] for i in order], (1,))
    half = sample(logits[rows // 2 :], draws[rows // 2 :], (1,))
    assert together == alone
    assert shuffled == [together[i] for i in order]
    assert half == together[rows // 2 :]
    assert min(together) >= 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k.get("temperature") != 0], ids=str)
def test_draws_follow_the_filtered_distribution(kind):
    """Chi-square over the tokens that are expected often enough, at 0.1 %."""
    logits = row(8, 1.5)[:40].clone()
    kind = {k: v for k, v in kind.items() if k != "allowed_token_ids"}
    if "bad_words_ids" in kind:
        kind = {"bad_words_ids": ((8,), (3,))}
    params = SamplingParams(**kind)
    draws = [Draw(params, draw_key(params, 1, i, 0), 0, [2, 9], 2) for i in range(2000)]
    counts = torch.bincount(torch.tensor(sample(logits.repeat(2000, 1), draws, ())), minlength=40)
    adjusted = adjust(logits, draws[0], ())
    scaled, ids = candidates(adjusted, params)
    expected = torch.zeros(40, dtype=torch.float64)
    expected[ids] = torch.softmax(scaled, -1) * 2000
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    statistic = float(((counts - expected) ** 2 / expected)[often].sum())
    free = int(often.sum()) - bool(often.all())
    # Wilson and Hilferty's approximation of the 99.9 % quantile.
    limit = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
    assert statistic < limit
