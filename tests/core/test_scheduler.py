"""The scheduler's rules, one by one, on cases small enough to follow by hand."""

import sys

import pytest
from fake_runner import FakeRunner, next_token

from octavo.core.block_pool import BlockPool, IntegrityError
from octavo.core.policy import PolicyFactory
from octavo.core.request import Limits, RequestError
from octavo.core.scheduler import Scheduler
from octavo.core.step import NO_TOKEN
from octavo.params import ParameterError, SamplingParams

EOS = 3


def scheduler(
    *, blocks=64, block_size=4, context=64, seqs=8, budget=32, policy="fcfs", caching=False, **more
):
    limits = Limits(
        block_size=block_size,
        max_model_len=context,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        vocab_size=97,
        eos_token_ids=frozenset({EOS}),
        enable_prefix_caching=caching,
        **more,
    )
    return Scheduler(BlockPool(blocks), PolicyFactory.get_policy(policy), limits)


def params(max_tokens=4, **kwargs):
    return SamplingParams(max_tokens=max_tokens, **kwargs)


def step(engine, token=7, budget=None):
    """One step in which every sequence draws `token`."""
    plan = engine.plan(budget)
    return plan, engine.commit(plan, [token for share in plan.sequences if share.samples])


def run_dry(engine, token=7):
    plans, updates = [], []
    while engine.has_work:
        plan, new = step(engine, token)
        plans.append(plan)
        updates += new
    return plans, updates


def shares(plan):
    return [(s.seq_id, s.start, len(s.token_ids), s.samples) for s in plan.sequences]


def test_a_long_prompt_runs_in_chunks_and_samples_once():
    engine = scheduler(budget=8)
    engine.add("a", [5] * 20, params(2))
    plans, updates = run_dry(engine)
    assert [shares(p) for p in plans] == [
        [(0, 0, 8, False)],
        [(0, 8, 8, False)],
        [(0, 16, 4, True)],
        [(0, 20, 1, True)],
    ]
    assert [u.token_ids for u in updates] == [[7], [7]]
    assert [u.finish_reason for u in updates] == [None, "length"]


def test_a_long_prompt_takes_large_steps_while_nobody_decodes():
    engine = scheduler(budget=8, large_step=16)
    engine.add("a", [5] * 40, params(3))
    assert shares(step(engine)[0]) == [(0, 0, 16, False)]
    engine.add("b", [5] * 30, params(9))
    assert shares(step(engine)[0]) == [(0, 16, 16, False)]
    # It ends within a usual step: what is left of that is the next one's, and no more.
    assert shares(step(engine)[0]) == [(0, 32, 8, True)]
    # From now on its next token would wait.
    assert shares(step(engine)[0]) == [(0, 40, 1, True), (1, 0, 7, False)]
    assert shares(step(engine)[0]) == [(0, 41, 1, True), (1, 7, 7, False)]
    assert shares(step(engine)[0]) == [(1, 14, 16, True)]


def test_short_prompts_share_large_steps_only_where_their_first_tokens_may_wait():
    for offline, first in ((False, [8, 2]), (True, [8, 8, 4])):
        engine = scheduler(budget=10, large_step=20, offline=offline)
        for name in "abc":
            engine.add(name, [5] * 8, params(1))
        plan, _ = step(engine)
        assert [len(s.token_ids) for s in plan.sequences] == first


def test_a_last_token_in_flight_keeps_no_large_step_away():
    engine = scheduler(budget=4, large_step=16)
    engine.add("a", [5] * 4, params(1))
    plan = engine.plan()
    engine.add("b", [5] * 20, params(2))
    behind = engine.plan()
    assert shares(behind) == [(1, 0, 16, False)]
    engine.commit(plan, [7])
    engine.commit(behind, [])


def test_a_large_step_lets_in_no_more_than_a_usual_one_has_tokens_for():
    engine = scheduler(budget=2, large_step=8, offline=True)
    for name in "abcd":
        engine.add(name, [5, 5], params(3))
    assert shares(step(engine)[0]) == [(0, 0, 2, True), (1, 0, 2, True)]
    plans, _ = run_dry(engine)
    assert all(plan.rows.count <= 2 for plan in plans)


