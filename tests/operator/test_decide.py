"""The scaling law, by cases and by properties."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import llmservices
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_operator.autoscale import Decision, History, Load, Sample, decide, kv_percent
from octavo_operator.spec import Autoscaling, Pace, Targets

POOL = 100


def policy(**given: Any) -> Autoscaling:
    """Target 0.8 of 100 blocks: a replica is to hold 80."""
    found = llmservices.service({"autoscaling": {"max": 10, **given}}).spec.autoscaling
    assert found
    return found


def pod(active: int = 0, waiting: int = 0, *, at: float = 0.0, name: str = "p") -> Sample:
    return Sample(name, True, at, Load("Ready", POOL, active, waiting))


def starting(name: str = "s") -> Sample:
    return Sample(name, False)


def silent(name: str = "q") -> Sample:
    return Sample(name, True)


def pods(*active: int, at: float = 0.0) -> list[Sample]:
    return [pod(blocks, at=at, name=f"p{index}") for index, blocks in enumerate(active)]


def at_rest(current: int) -> History:
    """A history that holds nothing back: no window is filled, no change was made."""
    return History(current)


def decided(samples: Sequence[Sample], current: int, now: float = 0.0, **given: Any) -> Decision:
    return decide(policy(**given), samples, at_rest(current), now)


@pytest.mark.parametrize(
    ("samples", "current", "desired"),
    [
        (pods(0), 1, 1),
        (pods(80), 1, 1),
        (pods(88), 1, 1),  # within the tolerance
        (pods(89), 1, 2),
        ([pod(100, 60)], 1, 2),
        ([pod(100, 61)], 2, 2),
        ([pod(100, 140)], 1, 3),
        (pods(40, 40), 2, 1),
        (pods(80, 79), 2, 2),
        (pods(80, 80, 1), 3, 3),  # two could not hold it
        (pods(10, 10, 10, 10), 4, 3),  # one at a time
    ],
)
def test_law(samples: list[Sample], current: int, desired: int) -> None:
    assert decided(samples, current).desired == desired


def test_reasons_carry_the_numbers() -> None:
    decision = decided([pod(100, 140)], 1)
    assert "100 active and 140 waiting blocks need 3 replicas of 80 usable blocks" in decision.why
    assert decision.limited_by == "None"
    assert (decision.inputs.wanted, decision.inputs.fresh_pods) == (3, 1)


def test_binary_fractions_do_not_cost_a_replica() -> None:
    assert decided([pod(57)], 1, targets={"kvUtilization": 0.57}, tolerance=0).desired == 1


def test_starting_replicas_are_supply() -> None:
    """Three were asked for and one answers: its backlog is no reason to ask for more."""
    decision = decided([pod(100, 140), starting("a"), starting("b")], 3)
    assert decision.desired == 3
    assert decision.inputs.starting_pods == 2


@pytest.mark.parametrize("sample", [silent(), pod(at=-60.0, name="old")])
def test_silence_never_shrinks(sample: Sample) -> None:
    decision = decided([pod(0), sample], 2)
    assert (decision.desired, decision.limited_by) == (2, "Metrics")


def test_partial_silence_may_grow() -> None:
    assert decided([pod(100, 200), silent()], 2).desired == 4


def test_nobody_answers_holds() -> None:
    decision = decided([silent("a"), silent("b")], 2)
    assert (decision.desired, decision.limited_by) == (2, "Metrics")
    assert "None of 2 started replicas answered" in decision.why


def test_nobody_has_started_holds() -> None:
    assert decided([starting()], 3).desired == 3
    assert decided([], 3).desired == 3


@pytest.mark.parametrize("state", ["Starting", "Failed", "Draining"])
def test_replicas_that_do_not_serve_are_no_supply(state: str) -> None:
    other = Sample("o", True, 0.0, Load(state, POOL, 50, 50))
    assert decided([pod(88), other], 1).inputs.active_blocks == 88


def test_bounds_win_over_everything() -> None:
    assert decided([silent()], 20, max=5).desired == 5
    low = decided([silent()], 1, min=3)
    assert (low.desired, low.limited_by) == (3, "Min")
    high = decided([pod(100, 900)], 3, max=4)
    assert (high.desired, high.limited_by, high.at_maximum) == (4, "Max", True)


def test_up_rate() -> None:
    decision = decided([pod(100, 900)], 1, up={"maxPods": 2})
    assert (decision.desired, decision.limited_by) == (3, "UpRate")


def test_rates_count_what_was_changed_in_the_period() -> None:
    law = policy(up={"maxPods": 2, "periodSeconds": 15})
    load = [pod(100, 900)]
    history, seen = at_rest(1), []
    for now in range(0, 40, 5):
        decision = decide(law, [replace(load[0], at=now)], history, now)
        history = history.after(decision, law, now)
        seen.append(decision.desired)
    assert seen == [3, 3, 3, 5, 5, 5, 7, 7]


def test_up_window_waits_for_the_least() -> None:
    law = policy(up={"windowSeconds": 10})
    history = History.starting(1, 0.0)
    seen = []
    for now in range(0, 16, 2):
        decision = decide(law, [pod(100, 100, at=now)], history, now)
        history = history.after(decision, law, now)
        seen.append(decision.desired)
    assert seen == [1, 1, 1, 1, 1, 1, 3, 3]


def test_down_window_remembers_the_most() -> None:
    """After the load is gone, nothing shrinks for 300 s, then one replica a minute."""
    law = policy()
    history = History.starting(1, -2.0)
    history = history.after(decide(law, [pod(100, 220)], history, 0), law, 0)
    assert history.current == 4
    changes = []
    for now in range(2, 600, 2):
        decision = decide(law, pods(*[0] * history.current, at=now), history, now)
        if decision.desired != history.current:
            changes.append((now, decision.desired))
        history = history.after(decision, law, now)
    assert changes == [(302, 3), (362, 2), (422, 1)]


def test_a_restart_shrinks_nothing_before_the_window_has_passed() -> None:
    law = policy(down={"windowSeconds": 100, "periodSeconds": 1})
    history = History.starting(3, 0.0)
    first = None
    for now in range(0, 200, 2):
        decision = decide(law, pods(0, 0, 0, at=now), history, now)
        if decision.desired < 3 and first is None:
            first = now
        history = history.after(decision, law, now)
    assert first == 102


def test_histories_stay_small() -> None:
    law = policy(down={"windowSeconds": 60})
    history = History.starting(1, 0)
    for now in range(5000):
        history = history.after(decide(law, [pod(now % 150, at=now)], history, now), law, now)
    assert len(history.wanted) <= 62
    assert len(history.changes) <= 60


def test_kv_percent() -> None:
    assert kv_percent(pods(50, 100), 0) == 75
    assert kv_percent([starting(), silent()], 0) is None
    assert kv_percent(pods(50), 100) is None


# Properties

blocks = st.integers(0, 5000)
counts = st.integers(1, 40)
paces = st.builds(Pace, st.integers(0, 60), st.integers(1, 8), st.integers(1, 60))
policies = st.builds(
    lambda low, more, target, tolerance, up, down: Autoscaling(
        low, low + more, Targets(target), tolerance, 2, up, down
    ),
    st.integers(1, 10),
    st.integers(0, 20),
    st.floats(0.1, 0.95),
    st.floats(0, 0.5),
    paces,
    paces,
)
fleets = st.lists(
    st.one_of(
        st.builds(pod, blocks, blocks),
        st.just(starting()),
        st.just(silent()),
        st.builds(pod, blocks, blocks, at=st.floats(-1000, -11)),
    ),
    max_size=8,
)
histories = st.builds(
    History,
    counts,
    st.lists(st.tuples(st.floats(-60, 0), counts), max_size=5).map(tuple),
    st.lists(st.tuples(st.floats(-60, 0), st.integers(-3, 3)), max_size=3).map(tuple),
)


@given(policies, fleets, histories)
def test_the_count_is_within_the_bounds(
    law: Autoscaling, fleet: list[Sample], history: History
) -> None:
    assert law.min <= decide(law, fleet, history, 0.0).desired <= law.max


@given(policies, fleets, histories)
def test_missing_data_never_shrinks(
    law: Autoscaling, fleet: list[Sample], history: History
) -> None:
    decision = decide(law, [*fleet, silent()], history, 0.0)
    assert decision.desired >= min(history.current, law.max)


@given(policies, fleets, histories, st.integers(1, 5000))
def test_more_demand_never_gives_fewer(
    law: Autoscaling, fleet: list[Sample], history: History, more: int
) -> None:
    """With the same pool: one replica's waiting blocks grow."""
    base, grown = pod(10, 10), pod(10, 10 + more)
    one = decide(law, [*fleet, base], history, 0.0)
    two = decide(law, [*fleet, grown], history, 0.0)
    assert two.desired >= one.desired


