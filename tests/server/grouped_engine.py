"""A scheduler over groups of layers, with a model that checks all that it reads.

The runner keeps in each slot the digest of all tokens up to it, as keys and values depend on them.
Before it draws a token it looks up everything that the step's queries see, group by group, and
fails where something else lies there.
"""

import itertools
from collections import deque

import msgspec
from fake_runner import RowMirror, next_token

from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits, RequestError
from octavo.core.scheduler import Scheduler
from octavo.core.step import StepPlan
from octavo.core.swap import SwapSpace
from octavo.params import SamplingParams

VOCAB = 11
EMPTY, VOID = "nothing", "void"
TEXT = [(7 * i + i // 5) % VOCAB for i in range(400)]


class GroupedRunner:
    """Slots hold digests; drawing checks all that the step's queries see.

    Steps are taken when they are submitted and run when they are collected, in order.
    """

    def __init__(self, kv, num_blocks, num_host_blocks=0):
        self.kv = kv
        self.slots = [EMPTY] * ((num_blocks + 1) * kv.block_size)
        self.host = [EMPTY] * ((num_host_blocks + 1) * kv.block_size)
        self.rows = RowMirror()

    def submit(self, plan):
        self.rows.follow(plan)
        replace = msgspec.structs.replace
        shares = [replace(s, block_table=list(s.block_table)) for s in plan.sequences]
        return StepPlan(tuple(shares), plan.copies, swap_out=plan.swap_out, swap_in=plan.swap_in)

    def collect(self, step):
        """Tokens drawn by the step, which must be the first of those not yet collected."""
        for source, target in step.swap_out:
            self.copy(self.slots, source, self.host, target)
        for source, target in step.swap_in:
            self.copy(self.host, source, self.slots, target)
        for source, target in step.copies:
            self.copy(self.slots, source, self.slots, target)
        for share in step.sequences:
            self.write(share)
        return [self.draw(share) for share in step.sequences if self.check(share)]

    def copy(self, source, from_block, target, to_block):
        size = self.kv.block_size
        block = source[from_block * size : (from_block + 1) * size]
        target[to_block * size : (to_block + 1) * size] = block

    def write(self, share):
        """What a step makes of a token that was not drawn, for its sequence is over, is void."""
        end = share.start + len(share.token_ids)
        digests = digests_of(share.tokens[:end])
        digests += [VOID] * (end - len(digests))
        for group in range(self.kv.count if share.writes else 0):
            for position in range(share.start, end):
                self.slots[self.slot(share, group, position)] = digests[position]

    def slot(self, share, group, position):
        block = share.block_table[position // self.kv.block_size * self.kv.count + group]
        assert block > 0, f"no block for position {position} of group {group}"
        return block * self.kv.block_size + position % self.kv.block_size

    def check(self, share):
        end = share.start + len(share.token_ids)
        digests = digests_of(share.tokens[:end])
        assert len(share.block_table) == self.kv.rows(end) * self.kv.count
        if len(digests) < end:
            return share.samples
        for group, window in enumerate(self.kv.windows):
            first = 0 if window is None else max(0, share.start + 1 - window)
            for position in range(first, end):
                found = self.slots[self.slot(share, group, position)]
                assert found == digests[position], f"group {group}, position {position}"
        return share.samples

    def draw(self, share):
        return next_token(share.tokens[: share.start + len(share.token_ids)], VOCAB, share.branch)


def digests_of(tokens):
    return list(itertools.accumulate(tokens, lambda a, b: hash((a, b)), initial=0))[1:]


class Engine:
    """Admits by hope. With `host_blocks` it swaps where `recompute(tokens)`, in copies of a block
    there and back, is more than there are blocks.
    """

    def __init__(self, windows, *, blocks=64, block_size=4, budget=64, seqs=8, context=128,
                 caching=True, eos=(), policy="fcfs", host_blocks=0, depth=1,
                 large_step=None, offline=False, recompute=lambda tokens: 1e9):  # fmt: skip
        limits = Limits(
            block_size=block_size,
            max_model_len=context,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            eos_token_ids=frozenset(eos),
            enable_prefix_caching=caching,
            kv_windows=tuple(windows),
            large_step=large_step,
            offline=offline,
        )
        self.swap = SwapSpace(host_blocks, 0.5, recompute) if host_blocks else None
        self.scheduler = Scheduler(
            BlockPool(blocks), PolicyFactory.get_policy(policy), limits, self.swap
        )
        self.scheduler.output_lengths.mean = 0
        self.scheduler.output_lengths.observe = lambda _: None
        self.kv = limits.kv
        self.runner = GroupedRunner(limits.kv, blocks, host_blocks)
        self.depth, self.in_flight = depth, deque()
        self.outputs, self.cached, self.computed = {}, {}, 0

    def add(self, name, prompt, max_tokens=4, n=1, **asked):
        params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, **asked)
        self.scheduler.add(name, list(prompt), params)

    def step(self, logprobs=lambda step: {}):
        """Plan as far ahead as may be, then take in the first of the steps in flight."""
        newest = StepPlan()
        while len(self.in_flight) < self.depth and self.scheduler.may_plan:
            plan = self.scheduler.plan()
            if not plan.num_sequences:
                assert not plan.swap_in
                break
            newest = plan
            self.computed += plan.num_tokens
            self.in_flight.append((plan, self.runner.submit(plan)))
        if not self.in_flight:
            assert not self.scheduler.has_work, "work, and nobody moved"
            return newest
        plan, step = self.in_flight.popleft()
        drawn = self.runner.collect(step)
        for update in self.scheduler.commit(plan, drawn, logprobs(step)):
            assert update.error is None
            self.outputs.setdefault((update.request_id, update.index), []).extend(update.token_ids)
            self.cached[update.request_id] = update.cached_tokens
        self.scheduler.check_integrity()
        return newest

    def finish(self):
        while self.scheduler.has_work:
            self.step()
        while self.in_flight:
            plan, step = self.in_flight.popleft()
            assert self.scheduler.commit(plan, self.runner.collect(step)) == []
        assert self.scheduler.pool.counts.active == 0
        return self.outputs

    def run(self, prompt, max_tokens=1):
        name = f"r{len(self.outputs)}"
        self.add(name, prompt, max_tokens)
        assert self.finish()[name, 0] == sample(prompt, 0, max_tokens)
        return self.cached[name]


def sample(prompt, branch, count):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens, VOCAB, branch))
    return tokens[len(prompt) :]


def run_traffic(engine, rng):
    """Adds, aborts and steps at random, to the end: who was not aborted has all of its tokens."""
    wanted, aborted = {}, set()
    for i in range(rng.randint(4, 12)):
        prompt = TEXT[: rng.randint(1, 30)] + [rng.randrange(VOCAB)] * rng.randint(0, 4)
        n, count = rng.choice([1, 1, 2, 3]), rng.randint(1, 50)
        try:
            engine.add(f"r{i}", prompt, count, n)
        except RequestError:
            continue
        room = engine.scheduler._roster.by_request[f"r{i}"].lead.max_new_tokens
        wanted |= {(f"r{i}", b): sample(prompt, b, min(room, count)) for b in range(n)}
        for _ in range(rng.randint(0, 3)):
            engine.step()
        if rng.random() < 0.2:
            victim = f"r{rng.randint(0, i)}"
            aborted.update(
                (victim, u.index) for u in engine.scheduler.abort(victim, rng.choice([None, 0]))
            )
    engine.finish()
    for key, tokens in wanted.items():
        got = engine.outputs.get(key, [])
        assert got == tokens[: len(got)]
        assert len(got) == len(tokens) or key in aborted
