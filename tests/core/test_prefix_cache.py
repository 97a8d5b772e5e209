"""The prefix cache: what is found, what is not, what is evicted, and that tokens never change."""

import pytest
from fake_runner import FakeRunner, next_token

from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.step import NO_TOKEN
from octavo.params import SamplingParams

VOCAB = 97
TEXT = [3 * i % VOCAB for i in range(64)]


class Engine:
    """A scheduler with a fake model that reads its context back from the blocks."""

    def __init__(self, *, blocks=64, block_size=4, budget=64, seqs=8, caching=True):
        limits = Limits(
            block_size=block_size,
            max_model_len=128,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            eos_token_ids=frozenset(),
            enable_prefix_caching=caching,
        )
        self.scheduler = Scheduler(BlockPool(blocks), PolicyFactory.get_policy("fcfs"), limits)
        self.runner = FakeRunner(
            "", device="", dtype="", max_model_len=128, block_size=block_size,
            progress=lambda *_: None,
        )  # fmt: skip
        self.runner.allocate_kv(blocks + 1)
        self.names = 0
        self.computed = 0

    def add(self, prompt, max_tokens=1, scope="", name=None, **asked):
        self.names += 1
        name = name or f"r{self.names}"
        asked = SamplingParams(max_tokens=max_tokens, temperature=0, **asked)
        self.scheduler.add(name, list(prompt), asked, scope=scope)
        return name

    def step(self):
        plan = self.scheduler.plan()
        self.computed += plan.num_tokens
        return plan, self.scheduler.commit(plan, self.runner.execute(plan).tokens)

    def finish(self):
        outputs = {}
        while self.scheduler.has_work:
            for update in self.step()[1]:
                outputs.setdefault(update.request_id, []).extend(update.token_ids)
                self.cached = update.cached_tokens
        self.scheduler.check_integrity()
        return outputs

    def run(self, prompt, max_tokens=1, scope=""):
        """One request alone; its tokens, checked, and how many of its prompt were cached."""
        name = self.add(prompt, max_tokens, scope)
        tokens = self.finish()[name]
        assert tokens == continuation(prompt, max_tokens)
        return self.cached


def continuation(prompt, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens, VOCAB))
    return tokens[len(prompt) :]


# Block size 4: the first prompt, the second, and how many tokens of the second are found.
FOUND = [
    (TEXT[:16], TEXT[:16], 15),
    (TEXT[:16], TEXT[:17], 16),
    (TEXT[:16], TEXT[:15], 12),
    (TEXT[:18], TEXT[:18], 16),
    (TEXT[:16], [*TEXT[:9], 1, *TEXT[10:16]], 8),
    (TEXT[:16], TEXT[4:16], 0),
    (TEXT[:16], [1, *TEXT[1:16]], 0),
    (TEXT[:3], TEXT[:3], 0),
    (TEXT[:4], TEXT[:4], 3),
    ([5] * 8, [5] * 12, 8),
]


@pytest.mark.parametrize(("first", "second", "found"), FOUND)
def test_equal_beginnings_are_found_by_whole_blocks(first, second, found):
    engine = Engine()
    assert engine.run(first) == 0
    before = engine.computed
    assert engine.run(second) == found
    assert engine.computed - before == len(second) - found
    counters = engine.scheduler.prefix_cache.counters
    assert (counters.queries, counters.hits) == (len(first) + len(second), found)


def test_an_exact_repeat_runs_its_last_token_alone_and_writes_nothing():
    engine = Engine()
    engine.run(TEXT[:16])
    engine.add(TEXT[:16], 3)
    plan, _ = engine.step()
    (share,) = plan.sequences
    assert (share.start, share.token_ids, share.writes) == (15, TEXT[15:16], False)
    plan, _ = engine.step()
    assert plan.sequences[0].writes
    # Two readers of the same last block at once, and neither disturbs the other.
    engine.finish()
    names = [engine.add(TEXT[:16], 6), engine.add(TEXT[:16], 4)]
    outputs = engine.finish()
    assert [outputs[n] for n in names] == [continuation(TEXT[:16], n) for n in (6, 4)]


def test_generated_tokens_are_found_too():
    engine = Engine()
    engine.run(TEXT[:10], 9)
    conversation = TEXT[:10] + continuation(TEXT[:10], 9) + [1, 2, 3]
    # 19 tokens, the last of which never entered the cache: 18, or four whole blocks.
    assert engine.run(conversation) == 16


def test_scopes_do_not_see_each_other():
    engine = Engine()
    engine.run(TEXT[:16], scope="a")
    assert engine.run(TEXT[:16], scope="b") == 0
    assert engine.run(TEXT[:16]) == 0
    assert engine.run(TEXT[:16], scope="a") == 15