def test_a_given_budget_holds_for_large_steps_too():
    engine = scheduler(budget=8, large_step=16)
    engine.add("a", [5] * 40, params(3))
    assert shares(step(engine, budget=5)[0]) == [(0, 0, 5, False)]


def test_windows_have_no_large_steps():
    engine = scheduler(budget=8, large_step=16, kv_windows=(8,))
    engine.add("a", [5] * 40, params(3))
    assert shares(step(engine)[0]) == [(0, 0, 8, False)]


def test_running_sequences_go_before_a_new_prompt():
    engine = scheduler(budget=8)
    engine.add("a", [5] * 4, params(9))
    step(engine)
    engine.add("b", [5] * 20, params(9))
    assert shares(step(engine)[0]) == [(0, 4, 1, True), (1, 0, 7, False)]
    assert shares(step(engine)[0]) == [(0, 5, 1, True), (1, 7, 7, False)]
    assert shares(step(engine)[0]) == [(0, 6, 1, True), (1, 14, 6, True)]


def test_the_table_grows_by_a_block_when_the_last_is_full():
    engine = scheduler(block_size=4)
    engine.add("a", [5] * 4, params(9))
    sizes = [len(step(engine)[0].sequences[0].block_table) for _ in range(6)]
    assert sizes == [1, 2, 2, 2, 2, 3]


def test_admission_waits_for_the_expected_growth_not_for_the_worst_case():
    engine = scheduler(blocks=16, block_size=4, context=64)
    engine.output_lengths.mean = 12
    for name in "abc":
        engine.add(name, [5] * 8, params(56))
    plan, _ = step(engine)
    # Two blocks a prompt and three of growth. The worst case would let one in: 16 blocks each.
    assert len(plan.sequences) == 3
    engine.add("d", [5] * 20, params(30))
    engine.add("e", [5] * 1, params(1))
    plan, _ = step(engine)
    assert len(plan.sequences) == 3, "7 free of 16, d needs 5 and 3 to grow"
    assert engine.waiting_totals.count == 2, "and e does not overtake it"
    assert engine.waiting_totals.blocks == 5 + 1


def test_a_request_larger_than_expected_runs_when_it_is_alone():
    engine = scheduler(blocks=4, block_size=4, context=64)
    engine.add("a", [5] * 12, params(60))
    _, updates = run_dry(engine)
    assert sum(len(u.token_ids) for u in updates) == 4
    assert updates[-1].finish_reason == "length"


def test_the_last_admitted_is_preempted_and_replays_what_it_drew():
    engine = scheduler(blocks=4, block_size=4, context=16)
    engine.output_lengths.mean = 0
    engine.add("a", [5] * 4, params(9))
    engine.add("b", [6] * 4, params(9))
    tokens = iter(range(10, 99))
    drawn, preempted, replayed = {"a": [], "b": []}, [], []
    while engine.has_work:
        plan = engine.plan()
        preempted += plan.preempted
        replayed += [s.token_ids for s in plan.sequences if s.start == 0 and s.num_generated]
        for update in engine.commit(plan, [next(tokens) for s in plan.sequences if s.samples]):
            drawn[update.request_id] += update.token_ids
    assert set(preempted) == {1}
    assert replayed == [[6] * 4 + drawn["b"][: len(ids) - 4] for ids in replayed]
    assert replayed, "never came back"
    assert [len(v) for v in drawn.values()] == [9, 9]
    assert engine.counters.preemptions == len(preempted)
    assert engine.counters.prompt_tokens == 8, "a replay is not a new prompt"
    assert engine.counters.generation_tokens == 18


def test_the_last_keeps_its_blocks_and_waits_when_there_is_nobody_to_take_from():
    engine = scheduler(blocks=3, block_size=4, context=12)
    engine.output_lengths.mean = 0
    engine.add("a", [5] * 5, params(2))
    engine.add("b", [6] * 4, params(4))
    assert len(step(engine)[0].sequences) == 2
    plan, updates = step(engine)
    assert [s.seq_id for s in plan.sequences] == [0]
    assert (plan.preempted, engine.num_running) == ((), 1)
    assert updates[0].finish_reason == "length"
    assert shares(step(engine)[0]) == [(1, 4, 1, True)], "not from the start again"