@given(policies, fleets, histories)
def test_one_decision_obeys_the_rates(
    law: Autoscaling, fleet: list[Sample], history: History
) -> None:
    desired = decide(law, fleet, history, 0.0).desired
    if law.min <= history.current <= law.max:
        assert desired - history.current <= law.up.max_pods
        assert history.current - desired <= law.down.max_pods


@given(policies, st.integers(0, 4000), st.integers(1, 30))
def test_constant_demand_comes_to_rest(law: Autoscaling, demand: int, first: int) -> None:
    """Whatever the start, the count moves one way only and then stays."""
    current = min(max(first, law.min), law.max)
    history = History.starting(current, 0.0)
    seen = [current]
    for step in range(1, 60):
        now = step * 30.0
        share, rest = divmod(demand, history.current)
        fleet = [
            pod(share + (index < rest), at=now, name=str(index)) for index in range(history.current)
        ]
        history = history.after(decide(law, fleet, history, now), law, now)
        seen.append(history.current)
    moves = {(b > a) - (b < a) for a, b in itertools.pairwise(seen)} - {0}
    assert len(moves) <= 1
    assert len(set(seen[-20:])) == 1


@given(policies, st.lists(st.integers(0, 900), min_size=20, max_size=60))
def test_no_fall_within_a_window_of_a_peak(law: Autoscaling, demands: list[int]) -> None:
    """O-53: after a rise the count never falls sooner than the down window."""
    history = History.starting(law.min, 0.0)
    rose = None
    for step, demand in enumerate(demands, 1):
        now = step * 2.0
        decision = decide(law, [pod(demand, at=now)], history, now)
        if decision.desired > history.current:
            rose = now
        if decision.desired < history.current and rose is not None:
            assert now - rose > law.down.window_seconds
        history = history.after(decision, law, now)
