"""Two steps in flight: what may be planned before a step has come back, and what of it is void."""

import pytest
from fake_runner import FakeRunner, next_token

from octavo.core.block_pool import BlockPool
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits
from octavo.core.scheduler import Scheduler
from octavo.core.step import NO_TOKEN, PENDING, PlanExpiredError, Rows
from octavo.params import SamplingParams

EOS = 3
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def scheduler(*, blocks=64, block_size=4, budget=64, seqs=8, caching=True, hopeful=False):
    limits = Limits(
        block_size=block_size,
        max_model_len=64,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        vocab_size=97,
        eos_token_ids=frozenset({EOS}),
        enable_prefix_caching=caching,
    )
    engine = Scheduler(BlockPool(blocks), PolicyFactory.get_policy("fcfs"), limits)
    if hopeful:
        engine.output_lengths.mean = 0
    return engine


def params(max_tokens=20, **asked):
    return SamplingParams(max_tokens=max_tokens, **asked)


def commit(engine, plan, token=7):
    return engine.commit(plan, [token] * plan.num_samples)


def step(engine, token=7):
    plan = engine.plan()
    return plan, commit(engine, plan, token)


def shares(plan):
    return [(s.seq_id, s.start, s.token_ids, s.num_generated) for s in plan.sequences]


def test_a_step_is_planned_before_the_tokens_of_the_last_are_read():
    engine = scheduler()
    engine.add("a", [5] * 6, params())
    first = engine.plan()
    assert shares(first) == [(0, 0, [5] * 6, 0)]
    second = engine.plan()
    assert shares(second) == [(0, 6, [PENDING], 1)]
    assert not engine.may_plan
    with pytest.raises(RuntimeError, match="2 steps are in flight"):
        engine.plan()
    assert [u.token_ids for u in commit(engine, first, 11)] == [[11]]
    third = engine.plan()
    assert shares(third) == [(0, 7, [PENDING], 2)]
    commit(engine, second, 12)
    commit(engine, third, 13)
    assert shares(engine.plan()) == [(0, 8, [13], 3)]
    (sequence,) = engine.running
    assert sequence.generated == [11, 12, 13]


def test_the_runner_is_told_only_what_changed():
    engine = scheduler(block_size=4)
    for name in "ab":
        engine.add(name, [5] * 6, params())
    plans = [step(engine)[0], step(engine)[0]]
    assert [plan.rows.count for plan in plans] == [0, 2]
    assert [share.seq_id for share in plans[1].rows.joined] == [0, 1]
    assert step(engine)[0].rows == Rows(count=2, context=14)
    grown = step(engine)[0].rows.grown
    tables = {sequence.seq_id: sequence.block_table for sequence in engine.running}
    assert grown == ((0, tables[0][-1]), (1, tables[1][-1]))
    engine.abort("a")
    assert engine.plan().rows.left == (0,)


def test_an_end_by_length_is_not_overrun_and_the_last_token_is_awaited():
    engine = scheduler()
    engine.add("a", [5] * 4, params(2))
    first, second, third = engine.plan(), engine.plan(), None
    commit(engine, first)
    third = engine.plan()
    assert third.num_sequences == 0
    assert engine.has_work
    assert [u.finish_reason for u in commit(engine, second)] == ["length"]
    assert not engine.has_work
    assert engine.pool.counts.active == 0


def test_what_follows_an_end_of_sequence_is_void_and_its_blocks_are_free_at_once():
    engine = scheduler(blocks=2, caching=False)
    engine.add("a", [5] * 4, params())
    engine.add("b", [6] * 4, params(1))
    first, second = engine.plan(), engine.plan()
    assert shares(second) == [(0, 4, [PENDING], 1)]
    assert [u.finish_reason for u in commit(engine, first, EOS)] == ["stop"]
    engine.check_integrity()
    third = engine.plan()
    assert shares(third) == [(1, 0, [6] * 4, 0)]
    assert third.rows.left == (0,)
    assert commit(engine, second, 9) == []
    assert [u.request_id for u in commit(engine, third, 9)] == ["b"]
    assert engine.pool.num_free == 2


def test_an_abort_voids_what_is_in_flight():
    engine = scheduler()
    engine.add("a", [5] * 4, params())
    plans = [engine.plan(), engine.plan()]
    assert [u.finish_reason for u in engine.abort("a")] == ["abort"]
    assert [commit(engine, plan) for plan in plans] == [[], []]
    engine.check_integrity()


