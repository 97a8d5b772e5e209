"""Steps submitted before the tokens of the last are read: the same tokens, or an honest refusal."""

from pathlib import Path

import llama_checkpoints
import numpy as np
import pytest
import torch

from octavo.core.step import NO_TOKEN, PENDING, ScheduledSequence, StepPlan, needs_host
from octavo.engine.batch import build_batch, resolve
from octavo.engine.runner import Runner
from octavo.params import SamplingParams

CPU = torch.device("cpu")
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=3)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return llama_checkpoints.write(tmp_path_factory.mktemp("model"))


def share(seq_id, tokens, start, table, generated, params=GREEDY, *, samples=True):
    return ScheduledSequence(seq_id, tokens, start, table, samples, params, generated)


def generate(runner: Runner, prompts, steps: int, *, two_deep: bool):
    """Tokens of all prompts; the second joins the first at step 3, to mix kinds of work."""
    runner.allocate_kv(32)
    tables = [[3, 1, 7, 12], [2, 9, 8, 4]]
    params = [SEEDED, GREEDY]
    drawn: list[list[int]] = [[], []]
    counts = [0, 0]
    in_flight: list[tuple[list[int], object]] = []
    for step in range(steps):
        shares, active = [], [0] if step < 3 else [0, 1]
        for i in active:
            if counts[i] == 0:
                tokens, start = prompts[i], 0
            else:
                known = len(drawn[i]) == counts[i]
                tokens = [drawn[i][-1] if known else PENDING]
                start = len(prompts[i]) + counts[i] - 1
            shares.append(share(i, tokens, start, tables[i], counts[i], params[i]))
            counts[i] += 1
        if step == 5:
            shares.reverse()
        in_flight.append(([s.seq_id for s in shares], runner.submit(StepPlan(tuple(shares)))))
        if len(in_flight) == 1 + two_deep:
            take(runner, in_flight, drawn)
    while in_flight:
        take(runner, in_flight, drawn)
    return drawn


def take(runner, in_flight, drawn) -> None:
    seq_ids, step = in_flight.pop(0)
    for seq_id, token in zip(seq_ids, runner.collect(step).tokens, strict=True):
        drawn[seq_id].append(token)


def test_two_steps_in_flight_draw_the_tokens_of_one(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu")
    prompts = [[5, 6, 7, 8, 9], [20] * 18]
    expected = generate(runner, prompts, 12, two_deep=False)
    assert [len(tokens) for tokens in expected] == [12, 9]
    assert len(set(expected[0])) > 1
    assert generate(runner, prompts, 12, two_deep=True) == expected


def test_a_token_that_nobody_draws_is_refused(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu")
    runner.allocate_kv(8)
    runner.submit(StepPlan((share(0, [5, 6], 0, [1], 0),)))
    with pytest.raises(RuntimeError, match="sequence 4 waits for a token that the plan before"):
        runner.submit(StepPlan((share(4, [PENDING], 2, [2], 1),)))


def test_only_the_plan_just_before_can_be_waited_for(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu")
    runner.allocate_kv(8)
    runner.submit(StepPlan((share(0, [5, 6], 0, [1], 0),)))
    runner.submit(StepPlan((share(1, [5, 6], 0, [2], 0),)))
    with pytest.raises(RuntimeError, match="sequence 0 waits"):
        runner.submit(StepPlan((share(0, [PENDING], 2, [1], 1),)))


def test_a_pending_token_that_came_to_nothing_does_no_harm() -> None:
    plan = resolve(StepPlan((share(0, [7, PENDING], 2, [1], 1),), ((1, 2),), (9,)), {0: NO_TOKEN})
    assert plan.sequences[0].token_ids == [7, 0]
    assert (plan.copies, plan.preempted) == (((1, 2),), (9,))


def test_sequences_with_one_token_come_first_and_results_keep_the_plan_s_order() -> None:
    want = SamplingParams(prompt_logprobs=0)
    plan = StepPlan(
        (
            share(0, [1, 2, 3], 4, [5, 6], 0),
            share(1, [4], 9, [1, 2, 3], 2),
            ScheduledSequence(2, [5, 6], 0, [7], False, want, 0, [5, 6, 7], 3),
            share(3, [8], 0, [4], 0),
        )
    )
    batch = build_batch(plan, 4, CPU)
    assert (batch.num_decodes, batch.max_query_len) == (2, 3)
    assert batch.token_ids.tolist() == [4, 8, 1, 2, 3, 5, 6]
    assert batch.positions.tolist() == [9, 0, 4, 5, 6, 0, 1]
    assert batch.query_start.tolist() == [0, 1, 2, 5, 7]
    assert batch.seq_lens.tolist() == [10, 1, 7, 2]
    assert batch.slots[0].tolist() == [13, 16, 24, 25, 26, 28, 29]
    # Of 0, 1 and 3, which sample, in the plan's order; then of 2's prompt.
    assert batch.logit_rows.tolist() == [4, 0, 1, 5, 6]


def test_arrays_are_those_of_brute_force() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        shares = []
        for seq_id in range(random.integers(1, 6)):
            count, start = int(random.choice([1, 1, 2, 5])), int(random.integers(0, 9))
            table = random.integers(1, 50, (start + count + 3) // 4 + 1).tolist()
            tokens = random.integers(0, 90, count).tolist()
            samples = bool(random.integers(2))
            shares.append(share(seq_id, tokens, start, table, 0, samples=samples))
        batch = build_batch(StepPlan(tuple(shares)), 4, CPU)
        ordered = sorted(shares, key=lambda s: len(s.token_ids) > 1)
        flat = [(s, s.start + k, t) for s in ordered for k, t in enumerate(s.token_ids)]
        assert batch.token_ids.tolist() == [t for _, _, t in flat]
        assert batch.slots[0].tolist() == [s.block_table[p // 4] * 4 + p % 4 for s, p, _ in flat]
        last = {s.seq_id: i for i, (s, _, _) in enumerate(flat)}
        assert batch.logit_rows.tolist() == [last[s.seq_id] for s in shares if s.samples]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SEEDED, False),
        (SamplingParams(top_k=5, min_p=0.1, min_tokens=3, logprobs=2), False),
        (SamplingParams(repetition_penalty=1.1, presence_penalty=0.5), False),
        (SamplingParams(bad_words_ids=((3,), (4,))), False),
        (SamplingParams(typical_p=0.5), False),
        (SamplingParams(typical_p=0.5, frequency_penalty=0.5), True),
        (SamplingParams(bad_words_ids=((3, 4),)), True),
        (SamplingParams(use_beam_search=True, temperature=0, best_of=2), True),
    ],
)
def test_what_needs_the_host(params, expected) -> None:
    assert needs_host(params) is expected
