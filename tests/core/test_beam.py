"""Beam search through the scheduler, against a search over plain lists."""

import math

import pytest
from beam_oracle import EOS, VOCAB, BeamRunner, plain_search
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core import scheduler
from octavo.core.beam import BeamSearch, run_alike
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits, RequestError
from octavo.core.scheduler import Scheduler
from octavo.core.sequence import common_prefix
from octavo.core.step import NO_TOKEN
from octavo.logprobs import TokenLogprobs
from octavo.params import ParameterError, SamplingParams

CONTEXT = 96


class Engine:
    def __init__(
        self, *, blocks=256, block_size=4, budget=64, seqs=16, caching=True, make=Scheduler
    ):
        limits = Limits(
            block_size=block_size,
            max_model_len=CONTEXT,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            eos_token_ids=frozenset({EOS}),
            enable_prefix_caching=caching,
        )
        self.scheduler = make(BlockPool(blocks), PolicyFactory.get_policy("fcfs"), limits)
        self.scheduler.output_lengths.mean = 0
        self.runner = BeamRunner(
            "", device="", dtype="", max_model_len=CONTEXT, block_size=block_size,
            progress=lambda *_: None,
        )  # fmt: skip
        self.runner.allocate_kv(blocks + 1)
        self.updates = {}
        self.peak = 0

    def add(self, name, prompt, width, max_tokens, n=1, **asked):
        params = SamplingParams(
            use_beam_search=True, temperature=0, n=n, best_of=width, max_tokens=max_tokens, **asked
        )
        self.scheduler.add(name, list(prompt), params)

    def step(self):
        plan = self.scheduler.plan()
        result = self.runner.execute(plan)
        for update in self.scheduler.commit(plan, result.tokens, result.logprobs):
            self.updates.setdefault(update.request_id, []).append(update)
        self.scheduler.check_integrity()
        self.peak = max(self.peak, self.scheduler.pool.counts.active)
        return plan

    def finish(self):
        while self.scheduler.has_work:
            self.step()
        assert self.scheduler.pool.counts.active == 0
        return self.updates


def check(updates, expected, n):
    assert [u.index for u in updates] == list(range(n))
    for update, (score, tokens) in zip(updates, expected, strict=False):
        ended = tokens[-1] == EOS
        assert update.token_ids == (tokens[:-1] if ended else tokens)
        assert update.stop_token_id == (EOS if ended else None)
        assert update.finish_reason == ("stop" if ended else "length")
        assert update.score == pytest.approx(score, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    width=st.integers(1, 5),
    most=st.integers(1, 14),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    early=st.sampled_from([True, False, "never"]),
    block_size=st.sampled_from([1, 2, 4, 16]),
    data=st.data(),
)
def test_a_search_through_the_scheduler_finds_what_a_plain_one_finds(
    prompt, width, most, penalty, early, block_size, data
):
    n = data.draw(st.integers(1, width))
    engine = Engine(block_size=block_size, budget=data.draw(st.sampled_from([5, 7, 64])))
    engine.add("a", prompt, width, most, n, length_penalty=penalty, early_stopping=early)
    check(engine.finish()["a"], plain_search(prompt, width, most, penalty, early), n)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("budget", [4, 9, 64])