def test_nobody_is_admitted_into_the_blocks_that_the_last_waits_for():
    engine = scheduler(blocks=8, block_size=4, budget=17)
    engine.output_lengths.mean = 0
    engine.add("a", [5] * 16, params(8))
    engine.add("b", [6] * 16, params(8))
    assert shares(step(engine)[0]) == [(0, 0, 16, True), (1, 0, 1, False)]
    engine.add("c", [7], params(1))
    plan, _ = step(engine)
    # b needs three blocks more and two are free, where c would fit.
    assert shares(plan) == [(0, 16, 1, True)]
    assert (engine.pool.num_free, engine.waiting_totals.count) == (2, 1)


def test_the_end_of_sequence_token_is_not_output():
    engine = scheduler()
    engine.add("a", [5], params(9))
    step(engine)
    _, (update,) = step(engine, EOS)
    assert (update.token_ids, update.finish_reason, update.stop_token_id) == ([], "stop", EOS)
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize(
    ("asked", "token", "lengths", "reason"),
    [
        (params(5, ignore_eos=True), EOS, 5, "length"),
        (params(5, min_tokens=2), EOS, 2, "stop"),
        (params(5, stop_token_ids=(9,)), 9, 0, "stop"),
        (params(5, stop_token_ids=(9,), ignore_eos=True), 9, 0, "stop"),
        (params(5, min_tokens=5), EOS, 5, "length"),
        (params(None), 7, 63, "length"),
    ],
)
def test_where_a_sequence_ends(asked, token, lengths, reason):
    engine = scheduler(context=64)
    engine.add("a", [5], asked)
    _, updates = run_dry(engine, token)
    assert sum(len(u.token_ids) for u in updates) == lengths
    assert [u.finish_reason for u in updates if u.finish_reason] == [reason]


def test_logits_that_are_not_numbers_end_one_request():
    engine = scheduler()
    engine.add("a", [5], params(3))
    engine.add("b", [5], params(3))
    plan = engine.plan()
    bad, good = engine.commit(plan, [NO_TOKEN, 7])
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert "NaN after 1 tokens" in bad.error
    assert good.token_ids == [7]
    run_dry(engine)
    assert engine.pool.num_free == engine.pool.num_blocks


REFUSED = [
    ("a", [5], params(), RequestError, "id 'a' is already here"),
    ("b", [], params(), RequestError, "the prompt has no tokens"),
    ("b", [5] * 16, params(), RequestError, r"has 16 tokens; at most 15 .*context 64.*cache 16"),
    ("b", [5, 97], params(), RequestError, r"token id 97 .* 0\.\.96"),
    ("b", [5, -1], params(), RequestError, "token id -1"),
    ("b", [5], params(temperature=3.0), ParameterError, "temperature must be"),
    ("b", [5], params(stop_token_ids=(97,)), ParameterError, "stop_token_ids holds 97"),
]


@pytest.mark.parametrize(("name", "prompt", "asked", "kind", "text"), REFUSED)
def test_a_bad_request_is_refused_and_leaves_nothing_behind(name, prompt, asked, kind, text):
    engine = scheduler(blocks=4, block_size=4)
    engine.add("a", [5], params())
    with pytest.raises(kind, match=text):
        engine.add(name, prompt, asked)
    assert engine.request_ids == ("a",)
    run_dry(engine)
    assert engine.pool.num_free == 4


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_abort_frees_everything_at_any_time(steps):
    engine = scheduler(budget=8)
    engine.add("a", [5] * 20, params(9))
    for _ in range(steps):
        step(engine)
    assert [update.finish_reason for update in engine.abort("a")] == ["abort"]
    assert engine.abort("a") == []
    assert not engine.has_work
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_sequence_aborted_between_plan_and_commit_is_passed_over():
    engine = scheduler()
    engine.add("a", [5], params(9))
    engine.add("b", [5], params(9))
    plan = engine.plan()
    engine.abort("a")
    (update,) = engine.commit(plan, [7, 8])
    assert (update.request_id, update.token_ids) == ("b", [8])