def test_log_probabilities_of_a_prompt_need_all_of_it():
    engine = Engine()
    engine.run(TEXT[:16])
    engine.add(TEXT[:16], prompt_logprobs=1)
    assert engine.step()[0].num_tokens == 16


def test_without_caching_nothing_is_kept():
    engine = Engine(caching=False)
    engine.run(TEXT[:16])
    assert engine.run(TEXT[:16]) == 0
    assert engine.scheduler.pool.counts.cached == 0
    assert engine.scheduler.prefix_cache.counters.queries == 0


def test_running_sequences_share_blocks():
    engine = Engine()
    engine.add(TEXT[:16], 20)
    engine.step()
    engine.add(TEXT[:18], 20)
    engine.step()
    counts = engine.scheduler.pool.counts
    assert (counts.shared, counts.active) == (4, 6)
    assert engine.finish().keys() == {"r1", "r2"}
    assert engine.scheduler.pool.counts.active == 0


def test_blocks_that_somebody_holds_are_not_asked_for_at_admission():
    engine = Engine(blocks=8)
    engine.scheduler.output_lengths.mean = 1
    engine.add(TEXT[:24], 4)
    engine.step()
    # 7 blocks, but 6 are there; 2 are free.
    engine.add(TEXT[:25], 1)
    plan, _ = engine.step()
    assert [s.start for s in plan.sequences] == [24, 24]


def test_blocks_found_in_the_cache_count_as_taken_at_admission():
    engine = Engine(blocks=8)
    engine.run(TEXT[:16])
    engine.scheduler.output_lengths.mean = 1
    engine.add([9] * 20, 2)
    engine.step()
    assert engine.scheduler.pool.num_free == 3
    engine.add(TEXT[:13], 1)
    plan, _ = engine.step()
    assert len(plan.sequences) == 1, "3 cached blocks and a new one are 4"
    engine.finish()


def test_what_was_never_found_is_evicted_first():
    engine = Engine(blocks=8)
    engine.run(TEXT[:8])
    engine.run(TEXT[:8])
    engine.run(TEXT[20:28])
    assert engine.scheduler.pool.counts.cached == 4
    # Older, but found once, so that the blocks of the other go first.
    engine.run([1] * 23)
    assert engine.run(TEXT[:8]) == 7
    assert engine.run(TEXT[20:28]) == 0


def test_the_end_of_a_chain_is_evicted_before_its_beginning():
    engine = Engine(blocks=8)
    engine.run(TEXT[:16])
    engine.run([1] * 23)
    assert engine.run(TEXT[:16]) == 8


def test_blocks_with_logits_that_are_not_numbers_are_not_found_again():
    engine = Engine(budget=8)
    engine.add(TEXT[:16], name="bad")
    engine.step()
    assert len(engine.scheduler.pool._key_of) == 2
    plan = engine.scheduler.plan()
    engine.runner.execute(plan)
    (update,) = engine.scheduler.commit(plan, [NO_TOKEN])
    assert update.finish_reason == "error"
    assert engine.scheduler.pool.counts.free == 64
    assert engine.run(TEXT[:16]) == 0


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks():
    def tokens_run(caching):
        engine = Engine(blocks=9, caching=caching)
        engine.scheduler.output_lengths.mean = 0
        names = [engine.add(TEXT[:8], 16), engine.add(TEXT[20:28], 16)]
        outputs = engine.finish()
        assert [outputs[n] for n in names] == [
            continuation(TEXT[:8], 16),
            continuation(TEXT[20:28], 16),
        ]
        assert engine.scheduler.counters.preemptions > 0
        hits = engine.scheduler.prefix_cache.counters.hits
        assert hits == 0, "a replay is not a hit"
        return engine.computed

    assert tokens_run(True) < tokens_run(False)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 16, 128])
@pytest.mark.parametrize("budget", [1, 5, 64])
@pytest.mark.parametrize("blocks", [1, 3])
def test_tokens_do_not_depend_on_hits(block_size, budget, blocks):
    """A pool of one to three times what the longest needs, so that it evicts and preempts."""
    pool = blocks * -(-60 // block_size)
    prompts = [TEXT[: 4 + 7 * i % 40] for i in range(12)] + [TEXT[:16]] * 3
    outputs = []
    for caching in (False, True):
        engine = Engine(blocks=pool, block_size=block_size, budget=budget, caching=caching)
        engine.scheduler.output_lengths.mean = 0
        names = [engine.add(prompt, 3 + i) for i, prompt in enumerate(prompts)]
        done = engine.finish()
        outputs.append([done[n] for n in names])
    expected = [continuation(prompt, 3 + i) for i, prompt in enumerate(prompts)]
    assert outputs == [expected, expected]
