"""Several samples of one request: one prompt, shared blocks, copies on the first write."""

from dataclasses import replace

import pytest
from fake_runner import FakeRunner, next_token

from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits, RequestError
from octavo.core.scheduler import Scheduler
from octavo.params import ParameterError, SamplingParams

VOCAB = 97
TEXT = [3 * i % VOCAB for i in range(64)]


class Engine:
    """A scheduler with a fake model that reads its context back from the blocks."""

    def __init__(
        self, *, blocks=64, block_size=4, budget=64, seqs=8, caching=True, eos=(), policy="fcfs"
    ):
        limits = Limits(
            block_size=block_size,
            max_model_len=128,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            eos_token_ids=frozenset(eos),
            enable_prefix_caching=caching,
        )
        self.scheduler = Scheduler(BlockPool(blocks), PolicyFactory.get_policy(policy), limits)
        self.scheduler.output_lengths.mean = 0
        self.runner = FakeRunner(
            "", device="", dtype="", max_model_len=128, block_size=block_size,
            progress=lambda *_: None,
        )  # fmt: skip
        self.runner.allocate_kv(blocks + 1)
        self.outputs = {}
        self.computed = 0

    def add(self, name, prompt, n=1, max_tokens=8, priority=0, **asked):
        asked = SamplingParams(n=n, max_tokens=max_tokens, **asked)
        self.scheduler.add(name, list(prompt), asked, priority=priority)

    def step(self):
        plan = self.scheduler.plan()
        self.computed += plan.num_tokens
        for update in self.scheduler.commit(plan, self.runner.execute(plan).tokens):
            self.outputs.setdefault((update.request_id, update.index), []).extend(update.token_ids)
        self.scheduler.check_integrity()
        return plan

    def finish(self):
        while self.scheduler.has_work:
            self.step()
        assert self.scheduler.pool.counts.active == 0
        return self.outputs


def sample(prompt, branch, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens, VOCAB, branch))
    return tokens[len(prompt) :]


def test_the_prompt_runs_once_and_all_samples_are_drawn_in_one_step():
    engine = Engine()
    engine.add("a", TEXT[:10], n=4)
    plan = engine.step()
    assert [(s.branch, s.start, len(s.token_ids), s.samples, s.writes) for s in plan.sequences] == [
        (0, 0, 10, True, True),
        *((branch, 9, 1, True, False) for branch in (1, 2, 3)),
    ]
    counts = engine.scheduler.pool.counts
    assert (counts.active, counts.shared) == (3, 3)
    assert engine.scheduler.counters.prompt_tokens == 10
    assert engine.finish() == {("a", b): sample(TEXT[:10], b, 8) for b in range(4)}


def test_a_shared_block_is_copied_by_all_but_the_last_who_write_to_it():
    engine = Engine()
    engine.add("a", TEXT[:10], n=4)
    engine.step()
    plan = engine.step()
    # Two full blocks stay shared; the third, half full, is copied three times.
    assert len(plan.copies) == 3
    assert len({source for source, _ in plan.copies}) == 1
    counts = engine.scheduler.pool.counts
    assert (counts.active, counts.shared) == (2 + 4, 2)
    assert engine.step().copies == ()
    assert engine.scheduler.counters.copies == 3


