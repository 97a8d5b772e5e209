"""The scheduler under random adds, aborts and steps, against running each request alone.

The runner's next token is a pure function of the tokens it finds in its own cache through the block
tables. So equality with the lonely run proves at once that outputs depend neither on batch mates,
block size, chunks, budget, preemption nor the number of steps in flight, and that no block was in
two hands. Beam searches are compared with a search over plain lists.
"""

import math
from collections import deque

import pytest
from beam_oracle import BeamRunner, plain_search
from fake_runner import next_token
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits, RequestError
from octavo.core.scheduler import Scheduler
from octavo.core.sequence import blocks_for
from octavo.params import SamplingParams

VOCAB = 11
EOS = 3
CONTEXT = 40


def alone(prompt, params, room, branch=0):
    """The whole output of one sample of a request, by the definition of each parameter."""
    stops = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    limit = min(room, params.max_tokens or room)
    output = []
    while True:
        token = next_token([*prompt, *output], VOCAB, branch)
        if token in stops and len(output) >= params.min_tokens:
            return output, "stop", token
        output.append(token)
        if len(output) == limit:
            return output, "length", None


def searched(prompt, params, room):
    """The outputs of a beam search, best first, each with its score."""
    stops = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    limit = min(room, params.max_tokens or room)
    found = plain_search(
        prompt, params.branches, limit, params.length_penalty, params.early_stopping, stops, VOCAB
    )
    outputs = []
    for score, tokens in found[: params.n]:
        ended = tokens[-1] in stops
        stop = tokens[-1] if ended else None
        output = tokens[:-1] if ended else tokens
        outputs.append(((output, "stop" if ended else "length", stop), score))
    return outputs


