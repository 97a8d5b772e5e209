"""Sampling: the right distribution, and draws that depend on nothing but logits and key."""

import itertools
import math

import pytest
import torch

from octavo.core.step import NO_TOKEN
from octavo.engine.logits import Draw
from octavo.engine.sampler import draw_key, sample
from octavo.params import SamplingParams
from octavo_kernels.reference_sampling import SEGMENT


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **changes})


def draws(logits: torch.Tensor, count: int, **changes) -> torch.Tensor:
    """How often each token is drawn from one row of logits, each time under another key."""
    rows = logits.repeat(count, 1)
    wanted = [Draw(params(**changes), draw_key(params(seed=3), 0, 0, i), i) for i in range(count)]
    return torch.bincount(torch.tensor(sample(rows, wanted, ())), minlength=len(logits))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    total = counts.sum()
    return float(((counts - expected * total) ** 2 / (expected * total)).sum())


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    greedy = Draw(params(temperature=0), 1, 0)
    assert sample(logits, [greedy, greedy], ()) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.5])
    counts = draws(logits, 3000, temperature=temperature)
    expected = torch.softmax(logits.double() / temperature, 0)
    assert chi_square(counts, expected) < 20.5  # 5 degrees of freedom, 0.1 %


# Ids at the edges of segments and inside them; the last segment is not a whole one.
SPREAD = [0, 255, 256, 300, 511, 512, 600, 767, 768, 900, 998, 999]


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, 12), ({"top_k": 7}, 7), ({"top_p": 0.8}, 7), ({"min_p": 0.15}, 6)]
)
def test_draws_follow_the_softmax_across_segments(changes, kept) -> None:
    logits = torch.full((1000,), -math.inf)
    ids = torch.tensor(SPREAD)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    logits[ids] = -torch.log1p(torch.arange(12.0))
    counts = draws(logits, 2500, **changes)[ids]
    assert int(counts[:kept].sum()) == 2500
    expected = torch.softmax(logits[ids[:kept]].double(), 0)
    assert chi_square(counts[:kept], expected) < 3 * (kept - 1) + 10  # beyond 0.1 %


def test_segments_and_tokens_are_drawn_independently() -> None:
    """Each of 1,024 equals comes as often, so no segment favours some of its tokens."""
    counts = draws(torch.zeros(4 * SEGMENT), 8 * 1024)
    assert chi_square(counts, torch.full((1024,), 1 / 1024)) < 1168  # 1,023 degrees, 0.1 %


def test_top_k_keeps_k_and_their_proportions() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 1.5, -3.0, 0.5])
    counts = draws(logits, 2000, top_k=3)
    kept = torch.tensor([1, 2, 3])
    assert counts.sum() == counts[kept].sum()
    assert chi_square(counts[kept], torch.softmax(logits[kept].double(), 0)) < 13.8  # 2, 0.1 %


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept) -> None:
    logits = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3]))
    counts = draws(logits, 400, top_p=top_p)
    largest_first = [1, 3, 0, 2]
    assert all(counts[t] > 0 for t in largest_first[:kept])
    assert all(counts[t] == 0 for t in largest_first[kept:])


def test_top_k_comes_before_top_p() -> None:
    # Of the two kept by top_k the first has 5/8 of what is left, so top_p 0.6 keeps it alone.
    counts = draws(torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3])), 100, top_k=2, top_p=0.6)
    assert counts.tolist() == [0, 100, 0, 0]


def test_a_draw_does_not_depend_on_batch_mates() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 1000, generator=random) * 2
    kinds = [{}, {"top_k": 40}, {"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.5}]
    wanted = [Draw(params(**kinds[i % 5]), draw_key(params(), 5, i, 2), 2) for i in range(24)]
    together = sample(logits.clone(), wanted, ())
    alone = [sample(logits[i : i + 1].clone(), [wanted[i]], ())[0] for i in range(24)]
    backwards = sample(logits.flip(0).clone(), wanted[::-1], ())
    assert together == alone == backwards[::-1]


def test_a_request_s_seed_names_its_draws_wherever_it_runs() -> None:
    seeded = params(seed=-7)
    assert draw_key(seeded, 0, 1, 5) == draw_key(seeded, 99, 2, 5)
    assert draw_key(seeded, 0, 1, 5) != draw_key(seeded, 0, 1, 6)
    assert draw_key(seeded, 0, 1, 5) != draw_key(params(seed=-8), 0, 1, 5)


def test_without_a_seed_the_engine_s_and_the_sequence_name_the_draw() -> None:
    free = params()
    keys = {draw_key(free, e, s, n) for e in range(4) for s in range(40) for n in range(40)}
    assert len(keys) == 4 * 40 * 40
    assert draw_key(free, 1, 2, 3) == draw_key(free, 1, 2, 3)


def test_neighbouring_keys_are_unrelated() -> None:
    """Consecutive draws of one request agree as often as chance says: 1 in 4."""
    counts = []
    for seed in range(20):
        rows = torch.zeros(100, 4)
        wanted = [Draw(params(), draw_key(params(seed=seed), 0, 0, i), i) for i in range(100)]
        tokens = sample(rows, wanted, ())
        counts.append(sum(a == b for a, b in itertools.pairwise(tokens)))
    assert abs(sum(counts) - 20 * 99 / 4) < 4 * math.sqrt(20 * 99 * 3 / 16)


def test_min_tokens_holds_back_what_would_end_the_sequence() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 7.0]])
    early = params(temperature=0, min_tokens=2, stop_token_ids=(2,))
    assert sample(logits.clone(), [Draw(early, 0, 1)], (1,)) == [3]
    assert sample(logits.clone(), [Draw(early, 0, 2)], (1,)) == [1]


def test_nan_is_no_token_and_hurts_no_neighbour() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    logits[:, 4] = 5.0
    for temperature in (0.0, 0.01):
        wanted = [Draw(params(temperature=temperature), 7, 0)] * 3
        assert sample(logits.clone(), wanted, ()) == [4, NO_TOKEN, 4]


def test_infinities_and_extremes_are_survived() -> None:
    logits = torch.full((1, 5), float("-inf"))
    logits[0, 3] = 1e30
    for changes in ({}, {"temperature": 1e-5}, {"temperature": 2.0, "top_p": 1e-9}, {"top_k": 1}):
        assert sample(logits.clone(), [Draw(params(**changes), 1, 0)], ()) == [3]
    assert sample(torch.zeros(1, 5), [Draw(params(top_k=500), 1, 0)], ())[0] in range(5)