def test_after_a_prompt_of_whole_blocks_nothing_is_copied():
    engine = Engine()
    engine.add("a", TEXT[:8], n=4)
    engine.finish()
    assert engine.scheduler.counters.copies == 0


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 128])
@pytest.mark.parametrize("budget", [4, 7, 64])
@pytest.mark.parametrize("caching", [False, True])
def test_samples_depend_on_no_setting_and_no_preemption(block_size, budget, caching):
    preemptions = 0
    shared = 19 // block_size
    least = shared + 4 * (-(-26 // block_size) - shared)  # for the largest, the fifth
    for blocks in (least, least + 2, 3 * least):
        engine = Engine(
            blocks=blocks, block_size=block_size, budget=budget, caching=caching, seqs=9
        )
        wanted = {}
        for i, n in enumerate((4, 1, 3, 2, 4, 1, 2)):
            prompt = TEXT[i : i + 3 + 4 * i]
            engine.add(f"r{i}", prompt, n=n, max_tokens=3 + i)
            wanted |= {(f"r{i}", b): sample(prompt, b, 3 + i) for b in range(n)}
        assert engine.finish() == wanted
        preemptions += engine.scheduler.counters.preemptions
    if block_size < 16 and budget > 7:
        assert preemptions > 0, "the test means less without preemptions"


def test_a_preempted_group_leaves_and_returns_as_one():
    engine = Engine(blocks=14, caching=False)
    engine.add("a", TEXT[:8], n=2, max_tokens=16)
    engine.add("b", TEXT[20:30], n=3, max_tokens=12)
    preempted = []
    while engine.scheduler.has_work:
        preempted.append(engine.step().preempted)
    assert set(preempted) == {(), (2, 3, 4)}
    assert engine.outputs == {
        **{("a", b): sample(TEXT[:8], b, 16) for b in range(2)},
        **{("b", b): sample(TEXT[20:30], b, 12) for b in range(3)},
    }


def test_a_rebuilt_group_shares_its_prompt_again():
    engine = Engine(blocks=14, caching=False)
    engine.add("a", TEXT[:8], n=1, max_tokens=40)
    engine.add("b", TEXT[20:30], n=3, max_tokens=12)
    while not engine.scheduler.counters.preemptions:
        engine.step()
    engine.scheduler.abort("a")
    before = engine.computed
    assert len(engine.outputs["b", 0]) > 1
    assert engine.finish()["b", 2] == sample(TEXT[20:30], 2, 12)
    # The prompt ran once, and of each sample all but the last token.
    assert engine.computed - before == 10 + 3 * 11


def test_each_branch_of_a_rebuilt_group_finds_what_is_left_of_its_blocks():
    engine = Engine(blocks=14)
    engine.add("a", TEXT[:8], n=1, max_tokens=40)
    engine.add("b", TEXT[20:30], n=3, max_tokens=12)
    while not engine.scheduler.counters.preemptions:
        engine.step()
    engine.scheduler.abort("a")
    drawn = len(engine.outputs["b", 0])
    assert drawn >= 3, "or no block is full but those of the prompt"
    before = engine.computed
    assert engine.finish()["b", 2] == sample(TEXT[20:30], 2, 12)
    # Of each sample what is yet to be drawn, and at most a block that was not full or was taken.
    assert engine.computed - before <= 3 * (12 - drawn) + 4 * 4


def test_a_rebuilt_group_never_holds_a_second_copy_of_its_prompt(monkeypatch):
    """The pool was promised to hold it with one; with more it might wait for blocks for ever."""
    engine = Engine(blocks=14)
    engine.add("a", TEXT[:8], n=1, max_tokens=40)
    engine.add("b", TEXT[20:30], n=3, max_tokens=12)
    while not engine.scheduler.counters.preemptions:
        engine.step()
    engine.scheduler.abort("a")
    cache, real = engine.scheduler.prefix_cache, engine.scheduler.prefix_cache.find

    def others(sequence, joined_at=None):
        found = real(sequence, joined_at)
        return replace(found, table=found.table[::-1]) if sequence.branch else found

    monkeypatch.setattr(cache, "find", others)
    wanted = {("b", b): sample(TEXT[20:30], b, 12) for b in range(3)}
    outputs = engine.finish()
    assert {key: outputs[key] for key in wanted} == wanted


def test_samples_end_one_by_one_and_give_their_blocks_back():
    first = [sample(TEXT[:10], b, 1)[0] for b in range(3)]
    engine = Engine(eos={first[0]})
    engine.add("a", TEXT[:10], n=3)
    engine.step()
    assert engine.outputs["a", 0] == []
    assert [s.branch for s in engine.scheduler.running] == [1, 2]
    engine.finish()
    assert engine.outputs["a", 2][0] == first[2]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_one_sample_can_be_aborted_alone(steps):
    engine = Engine()
    engine.add("a", TEXT[:10], n=3)
    for _ in range(steps):
        engine.step()
    (update,) = engine.scheduler.abort("a", 0)
    assert (update.index, update.finish_reason) == (0, "abort")
    assert engine.scheduler.abort("a", 0) == []
    outputs = engine.finish()
    assert {k: v for k, v in outputs.items() if k[1]} == {
        ("a", b): sample(TEXT[:10], b, 8) for b in (1, 2)
    }


def test_an_exact_repeat_is_found_by_all_samples():
    engine = Engine()
    engine.add("a", TEXT[:16])
    engine.finish()
    engine.add("b", TEXT[:16], n=3)
    plan = engine.step()
    assert [(s.start, s.writes) for s in plan.sequences] == [(15, False)] * 3
    assert engine.finish()["b", 1] == sample(TEXT[:16], 1, 8)


REFUSED = [
    ({"n": 9}, RequestError, "asks for 9 samples at once; at most 8"),
    ({"n": 8, "max_tokens": 60}, RequestError, "8 samples of 60 tokens .* at most 26 tokens each"),
    ({"n": 0}, ParameterError, "n must be a whole number in 1..128, got 0"),
    ({"n": 3, "best_of": 2}, ParameterError, "best_of must be a whole number in 3..128, got 2"),
]


@pytest.mark.parametrize(("asked", "kind", "text"), REFUSED)
def test_a_group_that_cannot_run_is_refused(asked, kind, text):
    engine = Engine(blocks=64)
    with pytest.raises(kind, match=text):
        engine.add("a", TEXT[:10], **asked)
    assert not engine.scheduler.has_work


def test_without_max_tokens_samples_end_where_the_pool_does():
    engine = Engine(blocks=26)
    engine.add("a", TEXT[:10], n=4, max_tokens=None, ignore_eos=True)
    outputs = engine.finish()
    # Two blocks are shared, and each has six more: 32 tokens, 10 of them the prompt.
    assert [len(tokens) for tokens in outputs.values()] == [22] * 4
    assert engine.scheduler.counters.preemptions == 0


def test_best_of_draws_more_than_are_asked_for():
    engine = Engine()
    engine.add("a", TEXT[:10], n=2, best_of=5)
    assert len(engine.finish()) == 5


def test_what_sharing_saves_is_what_theory_says():
    """Blocks for n samples: the prompt's full blocks once, all else n times."""
    for n in (2, 4, 6):
        engine = Engine(blocks=256, block_size=16, seqs=16)
        engine.add("a", TEXT[:57], n=n, max_tokens=40)
        peak = 0
        while engine.scheduler.has_work:
            engine.step()
            peak = max(peak, engine.scheduler.pool.counts.active)
        # The last token drawn never enters the cache: 96 tokens, 6 blocks each, 3 of them shared.
        assert peak == 3 + 3 * n


def test_what_a_rebuilt_lead_filled_is_not_found_once_another_branch_writes_there():
    """The lead of a rebuilt group fills the block in which the prompt ends, and may end first."""
    engine = Engine(blocks=11, block_size=16, budget=8, seqs=5, policy="priority")
    requests = [
        ([7] * 10, 3, 5, 1, 4),
        ([7, 9], 1, 38, -1, 0),
        ([9, 9, 3, 10, 5, 4, 9, 1, 9, 0, 6, 6, 0, 0, 0, 10, 9, 1, 5], 1, 21, 0, 0),
        ([7] * 9 + [0, 0, 1], 3, 25, 1, 4),
        ([7] * 9 + [1, 0], 1, 2, -1, 0),
        ([0, 6, 9, 6, 7, 5, 1], 3, 2, 1, 1),
    ]
    wanted = {}
    for i, (prompt, n, max_tokens, priority, steps) in enumerate(requests):
        engine.add(f"r{i}", prompt, n=n, max_tokens=max_tokens, priority=priority)
        wanted |= {(f"r{i}", b): sample(prompt, b, max_tokens) for b in range(n)}
        for _ in range(steps):
            engine.step()
    assert engine.finish() == wanted
