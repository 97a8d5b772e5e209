"""The loop two steps deep gives every request what the loop one step deep gives it."""

import random
from functools import cache
from pathlib import Path

import llama_checkpoints
import pytest
import torch
from fake_runner import FakeRunner

from octavo import wire
from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.step import PENDING
from octavo.engine.loop import EngineLoop
from octavo.engine.runner import Runner
from octavo.params import SamplingParams

VOCAB = 96


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return llama_checkpoints.write(tmp_path_factory.mktemp("model"))


def make_loop(runner, depth, *, blocks, block_size, budget, seqs=6, caching=True):
    limits = Limits(
        block_size=block_size,
        max_model_len=64,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({2}),
        enable_prefix_caching=caching,
    )
    runner.allocate_kv(blocks + 1)
    scheduler = Scheduler(BlockPool(blocks), PolicyFactory.get_policy("fcfs"), limits)
    return EngineLoop(scheduler, runner, depth=depth)


class Ends:
    """What requests got: by request and sample, everything but how it was cut into messages."""

    def __init__(self):
        self.tokens = {}
        self.logprobs = {}
        self.rest = {}

    def take(self, outputs):
        for o in outputs:
            key = o.request_id, o.index
            assert PENDING not in o.token_ids
            self.tokens.setdefault(key, []).extend(o.token_ids)
            self.logprobs.setdefault(key, []).extend(o.logprobs or [])
            if o.prompt_logprobs is not None:
                assert ("prompt", *key) not in self.rest
                self.rest["prompt", *key] = o.prompt_logprobs
            if o.finish_reason is not None:
                assert key not in self.rest, "two ends"
                self.rest[key] = (o.finish_reason, o.stop_token_id, o.error, o.score)


def run(loop, schedule):
    """Steps, and between them what the schedule says: requests to add, names to abort."""
    ends = Ends()
    loop.scheduler.output_lengths.mean = 0
    for actions in schedule:
        for action in actions:
            if isinstance(action, str):
                loop.abort(action)
            else:
                loop.add(action)
        ends.take(loop.step())
        loop.scheduler.check_integrity()
    while loop.has_work:
        ends.take(loop.step())
        loop.scheduler.check_integrity()
    assert loop.scheduler.pool.counts.active == 0
    return ends


def random_params(rng, *, searches):
    kind = rng.randrange(8 if searches else 6)
    asked = {"max_tokens": rng.randint(1, 24), "ignore_eos": rng.random() < 0.5, "seed": 5}
    if kind == 0:
        asked |= {"temperature": 0}
    elif kind == 1:
        asked |= {"n": rng.randint(2, 3)}
    elif kind == 2:
        asked |= {"temperature": 0, "repetition_penalty": 1.3}
    elif kind == 3:
        asked |= {"top_p": 0.9, "stop_token_ids": tuple(range(0, VOCAB, 7))}
    elif kind == 6:
        asked |= {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1}
    elif kind == 7:
        asked = {"use_beam_search": True, "temperature": 0, "n": 2, "max_tokens": 12}
    return SamplingParams(**asked)


def random_schedule(rng, *, searches, aborts):
    common = [rng.randrange(3, VOCAB) for _ in range(16)]
    schedule, names = [], []
    for _ in range(rng.randint(1, 20)):
        actions = []
        for _ in range(rng.choice([0, 0, 1, 2])):
            prompt = common[: rng.randint(0, 16)]
            prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
            names.append(f"r{len(names)}")
            params = random_params(rng, searches=searches)
            actions.append(wire.AddRequest(names[-1], prompt, params))
        if aborts and names and rng.random() < 0.2:
            actions.append(rng.choice(names))
        schedule.append(actions)
    return schedule


def random_size(rng):
    return {
        "block_size": rng.choice([1, 2, 4, 16]),
        "blocks": rng.choice([14, 20, 40]),
        "budget": rng.choice([6, 16, 64]),
        "caching": rng.random() < 0.5,
    }


