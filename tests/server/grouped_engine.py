"""A scheduler over groups of layers, with a model that checks all that it reads.

The runner keeps in each slot the digest of all tokens up to it, as keys and values depend on them.
Before it draws a token it looks up everything that the step's queries see, group by group, and
fails where something else lies there.
"""

import itertools

from fake_runner import next_token

from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.swap import SwapSpace
from octavo.params import SamplingParams

VOCAB = 11
EMPTY = "nothing"
TEXT = [(7 * i + i // 5) % VOCAB for i in range(400)]


class GroupedRunner:
    """Slots hold digests; drawing checks all that the step's queries see."""

    def __init__(self, kv, num_blocks, num_host_blocks=0):
        self.kv = kv
        self.slots = [EMPTY] * ((num_blocks + 1) * kv.block_size)
        self.host = [EMPTY] * ((num_host_blocks + 1) * kv.block_size)

    def execute(self, plan):
        size = self.kv.block_size
        for source, target in plan.swap_out:
            self.host[target * size : (target + 1) * size] = self.slots[
                source * size : (source + 1) * size
            ]
        for source, target in plan.swap_in:
            self.slots[target * size : (target + 1) * size] = self.host[
                source * size : (source + 1) * size
            ]
        for source, target in plan.copies:
            self.slots[target * size : (target + 1) * size] = self.slots[
                source * size : (source + 1) * size
            ]
        for share in plan.sequences:
            if share.writes:
                digests = digests_of(share.tokens)
                for group in range(self.kv.count):
                    for position in range(share.start, share.start + len(share.token_ids)):
                        self.slots[self.slot(share, group, position)] = digests[position]
        return [self.draw(share) for share in plan.sequences if self.check(share)]

    def slot(self, share, group, position):
        block = share.block_table[position // self.kv.block_size * self.kv.count + group]
        assert block > 0, f"no block for position {position} of group {group}"
        return block * self.kv.block_size + position % self.kv.block_size

    def check(self, share):
        end = share.start + len(share.token_ids)
        assert len(share.block_table) == self.kv.rows(end) * self.kv.count
        digests = digests_of(share.tokens)
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
                 caching=True, eos=(), policy="fcfs", host_blocks=0,
                 recompute=lambda tokens: 1e9):  # fmt: skip
        limits = Limits(
            block_size=block_size,
            max_model_len=context,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            eos_token_ids=frozenset(eos),
            enable_prefix_caching=caching,
            kv_windows=tuple(windows),
        )
        self.swap = SwapSpace(host_blocks, 0.5, recompute) if host_blocks else None
        self.scheduler = Scheduler(
            BlockPool(blocks), PolicyFactory.get_policy(policy), limits, self.swap
        )
        self.scheduler.output_lengths.mean = 0
        self.scheduler.output_lengths.observe = lambda _: None
        self.kv = limits.kv
        self.runner = GroupedRunner(limits.kv, blocks, host_blocks)
        self.outputs, self.cached, self.computed = {}, {}, 0

    def add(self, name, prompt, max_tokens=4, n=1, **asked):
        params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, **asked)
        self.scheduler.add(name, list(prompt), params)

    def step(self):
        plan = self.scheduler.plan()
        self.computed += plan.num_tokens
        for update in self.scheduler.commit(plan, self.runner.execute(plan)):
            assert update.error is None
            self.outputs.setdefault((update.request_id, update.index), []).extend(update.token_ids)
            self.cached[update.request_id] = update.cached_tokens
        self.scheduler.check_integrity()
        return plan

    def finish(self):
        while self.scheduler.has_work:
            assert self.step().sequences, "work, and nobody moved"
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
