"""Swapping: what is moved, what is shared again, when it pays, and that tokens never change."""

import random

import pytest
from grouped_engine import TEXT, VOCAB, Engine, run_traffic, sample

from octavo.core.block_pool import NO_BLOCK, BlockPool, IntegrityError
from octavo.core.group import Group
from octavo.core.policy import PolicyFactory
from octavo.core.prefix_cache import PrefixCache
from octavo.core.roster import Roster
from octavo.core.sequence import Sequence
from octavo.core.step_time import StepTimeModel
from octavo.core.swap import SwapSpace
from octavo.kv_layout import KvGroups
from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams

GROUPS = [(None,), (None, 8), (8,), (None, 5, 13), (6, 11)]


def until_preempted(engine):
    while not engine.scheduler.counters.preemptions:
        assert engine.scheduler.has_work, "nobody was preempted"
        plan = engine.step()
    return plan


def test_a_swapped_sequence_goes_on_where_it_was():
    engine = Engine((None,), blocks=8, host_blocks=8, caching=False)
    engine.add("a", TEXT[:8], 20)
    engine.add("b", TEXT[20:28], 20)
    plan = until_preempted(engine)
    assert plan.preempted == (1,)
    assert len(plan.swap_out) == 4, "of 16 tokens"
    computed = engine.computed
    drawn = len(engine.outputs["b", 0])
    while not plan.swap_in:
        plan = engine.step()
    assert [share.start for share in plan.sequences if share.seq_id == 1] == [8 + drawn - 1]
    engine.finish()
    assert engine.outputs == {
        ("a", 0): sample(TEXT[:8], 0, 20),
        ("b", 0): sample(TEXT[20:28], 0, 20),
    }
    # Nothing ran twice: both prompts, and all drawn tokens but the last of each.
    assert engine.computed == 2 * (8 + 19)
    assert computed < engine.computed
    assert (engine.swap.blocks_out, engine.swap.blocks_in) == (4, 4)
    assert engine.swap.pool.counts.free == 8


def test_shared_blocks_are_moved_once_and_shared_again():
    engine = Engine((None,), blocks=18, host_blocks=18, caching=False)
    engine.add("a", TEXT[:8], 40)
    engine.add("b", TEXT[20:32], 16, n=3)
    plan = until_preempted(engine)
    assert plan.preempted == (1, 2, 3)
    group = engine.scheduler._roster.by_request["b"]
    tables = [branch.swapped for branch in group.branches]
    assert len({tuple(table[:3]) for table in tables}) == 1, "the prompt's three blocks"
    assert len(plan.swap_out) == len({block for table in tables for block in table})
    counts = engine.swap.pool.counts
    assert (counts.active, counts.shared) == (len(plan.swap_out), 3)
    engine.scheduler.abort("a")
    plan = engine.step()
    assert len(plan.swap_in) == len(set(plan.swap_in)) == counts.active
    assert engine.scheduler.pool.counts.shared == 3
    engine.finish()
    assert [engine.outputs["b", b] for b in range(3)] == [
        sample(TEXT[20:32], b, 16) for b in range(3)
    ]


def test_what_can_still_be_found_is_not_copied_back():
    engine = Engine((None,), blocks=9, host_blocks=9)
    engine.add("a", TEXT[:8], 20)
    engine.add("b", TEXT[20:36], 8)
    plan = until_preempted(engine)
    out = len(plan.swap_out)
    engine.scheduler.abort("a")
    plan = engine.step()
    # All five were full and could be found, until one of them had to make room for the other.
    assert (out, len(plan.swap_in)) == (5, 1)
    assert engine.finish()["b", 0] == sample(TEXT[20:36], 0, 8)


def test_what_came_back_is_found_by_others():
    engine = Engine((None,), blocks=9, host_blocks=9)
    engine.add("a", TEXT[:8], 28)
    engine.add("b", TEXT[20:36], 8)
    until_preempted(engine)
    while ("b", 0) not in engine.outputs or len(engine.outputs["b", 0]) < 8:
        plan = engine.step()
        if plan.swap_in:
            assert len(plan.swap_in) >= 4, "the cached ones were evicted"
            engine.scheduler.abort("a")
    engine.finish()
    assert engine.run(TEXT[20:36]) == 15


@pytest.mark.parametrize("index", [None, 0, 1])
def test_abort_gives_host_blocks_back(index):
    engine = Engine((None,), blocks=18, host_blocks=18, caching=False)
    engine.add("a", TEXT[:8], 40)
    engine.add("b", TEXT[20:32], 16, n=3)
    until_preempted(engine)
    held = engine.swap.pool.counts.active
    engine.scheduler.abort("b", index)
    engine.scheduler.check_integrity()
    assert engine.swap.pool.counts.active < held
    engine.finish()
    assert engine.swap.pool.counts.free == 18
    if index is not None:
        assert engine.outputs["b", 2] == sample(TEXT[20:32], 2, 16)