def test_searches_are_preempted_and_rebuilt_to_the_same_tokens(block_size, budget, caching):
    prompts = [[(5 * i + j) % VOCAB for j in range(3 + 4 * i)] for i in range(5)]
    shared = len(prompts[-1]) // block_size
    least = shared + 4 * (-(-(len(prompts[-1]) + 16) // block_size) - shared)
    engine = Engine(blocks=least, block_size=block_size, budget=budget, caching=caching)
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, 4, 16, length_penalty=0.0, early_stopping="never")
    engine.scheduler.add("plain", [1, 2], SamplingParams(max_tokens=30, ignore_eos=True))
    updates = engine.finish()
    for i, prompt in enumerate(prompts):
        check(updates[f"r{i}"], plain_search(prompt, 4, 16, 0.0, "never"), 1)
    assert len(updates["plain"]) == 30
    if block_size < 16 and budget == 64:
        assert engine.scheduler.counters.preemptions > 0


class BranchByBranch(Scheduler):
    def _step_search(self, group, draft):
        return False


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("blocks", [31, 256])
def test_a_search_is_planned_at_once_as_it_is_branch_by_branch(blocks, caching, monkeypatch):
    engines = [
        Engine(blocks=blocks, block_size=2, budget=18, caching=caching, make=make)
        for make in (Scheduler, BranchByBranch)
    ]
    for engine in engines:
        for i in range(5):
            prompt = [(5 * i + j) % VOCAB for j in range(3 + i)]
            engine.add(f"r{i}", prompt, 4, 8 + i, length_penalty=0.0, early_stopping="never")
        engine.scheduler.add("plain", [1, 2], SamplingParams(max_tokens=12, ignore_eos=True))
    at_once, copies = 0, 0

    def counted(*args):
        nonlocal at_once
        found = run_alike(*args)
        at_once += found is not None
        return found

    monkeypatch.setattr(scheduler, "run_alike", counted)
    while engines[0].scheduler.has_work:
        plan, expected = (engine.step() for engine in engines)
        assert plan.chunks == expected.chunks
        assert (plan.copies, plan.preempted) == (expected.copies, expected.preempted)
        copies += len(plan.copies)
    assert engines[0].updates == engines[1].updates
    assert copies > 20
    assert at_once > 20
    assert (engines[0].scheduler.counters.preemptions > 0) == (blocks < 256)


def test_beams_share_what_they_have_in_common():
    engine = Engine(block_size=4)
    engine.add("a", list(range(4, 20)), 4, 40, early_stopping="never", length_penalty=5.0)
    distinct = tables = 0
    while engine.scheduler.has_work:
        engine.step()
        held = [block for s in engine.scheduler.running for block in s.block_table]
        distinct, tables = distinct + len(set(held)), tables + len(held)
    assert distinct < 0.55 * tables


LOGPROBS = st.sampled_from([-math.inf, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0])  # many are equal


@given(
    scores=st.lists(LOGPROBS, min_size=1, max_size=4),
    drawn=st.lists(st.lists(LOGPROBS, min_size=8, max_size=8), min_size=4, max_size=4),
)
def test_the_best_continuations_are_those_of_all_in_order(scores, drawn):
    beam = BeamSearch(
        width=4, length_penalty=1.0, early_stopping=False, max_new_tokens=9, stop_ids=frozenset()
    )
    beam.scores = scores
    lists = [sorted(own, reverse=True) for own in drawn]
    beam.candidates = {
        i: TokenLogprobs(0, 0.0, 1, list(range(8)), own) for i, own in enumerate(lists)
    }
    every = [
        (score + logprob, branch, token)
        for branch, score in enumerate(scores)
        if score > -math.inf
        for token, logprob in enumerate(lists[branch])
    ]
    assert list(beam._ranked()) == sorted(every, key=lambda one: -one[0])


def test_no_more_candidates_are_asked_for_than_there_are_tokens():
    engine = Engine(seqs=VOCAB)
    engine.add("a", [4, 5, 6], VOCAB, 4)
    plan = engine.step()
    assert plan.sequences[0].params.logprobs == VOCAB
    engine.finish()


def test_stop_ids_leave_enough_candidates_to_go_on():
    beam = BeamSearch(
        width=3, length_penalty=1.0, early_stopping=False, max_new_tokens=9,
        stop_ids=frozenset({4, 5}),
    )  # fmt: skip
    drawn = TokenLogprobs(4, -0.1, 1, [4, 5, 6, 7, 8], [-0.1, -0.2, -0.3, -0.4, -0.5])
    assert beam.num_candidates == len(drawn.top_ids)
    beam.candidates = dict.fromkeys(range(3), drawn)  # at first they are all alike
    assert beam.advance(0, lambda _: []) == [(0, 6), (0, 7), (0, 8)]
    assert [(one.score, one.stop_token_id) for one in beam.finished] == [(-0.1, 4), (-0.2, 5)]


@given(left=st.lists(st.integers(0, 1)), right=st.lists(st.integers(0, 1)))
def test_tables_are_compared_from_their_beginnings(left, right):
    expected = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    assert common_prefix(left, right) == expected
    assert common_prefix(left, left + right) == len(left)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_search_is_aborted_as_a_whole(steps):
    engine = Engine()
    engine.add("a", [5] * 9, 4, 30, n=2)
    for _ in range(steps):
        engine.step()
    updates = engine.scheduler.abort("a", 1)
    assert [(u.index, u.finish_reason) for u in updates] == [(0, "abort"), (1, "abort")]
    engine.scheduler.check_integrity()
    assert not engine.scheduler.has_work


def test_logits_that_are_not_numbers_end_a_search():
    engine = Engine()
    engine.add("a", [5] * 9, 3, 30, n=2)
    plan = engine.scheduler.plan()
    updates = engine.scheduler.commit(plan, [NO_TOKEN] * 3)
    assert [(u.index, u.finish_reason) for u in updates] == [(0, "error"), (1, "error")]
    assert "NaN after 9 tokens" in updates[0].error
    assert engine.scheduler.pool.counts.free == 256


REFUSED = [
    ({"temperature": 1.0}, ParameterError, "temperature must be 0 with use_beam_search"),
    ({"top_p": 0.5}, ParameterError, "top_p cannot be combined with use_beam_search"),
    ({"length_penalty": math.nan}, ParameterError, "length_penalty must be a number"),
    ({"early_stopping": "maybe"}, ParameterError, 'true, false or "never", got maybe'),
    ({"best_of": 17}, RequestError, "17 samples at once; at most 16"),
]


@pytest.mark.parametrize(("asked", "kind", "text"), REFUSED)
def test_a_search_that_cannot_be_is_refused(asked, kind, text):
    engine = Engine()
    asked = {"use_beam_search": True, "temperature": 0, "best_of": 4, **asked}
    with pytest.raises(kind, match=text):
        engine.scheduler.add("a", [5], SamplingParams(**asked))