def test_no_more_run_than_max_num_seqs():
    engine = scheduler(seqs=3)
    for i in range(8):
        engine.add(str(i), [5], params(4))
    plans, _ = run_dry(engine)
    assert [len(p.sequences) for p in plans] == [3] * 8 + [2] * 4


def test_while_more_wait_than_fit_they_come_in_bunches():
    """A step of decoding sequences alone is far cheaper on a GPU than one with a prompt in it."""
    engine = scheduler(blocks=4000, context=128, seqs=64, budget=512)
    for i in range(200):
        engine.add(str(i), [5], params(40 + i * 37 % 61))
    plans, updates = run_dry(engine)
    mixed = [p for p in plans if p.chunks and p.rows.count]
    assert all(sum(s.start == 0 for s in p.chunks) >= 2 for p in mixed[:-1])
    assert sum(u.finish_reason is not None for u in updates) == 200


def test_who_has_room_does_not_wait_for_company():
    engine = scheduler(blocks=400, seqs=64, budget=512)
    engine.add("a", [5], params(50))
    step(engine), step(engine)
    engine.add("b", [5], params(4))
    plan, _ = step(engine)
    assert [s.seq_id for s in plan.chunks] == [1]


def test_no_more_run_than_a_step_has_tokens_for():
    engine = scheduler(seqs=8, budget=3)
    for i in range(6):
        engine.add(str(i), [5], params(4))
    plans, _ = run_dry(engine)
    assert max(p.num_tokens for p in plans) == 3
    assert all(len(p.sequences) <= 3 for p in plans)


def test_first_tokens_come_in_order_of_arrival():
    engine = scheduler(blocks=12, budget=8, seqs=4)
    for i in range(20):
        engine.add(str(i), [5] * (1 + i * 7 % 20), params(1 + i % 9))
    _, updates = run_dry(engine)
    firsts = list(dict.fromkeys(u.request_id for u in updates))
    assert firsts == [str(i) for i in range(20)]


def test_waiting_makes_up_for_a_lower_priority():
    engine = scheduler(seqs=1, policy="priority")
    arrivals = [("low", 5, 0), ("late", 4, 29), ("later", 4, 31), ("urgent", -5, 31)]
    for name, priority, now in arrivals:
        engine.add(name, [5], params(1), priority=priority, now=float(now))
    _, updates = run_dry(engine)
    assert [u.request_id for u in updates] == ["urgent", "late", "low", "later"]


def test_who_loses_least_is_preempted():
    engine = scheduler(blocks=11, block_size=4)
    engine.output_lengths.mean = 0
    # To compute again: b 5 tokens for 2 blocks, c 12 for 3. So b goes, though c came later.
    for name, length in (("a", 23), ("b", 5), ("c", 12)):
        engine.add(name, [5] * length, params(20))
    preempted = []
    while not preempted:
        preempted += step(engine)[0].preempted
    assert preempted == [1]
    assert [s.request_id for s in engine.running] == ["a", "c"]


def test_a_given_budget_bounds_the_step_but_never_those_who_run():
    engine = scheduler(budget=32)
    for name in "abc":
        engine.add(name, [5] * 4, params(9))
    step(engine)
    engine.add("d", [5] * 20, params(9))
    assert step(engine, budget=10)[0].num_tokens == 10
    assert step(engine, budget=1)[0].num_tokens == 4
    assert step(engine, budget=99)[0].num_tokens == 3 + 12


def test_priority_goes_first_but_does_not_interrupt():
    engine = scheduler(seqs=1, policy="priority")
    for name, priority in (("run", 5), ("low", 5), ("high", -1), ("mid", 0)):
        engine.add(name, [5], params(2), priority=priority)
        if name == "run":
            step(engine)
    _, updates = run_dry(engine)
    ends = [u.request_id for u in updates if u.finish_reason]
    assert ends == ["run", "high", "mid", "low"]