SAMPLES = st.builds(
    lambda branches, max_tokens, least, stops, ignore_eos: SamplingParams(
        n=branches,
        max_tokens=max_tokens,
        min_tokens=min(least, max_tokens or CONTEXT),
        stop_token_ids=tuple(stops),
        ignore_eos=ignore_eos,
    ),
    st.sampled_from([1, 1, 1, 2, 3, 4]),
    st.one_of(st.none(), st.integers(1, 30)),
    st.integers(0, 8),
    st.lists(st.integers(0, VOCAB - 1), max_size=1),
    st.booleans(),
)
SEARCHES = st.builds(
    lambda n, more, max_tokens, stops, ignore_eos, penalty, early: SamplingParams(
        use_beam_search=True,
        temperature=0,
        n=n,
        best_of=n + more,
        max_tokens=max_tokens,
        stop_token_ids=tuple(stops),
        ignore_eos=ignore_eos,
        length_penalty=penalty,
        early_stopping=early,
    ),
    st.integers(1, 2),
    st.integers(0, 1),
    st.one_of(st.none(), st.integers(1, 30)),
    st.lists(st.integers(0, VOCAB - 1), max_size=1),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([True, False, "never"]),
)
PARAMS = st.one_of(SAMPLES, SAMPLES, SAMPLES, SEARCHES)
# Half of the prompts are runs of one token, so that many begin alike.
PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT + 2),
    st.builds(
        lambda n, tail: [7] * n + tail, st.integers(1, 32), st.lists(st.integers(0, 1), max_size=4)
    ),
)
SCOPES = st.sampled_from(["", "", "tenant"])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 2, 3, 16]),
        num_blocks=st.integers(2, 14),
        budget=st.integers(1, 24),
        seqs=st.integers(1, 6),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.booleans(),
        depth=st.sampled_from([1, 2, 2]),
        hopeful=st.booleans(),
        times=st.sampled_from([None, 1, 2, 4]),
        offline=st.booleans(),
    )
    def make(
        self, block_size, num_blocks, budget, seqs, policy, caching, depth, hopeful, times, offline
    ):
        limits = Limits(
            block_size=block_size,
            max_model_len=CONTEXT,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            vocab_size=VOCAB,
            eos_token_ids=frozenset({EOS}),
            enable_prefix_caching=caching,
            large_step=times and times * budget,
            offline=offline,
        )
        self.policy = policy
        self.limits = limits
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, PolicyFactory.get_policy(policy), limits)
        self.hopeful = hopeful
        self.runner = BeamRunner(
            "", device="cpu", dtype="", max_model_len=CONTEXT, block_size=block_size,
            progress=lambda *_: None,
        )  # fmt: skip
        self.runner.vocab_size = VOCAB
        self.runner.allocate_kv(num_blocks + 1)
        self.depth = depth
        self.in_flight = deque()
        self.expected = {}
        self.scores = {}
        self.got = {}
        self.ended = {}
        self.added = 0

    @rule(prompt=PROMPTS, params=PARAMS, priority=st.integers(-1, 1), scope=SCOPES)
    def add(self, prompt, params, priority, scope):
        name, size = f"r{self.added}", self.limits.block_size
        self.added += 1
        most = min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
        width = params.branches
        shared = len(prompt) // size if width > 1 else 0
        each = shared + (self.pool.num_blocks - shared) // width
        room = min(CONTEXT, each * size) - len(prompt)
        fits = room >= 1 and width <= most
        if width > 1 and params.max_tokens is not None:
            fits = fits and min(params.max_tokens, CONTEXT - len(prompt)) <= room
        try:
            self.scheduler.add(name, prompt, params, priority=priority, scope=scope)
        except RequestError:
            assert not fits, "refused although it would fit"
            return
        assert fits
        if params.use_beam_search:
            for rank, (output, score) in enumerate(searched(prompt, params, room)):
                self.expected[name, rank], self.scores[name, rank] = output, score
        else:
            for branch in range(width):
                self.expected[name, branch] = alone(prompt, params, room, branch)
        self.got |= {key: [] for key in self.expected if key[0] == name}

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data, whole):
        name, index = data.draw(st.sampled_from(sorted(self.expected)))
        live = [key for key in self.expected if key[0] == name and key not in self.ended]
        if not whole and (name, 0) not in self.scores:
            live = [key for key in live if key[1] == index]
        updates = self.scheduler.abort(name, None if whole else index)
        assert sorted((u.request_id, u.index) for u in updates) == sorted(live)
        for update in updates:
            assert update.finish_reason == "abort"
            self.take(update)

    @rule(times=st.integers(1, 8))
    def steps(self, times):
        for _ in range(times):
            self.step()

    def step(self):
        while len(self.in_flight) < self.depth and self.scheduler.may_plan:
            if not self.submit():
                break
        assert self.in_flight or not self.scheduler.has_work, "work, and nobody moved"
        if self.in_flight:
            self.collect()

    def submit(self):
        if self.hopeful:  # that none of them grows: many are let in, and many preempted
            self.scheduler.output_lengths.mean = 0
        before = {s.arrival for s in self.scheduler.running}
        awaited = any(
            s.num_generated and s.num_generated < s.max_new_tokens for s in self.scheduler.running
        )
        plan = self.scheduler.plan()
        admitted = {s.arrival for s in self.scheduler.running} - before
        if self.policy == "fcfs" and admitted:
            queue = [group.arrival for group in self.scheduler._roster.waiting]
            assert max(admitted) < min(queue, default=math.inf), "one was overtaken"
        self.check_size(plan, awaited)
        self.check_plan(plan)
        if plan.num_sequences:
            self.in_flight.append((plan, self.runner.submit(plan)))
        return plan.num_sequences

    def collect(self):
        plan, step = self.in_flight.popleft()
        result = self.runner.collect(step)
        for update in self.scheduler.commit(plan, result.tokens, result.logprobs):
            self.take(update)

    def check_size(self, plan, awaited):
        limits, tokens = self.limits, plan.num_tokens
        large = limits.large_step or 0
        if awaited or tokens <= limits.max_num_batched_tokens:
            assert tokens <= limits.max_num_batched_tokens, "a next token is kept waiting"
            return
        assert tokens <= large
        assert limits.offline or len(plan.sequences) == 1, "a first token is kept waiting"

    def check_plan(self, plan):
        running = {s.seq_id: s for s in self.scheduler.running}
        planned = [share.seq_id for share in plan.sequences]
        assert len(set(planned)) == len(planned)
        assert set(planned) <= set(running)
        assert not set(plan.preempted) & set(planned)
        if running:
            arrival = next(iter(running.values())).arrival
            first = [s for s in running.values() if s.arrival == arrival]
            # What it lacks may be in flight.
            assert any(s.seq_id in planned or not s.remaining for s in first), "the first waits"
        copied = [destination for _, destination in plan.copies]
        assert len(set(copied)) == len(copied)
        for share in plan.sequences:
            sequence, size = running[share.seq_id], self.limits.block_size
            end = share.start + len(share.token_ids)
            assert share.token_ids
            assert share.num_generated < sequence.max_new_tokens, "a known end is overrun"
            assert share.start + len(share.token_ids) == sequence.computed
            assert share.block_table == sequence.block_table
            assert len(share.block_table) == blocks_for(end, size)
            if share.writes:
                written = share.block_table[share.start // size :]
                assert all(
                    self.pool.references(b) == 1 for b in written if b not in self.given(plan)
                ), "a block that others hold is written"
                assert not any(
                    b in self.pool._key_of for b in written if share.start % size == 0
                ), "a block that can be found is written"
        chunked = [running[s.seq_id].request_id for s in plan.sequences if not s.samples]
        last = [running[seq_id].request_id for seq_id in planned[-1:]]
        assert set(chunked) <= set(last), "only the last may be between chunks"

    def given(self, plan):
        """Blocks that branches at the end of their prompt share while the first writes them."""
        return {b for share in plan.sequences if not share.writes for b in share.block_table}

    def take(self, update):
        name = update.request_id, update.index
        assert name not in self.ended, "an update after the last"
        self.got[name] += update.token_ids
        tokens, reason, stop = self.expected[name]
        assert self.got[name] == tokens[: len(self.got[name])]
        if update.finish_reason is not None:
            self.ended[name] = update.finish_reason
        if update.finish_reason in ("stop", "length"):
            assert (self.got[name], update.finish_reason) == (tokens, reason)
            assert update.stop_token_id == stop
            if name in self.scores:
                assert update.score == pytest.approx(self.scores[name], abs=1e-9)

    @invariant()
    def books_balance(self):
        self.scheduler.check_integrity()
        live = set(self.expected) - set(self.ended)
        assert set(self.scheduler.request_ids) == {name for name, _ in live}
        assert self.scheduler.num_running <= min(
            self.limits.max_num_seqs, self.limits.max_num_batched_tokens
        )
        running = list(self.scheduler.running)
        groups = list(self.scheduler._roster.waiting)
        waiting = [branch for group in groups for branch in group.branches]
        searching = {name for name, _ in self.scores}
        drawing = [s for s in running + waiting if s.request_id not in searching]
        assert len(drawing) == sum(name not in searching for name, _ in live)
        assert all(s.unread <= len(self.in_flight) for s in running + waiting)
        assert all(not s.block_table and not s.computed for s in waiting)
        totals = self.scheduler.waiting_totals
        assert totals.count == len(waiting)
        assert totals.growth == sum(s.remaining for s in waiting)
        assert totals.blocks == sum(group.num_blocks(self.limits.kv) for group in groups)
        assert totals.tokens == sum(group.num_tokens for group in groups)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # The first admitted gets a token or a chunk of a prompt in every step, so each request ends
        # within the steps that all would take one by one, replays included.
        budget = self.limits.max_num_batched_tokens
        bound = sum(CONTEXT + math.ceil(CONTEXT / budget) for _ in self.got) * 2 + 4
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            self.step()
        while self.in_flight:  # steps whose every token is void
            self.collect()
        assert set(self.ended) == set(self.expected), "a request without an end"
        self.scheduler.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