def fake(size):
    made = FakeRunner(
        "", device="cpu", dtype="", max_model_len=64, block_size=size["block_size"],
        progress=lambda *_: None,
    )  # fmt: skip
    made.vocab_size = VOCAB
    return made


def test_schedules_without_a_model():
    preempted = hits = 0
    for seed in range(400):
        rng = random.Random(seed)
        schedule, size = random_schedule(rng, searches=False, aborts=seed % 2), random_size(rng)
        loops = [make_loop(fake(size), depth, **size) for depth in (1, 2)]
        once, twice = (run(loop, schedule) for loop in loops)
        aborted = {name for actions in schedule for name in actions if isinstance(name, str)}
        for key, tokens in once.tokens.items():
            if key[0] in aborted:  # wherever each of them stood then
                shorter = min(len(tokens), len(twice.tokens[key]))
                assert tokens[:shorter] == twice.tokens[key][:shorter]
            else:
                assert twice.tokens[key] == tokens
                assert twice.rest[key] == once.rest[key]
        assert once.rest.keys() == twice.rest.keys()
        preempted += loops[1].scheduler.counters.preemptions
        hits += loops[1].scheduler.prefix_cache.counters.hits
    assert preempted > 100
    assert hits > 100


def numbers(ends):
    """Scores and log-probabilities, in an order that is the same for equal ends."""
    found = [ends.rest[key][3] or 0.0 for key in sorted(ends.tokens)]
    for key in sorted(ends.logprobs):
        prompts = ends.rest.get(("prompt", *key), [])
        for one in (*prompts, *ends.logprobs[key]):
            found += [one.logprob, float(one.token_id), *one.top_logprobs]
    return found


def test_schedules_with_a_model(checkpoint):
    """Tokens are equal; the last bits of logits depend on who else is in a step, as ever."""

    @cache
    def runner(block_size):
        return Runner(str(checkpoint), device="cpu", block_size=block_size)

    preempted = 0
    for seed in range(24):
        rng = random.Random(seed)
        schedule, size = random_schedule(rng, searches=True, aborts=False), random_size(rng)
        found = []
        for depth in (1, 2):
            loop = make_loop(runner(size["block_size"]), depth, **size)
            found.append(run(loop, schedule))
        once, twice = found
        assert twice.tokens == once.tokens
        assert numbers(twice) == pytest.approx(numbers(once), abs=1e-4)
        preempted += loop.scheduler.counters.preemptions
    assert preempted > 0


def test_a_stream_decodes_with_one_step_always_in_flight():
    size = {"blocks": 40, "block_size": 4, "budget": 64}
    loop = make_loop(fake(size), 2, **size)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    loop.add(wire.AddRequest("a", [5] * 6, params))
    depths, tokens = [], []
    while loop.has_work:
        (output,) = loop.step()
        tokens += output.token_ids
        depths.append(len(loop._in_flight))
    assert depths == [1] * 9 + [0]
    assert len(tokens) == 10
    assert loop.scheduler.counters.steps == 10, "no step was void"


@pytest.mark.parametrize("depth", [0, 3])
def test_other_depths_are_refused(depth):
    size = {"blocks": 4, "block_size": 4, "budget": 64}
    with pytest.raises(ValueError, match=r"depth must be in 1\.\.2"):
        make_loop(fake(size), depth, **size)


@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_step_that_fails_leaves_a_loop_that_can_end_its_requests(where, monkeypatch):
    size = {"blocks": 40, "block_size": 4, "budget": 64}
    runner = fake(size)
    loop = make_loop(runner, 2, **size)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    loop.add(wire.AddRequest("a", [5] * 6, params))
    loop.step()

    def fail(_):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runner, where, fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            loop.step()
    runner.queue.clear()
    loop.abort_all()
    assert [o.finish_reason for o in loop.step()] == ["abort"]
    loop.scheduler.check_integrity()
    loop.add(wire.AddRequest("b", [5] * 6, params))
    assert sum(len(o.token_ids) for _ in range(10) for o in loop.step()) == 10