def test_windows_move_only_what_they_keep():
    engine = Engine((None, 8), blocks=22, host_blocks=30, caching=False)
    engine.add("a", TEXT[:24], 20)
    engine.add("b", TEXT[40:64], 20)
    plan = until_preempted(engine)
    lead = engine.scheduler._roster.by_request["b"].lead
    assert lead.swapped.count(NO_BLOCK) > 0
    assert len(plan.swap_out) == len(lead.swapped) - lead.swapped.count(NO_BLOCK)
    engine.finish()
    assert engine.outputs["b", 0] == sample(TEXT[40:64], 0, 20)


DECISIONS = [
    # Host blocks, seconds to recompute; 4 blocks there and back take 4 seconds.
    (8, lambda tokens: 4.5, True),
    (8, lambda tokens: 3.5, False),
    (8, lambda tokens: None, False),
    (8, lambda tokens: 0.3 * tokens, True),
    (3, lambda tokens: 99, False),
]


@pytest.mark.parametrize(("host_blocks", "recompute", "swaps"), DECISIONS)
def test_the_cheaper_way_is_taken(host_blocks, recompute, swaps):
    engine = Engine((None,), blocks=8, host_blocks=host_blocks, recompute=recompute, caching=False)
    engine.add("a", TEXT[:8], 20)
    engine.add("b", TEXT[20:28], 20)
    plan = until_preempted(engine)
    assert bool(plan.swap_out) == swaps
    assert engine.finish()["b", 0] == sample(TEXT[20:28], 0, 20)
    assert (engine.computed == 54) == swaps


def test_the_time_of_more_tokens_is_known_once_steps_were_seen():
    model = StepTimeModel()
    assert model.added(100) is None
    for tokens in (1, 50, 3, 80, 20, 7, 64, 33, 90, 12):
        model.observe(tokens, 0, 0.01 + 0.001 * tokens)
    assert model.added(100) == pytest.approx(0.1, rel=0.02)


def test_the_integrity_check_sees_a_lost_host_block():
    engine = Engine((None,), blocks=8, host_blocks=8)
    engine.add("a", TEXT[:8], 20)
    engine.add("b", TEXT[20:28], 20)
    until_preempted(engine)
    engine.scheduler._roster.by_request["b"].lead.swapped.pop()
    with pytest.raises(IntegrityError):
        engine.scheduler.check_integrity()


def test_random_traffic_keeps_its_tokens_however_it_is_preempted():
    """Swap or not at random, host pools too small at times; every read is checked."""
    swaps = recomputed = 0
    for seed in range(200):
        rng = random.Random(seed)
        windows = rng.choice(GROUPS)
        size, budget = rng.choice([1, 2, 3, 8]), rng.choice([3, 8, 30])
        engine = Engine(
            windows, blocks=len(windows) * rng.randint(14, 60) // size, block_size=size,
            budget=budget, seqs=6, context=rng.choice([40, 90]), caching=rng.random() < 0.6,
            policy=rng.choice(["fcfs", "priority"]), host_blocks=rng.choice([5, 40, 200]),
            recompute=lambda tokens, rng=rng: rng.choice([0, 1e9]), depth=rng.choice([1, 2]),
            large_step=rng.choice([None, 4 * budget]), offline=rng.random() < 0.5,
        )  # fmt: skip
        run_traffic(engine, rng)
        assert engine.swap.pool.counts.active == 0
        swaps += engine.swap.blocks_in
        recomputed += engine.scheduler.counters.preemptions
    assert swaps > 200
    assert recomputed > 100


def candidates(step):
    """Of each sequence that samples: as a function of its tokens."""
    logprobs = {}
    for share in step.sequences:
        if share.samples:
            rng = random.Random(repr(share.tokens))
            ids = rng.sample(range(VOCAB), 8)
            values = sorted((-5 * rng.random() for _ in ids), reverse=True)
            logprobs[share.seq_id] = TokenLogprobs(ids[0], 0.0, 1, ids, values)
    return logprobs


