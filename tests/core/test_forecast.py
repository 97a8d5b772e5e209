"""Forecasts: closed cases worked out by hand, and bounds that hold for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.core import forecast
from octavo.core.sequence import Sequence, blocks_for
from octavo.core.step import ScheduledSequence, StepPlan
from octavo.core.waiting import WaitingTotals
from octavo.kv_layout import KvGroups
from octavo.params import SamplingParams

EMPTY = WaitingTotals()


def sequence(prompt=16, generated=0, max_new=100, computed=None):
    length = prompt + generated
    made = Sequence(
        seq_id=0,
        request_id="r",
        tokens=[1] * length,
        num_prompt_tokens=prompt,
        max_new_tokens=max_new,
        params=SamplingParams(),
        arrival=0,
    )
    made.computed = length - 1 if computed is None else computed
    return made


def demand(running=(), waiting=EMPTY, *, mean=50.0, pace=1.0, active=0):
    return forecast.demand_blocks(
        list(running),
        waiting,
        active_blocks=active,
        kv=KvGroups(16),
        mean_output=mean,
        tokens_per_s=pace,
    )


def test_the_mean_forgets_the_prior_at_once_and_the_past_slowly():
    lengths = forecast.OutputLengths()
    assert lengths.mean == forecast.PRIOR_OUTPUT_TOKENS
    lengths.observe(10)
    assert lengths.mean == 10
    lengths.observe(20)
    assert lengths.mean == 15
    for _ in range(500):
        lengths.observe(40)
    assert lengths.mean == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize(
    ("generated", "max_new", "growth"),
    [(0, 100, 50), (10, 100, 40), (60, 100, 30), (90, 100, 10), (0, 8, 8), (1, 1, 0)],
)
def test_expected_growth(generated, max_new, growth):
    grown = forecast.expected_growth(sequence(generated=generated, max_new=max_new), 50.0)
    assert grown == growth


def test_an_idle_engine_demands_nothing():
    assert demand() == {"now": 0, "10s": 0, "30s": 0, "60s": 0}


def test_demand_grows_at_the_measured_pace_up_to_the_expected_output():
    # 16 known tokens; in 10 s 10 more, in 30 s 30 more, and then 50, the mean.
    assert demand([sequence()]) == {"now": 1, "10s": 2, "30s": 3, "60s": 5}


def test_waiting_work_is_part_of_demand():
    waiting = WaitingTotals(count=2, tokens=40, blocks=4, growth=24)
    assert demand([sequence()], waiting) == {"now": 5, "10s": 8, "30s": 9, "60s": 11}


def test_what_sequences_share_is_counted_once():
    first, second = sequence(prompt=32), sequence(prompt=32)
    first.block_table, second.block_table = [1, 2], [1, 2]
    assert demand([first, second], pace=0, active=2)["now"] == 2
    assert demand([first, second], active=2)["60s"] == 2 + 2 * (6 - 2)
    joins_later = sequence(prompt=32)
    joins_later.branch = 1
    assert demand([first, joins_later], pace=0, active=2)["now"] == 2


def test_exhaustion_is_read_off_the_straight_line_between_horizons():
    curve = {"now": 6900, "10s": 7400, "30s": 8200, "60s": 8800}
    assert forecast.seconds_to_exhaustion(curve, 7021) == pytest.approx(2.42)
    assert forecast.seconds_to_exhaustion(curve, 8200) == 30.0
    assert forecast.seconds_to_exhaustion(curve, 8800) is None
    assert forecast.seconds_to_exhaustion(curve, 6899) == 0.0
    assert forecast.seconds_to_exhaustion(curve, 6900) == 0.0


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(1, 90)), max_size=8
    ),
    mean=st.floats(0, 200),
    pace=st.floats(0, 100),
    total=st.integers(1, 60),
)
def test_demand_never_falls_with_the_horizon_and_is_bounded_by_what_may_be_drawn(
    lengths, mean, pace, total
):
    running = [sequence(p, g, max(g, m)) for p, g, m in lengths]
    curve = list(demand(running, mean=mean, pace=pace).values())
    assert curve == sorted(curve)
    assert curve[0] == sum(blocks_for(len(s.tokens), 16) for s in running)
    assert curve[-1] <= sum(blocks_for(s.num_prompt_tokens + s.max_new_tokens, 16) for s in running)
    seconds = forecast.seconds_to_exhaustion(demand(running, mean=mean, pace=pace), total)
    assert (seconds is None) == (curve[-1] <= total)
    assert seconds is None or 0 <= seconds <= 60


def share(count, num_generated):
    return ScheduledSequence(0, [1] * count, 0, [], True, SamplingParams(), num_generated)


def test_rates_come_from_measured_steps():
    rates = forecast.StepRates()
    assert (rates.decode_tokens_per_s, rates.prefill_tokens_per_s) == (0.0, 0.0)
    # A decoding sequence, a prompt, a prompt's last single token, a replay.
    plan = StepPlan((share(1, 4), share(6, 0), share(1, 0), share(3, 2)))
    assert forecast.prefill_tokens(plan) == 10
    rates.observe(plan, token_budget=22, seconds=0.5)
    assert rates.prefill_tokens_per_s == 20
    assert rates.decode_tokens_per_s == 2
    assert rates.budget_used == 0.5
    rates.observe(StepPlan((share(1, 4),)), token_budget=22, seconds=0.5)
    assert rates.prefill_tokens_per_s == 20, "a step without a prompt says nothing about prefill"
    assert rates.budget_used < 0.5


def test_a_large_step_was_full_and_no_more():
    rates = forecast.StepRates()
    rates.observe(StepPlan((share(40, 0),)), token_budget=10, seconds=0.5)
    assert rates.budget_used == 1


def test_steps_of_prompts_alone_say_nothing_about_the_pace_of_decoding():
    """Nobody's next token waits for them, and large ones take many times what others take."""
    rates = forecast.StepRates()
    prompts = StepPlan((share(40, 0), share(3, 2)))
    rates.observe(prompts, token_budget=10, seconds=0.2)
    assert rates.decode_tokens_per_s == 0
    for _ in range(3):
        rates.observe(StepPlan((share(1, 4),)), token_budget=10, seconds=0.01)
        rates.observe(prompts, token_budget=10, seconds=0.2)
        assert rates.decode_tokens_per_s == pytest.approx(100)


def test_backlog_is_prompts_and_replays_over_the_measured_rate():
    halfway = sequence(prompt=30, computed=10)
    decoding = sequence(prompt=30, generated=5)
    waiting = WaitingTotals(count=1, tokens=80, blocks=5, growth=9)
    assert forecast.prefill_backlog_s([halfway, decoding], waiting, 50.0) == 2.0
    assert forecast.prefill_backlog_s([halfway], waiting, 0.0) == 0.0