VARIATIONS = [
    {"block_size": b, "budget": t, "blocks": n, "seqs": s}
    for b, n in ((1, 64), (1, 600), (3, 24), (16, 4), (16, 64), (128, 8))
    for t in (1, 7, 64)
    for s in (1, 3, 8)
]


def test_tokens_depend_on_no_setting():
    requests = [([i, 2 * i, 3 * i % 97][: 1 + i % 3] * (1 + i), 5 + 4 * i) for i in range(9)]
    outputs, preemptions = [], 0
    for variation in VARIATIONS:
        engine = scheduler(context=64, **variation)
        engine.output_lengths.mean = 0
        for i, (prompt, max_tokens) in enumerate(requests):
            engine.add(str(i), prompt, params(max_tokens, ignore_eos=True))
        outputs.append(run_with_model(engine))
        preemptions += engine.counters.preemptions
    assert all(output == outputs[0] for output in outputs)
    assert preemptions > 20, "the test means nothing without preemptions"
    for i, (prompt, _) in enumerate(requests):
        assert outputs[0][str(i)][0] == next_token(prompt, 97)


def run_with_model(engine):
    runner = FakeRunner(
        "", device="", dtype="", max_model_len=64, block_size=engine.limits.block_size,
        progress=lambda *_: None,
    )  # fmt: skip
    runner.allocate_kv(engine.pool.num_blocks + 1)
    outputs = {}
    while engine.has_work:
        plan = engine.plan()
        for update in engine.commit(plan, runner.execute(plan).tokens):
            outputs.setdefault(update.request_id, []).extend(update.token_ids)
    engine.check_integrity()
    return outputs


def calls_of(action):
    """Calls of functions, ours and the interpreter's own, and what came of the action."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        result = action()
    finally:
        sys.setprofile(None)
    return calls - 1, result  # the last is setprofile's own


def decoding(count, block_size, lengths=1):
    engine = scheduler(
        blocks=8192, block_size=block_size, context=512, seqs=512, budget=8192, caching=True
    )
    for i in range(count):
        engine.add(str(i), [5 + i % 90] * (8 + i % lengths), params(400))
    step(engine)
    step(engine)
    return engine


def calls_of_a_step(engine):
    planning, plan = calls_of(engine.plan)
    committing, updates = calls_of(lambda: engine.commit(plan, [7] * plan.num_samples))
    assert len(updates) == plan.num_samples == engine.num_running
    return planning, committing


def test_planning_a_quiet_step_costs_nothing_for_those_to_whom_nothing_happens():
    costs = {}
    for count in (64, 256, 512):
        engine = decoding(count, 128)
        before = engine.pool.allocations
        costs[count] = calls_of_a_step(engine)
        assert engine.pool.allocations == before
    plans = {count: planning for count, (planning, _) in costs.items()}
    assert plans[64] == plans[256] == plans[512] <= 60
    # Each token is recorded and told.
    assert all(committing <= 5 * count + 20 for count, (_, committing) in costs.items())


def test_a_step_costs_as_much_as_happens_in_it():
    """With blocks of 16 tokens a sixteenth of the sequences needs one in each step."""
    for count in (64, 256, 512):
        engine = decoding(count, 16, lengths=16)
        before = engine.pool.allocations
        planning = committing = 0
        for _ in range(32):
            plan, commit = calls_of_a_step(engine)
            planning, committing = planning + plan, committing + commit
        events = engine.pool.allocations - before
        assert events == 2 * count
        assert planning <= 32 * 60 + 20 * events
        assert committing <= 32 * (5 * count + 20) + 12 * events


def test_allocations_are_exactly_the_blocks_that_were_needed():
    engine = scheduler(blocks=200, block_size=4)
    for i in range(8):
        engine.add(str(i), [5] * (i + 1), params(10))
    run_dry(engine)
    # The last drawn token never enters the cache.
    assert engine.pool.allocations == sum(-(-(i + 1 + 9) // 4) for i in range(8))


def test_the_integrity_check_sees_a_lost_block():
    engine = scheduler()
    engine.add("a", [5], params(9))
    step(engine)
    engine.check_integrity()
    next(iter(engine.running)).block_table.clear()
    with pytest.raises(IntegrityError):
        engine.check_integrity()