@pytest.mark.parametrize("windows", GROUPS)
def test_beams_are_the_same_however_they_are_preempted(windows):
    """The first pool is large; in the others two searches take turns, by replay and by swap."""
    found, preempted = [], []
    for room, host_blocks in ((8.0, 0), (1.05, 0), (1.05, 400)):
        kv_blocks = Engine(windows, block_size=3, context=80).kv.blocks([50] * 4, 20, 64)
        engine = Engine(
            windows, block_size=3, blocks=int(room * kv_blocks), context=80, seqs=32,
            host_blocks=host_blocks,
        )  # fmt: skip
        for i in range(8):
            engine.add(
                f"r{i}", TEXT[i : 20 + i], 30, 4, temperature=0, use_beam_search=True, best_of=4
            )
        while engine.scheduler.has_work:
            engine.step(candidates)
        found.append(engine.outputs)
        preempted.append(engine.scheduler.counters.preemptions)
    assert len(found[0]) == 32
    assert found[0] == found[1] == found[2]
    assert preempted[0] == 0
    if None in windows:
        assert min(preempted[1:]) > 0
        assert engine.swap.blocks_in > 0


def swap_space(num_blocks=20):
    return SwapSpace(num_blocks, 0.5, lambda tokens: 1e9)


def group_of(*tables, tokens, computed, prompt=4):
    """A group whose branches have these tables, tokens and computed counts."""
    branches = [
        Sequence(i, "r", list(own), prompt, 99, SamplingParams(), 0, block_table=table, branch=i)
        for i, (table, own) in enumerate(zip(tables, tokens, strict=True))
    ]
    for branch, done in zip(branches, computed, strict=True):
        branch.computed = done
    return Group(0, branches)


def test_a_row_that_another_branch_goes_on_in_is_never_found_nor_findable():
    """The second block is full for the lead, and half full for the branch that joined it there.

    The branch may write to it in place once the lead is gone, so no one else may read it.
    """
    pool, swap = BlockPool(8), swap_space()
    cache = PrefixCache(pool, KvGroups(4), enabled=True)
    [first, second] = pool.allocate(2)
    pool.share([first, second])
    group = group_of(
        [first, second], [first, second], tokens=([1] * 9, [1] * 6 + [2]), computed=(8, 6), prompt=6
    )
    lead, other = group.branches
    cache.publish(lead, 8)
    other.chained, other.link = 1, lead.link
    swap.out(group, pool)
    assert lead.swapped == other.swapped
    swap.back(group, pool, cache)
    assert lead.block_table == other.block_table
    assert lead.block_table[0] == first, "the first one could be found"
    assert lead.block_table[1] != second, "the second might have been given to others"
    pool.forget([second])
    assert cache.find(lead).rows == 1
    pool.check_integrity([lead.block_table, other.block_table])


def test_who_waited_for_the_others_of_a_search_draws_again_and_writes_nothing():
    pool, swap = BlockPool(8), swap_space()
    group = group_of(pool.allocate(2), tokens=([1] * 7,), computed=(7,))
    swap.out(group, pool)
    assert (group.lead.computed, group.lead.written, group.lead.pending) == (6, 7, 1)


def test_what_lies_behind_a_window_frees_nothing():
    """With one block given up, and the pool's last block held once."""
    kv, pool = KvGroups(4, (4,)), BlockPool(3)
    held = pool.allocate(3)
    group = group_of([NO_BLOCK, *held], tokens=([1] * 15,), computed=(14,))
    roster = Roster(pool, PolicyFactory.get_policy("fcfs"), kv, None)
    assert roster._cost_of_a_block(group) == 14 / 3


def test_copies_of_a_plan_that_is_not_run_are_made_in_the_next():
    """All that runs has drawn its last token, or lacks blocks that only its end will free."""
    engine = Engine((None,), blocks=9, host_blocks=9, caching=False, depth=2)
    engine.add("a", TEXT[:15], 1)
    engine.add("b", TEXT[20:28], 12)
    engine.add("c", TEXT[30:38], 12)
    scheduler = engine.scheduler
    plan = scheduler.plan()
    engine.in_flight.append((plan, engine.runner.submit(plan)))
    # While the first step is in flight, b takes the blocks of c and still has too few.
    taken = scheduler.pool.allocate(scheduler.pool.num_free)
    real = scheduler._make_room
    scheduler._make_room = lambda group, need, draft: real(group, need + 9, draft)
    empty = scheduler.plan()
    scheduler._make_room = real
    assert empty.preempted
    assert empty.num_sequences == 0
    assert not empty.swap_out
    scheduler.pool.release(taken)
    swapped = scheduler.plan()
    assert swapped.swap_out
    engine.in_flight.append((swapped, engine.runner.submit(swapped)))
    engine.finish()
    assert engine.outputs["c", 0] == sample(TEXT[30:38], 0, 12)