def test_a_token_in_flight_when_its_sequence_is_preempted_is_recorded_once():
    engine = scheduler(blocks=4, hopeful=True, caching=False)
    engine.add("a", [5] * 7, params(8))
    engine.add("b", [6] * 7, params(8))
    first, second = engine.plan(), engine.plan()
    commit(engine, first, 10)
    third = engine.plan()
    assert third.preempted == (1,)
    assert [u.token_ids for u in commit(engine, second, 11)] == [[11], [11]]
    assert engine.waiting_totals.tokens == 7 + 2
    commit(engine, third, 12)
    replay = None
    while replay is None:
        plan = engine.plan()
        replay = next((s.token_ids for s in plan.sequences if s.seq_id == 1), None)
        commit(engine, plan, 12)
    assert replay == [6] * 7 + [10, 11]


def test_a_block_is_found_only_when_the_step_that_filled_it_came_back():
    """Else what turns out to be NaN would be in another sequence's context."""
    engine = scheduler(block_size=4)
    engine.add("a", [5] * 3, params())
    first, second = engine.plan(), engine.plan()
    commit(engine, first, 9)
    engine.add("b", [5] * 3 + [9, 1], params())
    third = engine.plan()
    assert shares(third)[1] == (1, 0, [5, 5, 5, 9, 1], 0)
    commit(engine, second, NO_TOKEN)
    assert [u.request_id for u in commit(engine, third)] == ["b"]
    engine.check_integrity()


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ({"repetition_penalty": 1.2}, False),
        ({"typical_p": 0.5}, False),
        ({"typical_p": 0.5, "repetition_penalty": 1.2}, True),
        ({"use_beam_search": True, "temperature": 0, "best_of": 2}, True),
    ],
)
def test_nothing_is_planned_after_a_step_whose_tokens_the_host_must_see(asked, waits):
    engine = scheduler(budget=4)
    engine.add("a", [5] * 6, params(**asked))
    first = engine.plan()
    assert engine.may_plan, "a chunk of a prompt draws nothing"
    engine.plan()
    commit(engine, first)
    assert engine.may_plan == (not waits)


def test_a_group_that_is_rebuilt_is_not_planned_ahead():
    """What the lead filled is published when it came back, and must not be shared before."""
    engine = scheduler(blocks=15, block_size=4, hopeful=True, caching=False)
    engine.add("first", [5] * 25, params(24))
    engine.add("group", [6] * 6, params(14, n=3))
    while not engine.counters.preemptions:
        step(engine)
    engine.abort("first")
    alone = 0
    while any(not s.follows for s in engine.running) or not engine.num_running:
        plan = engine.plan()
        alone += not engine.may_plan
        commit(engine, plan)
    assert alone == 2  # the lead's replay, and the step in which the others join


def test_blocks_that_are_short_go_to_those_admitted_first():
    engine = scheduler(blocks=7, block_size=4, hopeful=True, caching=False)
    engine.add("a", [5] * 6, params(10, n=2))
    engine.add("b", [6] * 6, params(10))
    for _ in range(3):
        step(engine)
    # a's branches became rows after b: they had a block to copy first.
    assert engine.pool.num_free == 2
    assert [s.seq_id for s in engine.plan().sequences] == [0, 1]
    assert engine.counters.preemptions == 0, "b waits and keeps its blocks"


def test_rows_are_listed_only_while_they_stand_where_the_plan_left_them():
    engine = scheduler()
    engine.add("a", [5] * 4, params())
    step(engine)
    plan = engine.plan()
    commit(engine, plan)
    with pytest.raises(PlanExpiredError):
        _ = plan.sequences


def test_steps_are_committed_in_order_and_once():
    engine = scheduler()
    engine.add("a", [5] * 4, params())
    first, second = engine.plan(), engine.plan()
    with pytest.raises(RuntimeError, match="in the order of their plans"):
        commit(engine, second)
    commit(engine, first)
    with pytest.raises(RuntimeError, match="committed once"):
        commit(engine, first)


def test_a_write_in_flight_is_done_before_its_block_is_anothers():
    """The void step of an ended sequence writes into a block that the next step gives away."""
    engine = scheduler(blocks=3, block_size=2, caching=False)
    runner = FakeRunner(
        "", device="", dtype="", max_model_len=64, block_size=2, progress=lambda *_: None
    )
    runner.allocate_kv(4)
    prompt, other = [5, 6, 8], [9, 10, 11]
    token = next_token(prompt, 97)
    engine.add("a", prompt, params(stop_token_ids=(token,)))
    engine.add("b", other, params(1))
    flying = [(plan := engine.plan(), runner.submit(plan)) for _ in range(2)]
    outputs = []
    while flying:
        plan, handle = flying.pop(0)
        outputs += engine.commit(plan, runner.collect(handle).tokens)
        if engine.has_work and engine.may_plan and (following := engine.plan()).num_sequences:
            flying.append((following, runner.submit(following)))
    assert [(u.request_id, u.finish_reason) for u in outputs] == [("a", "stop"), ("b", "length")]
    assert outputs[1].token_ids == [next_token(other, 97)]
