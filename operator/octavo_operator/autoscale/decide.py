"""How many replicas: demand in blocks over usable blocks of a replica, then windows and rates.

demand = active blocks + blocks that waiting requests need, over all replicas that answered
usable = mean pool of a replica x targets.kvUtilization
wanted = ceil(demand / usable), or the present count within the tolerance

Then, as in the HorizontalPodAutoscaler: up to the least wanted in the up window, down to the most
wanted in the down window, at most maxPods per period, between min and max. The present count
includes replicas that are still starting, so a slow start is not answered by more replicas.
Missing answers hold: with none nothing moves, with some the count may rise but never fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo_operator.autoscale.samples import Load, Sample
from octavo_operator.spec import Autoscaling, Pace

_EPSILON = 1e-9


@dataclass(frozen=True)
class Inputs:
    """The numbers that a decision looked at."""

    active_blocks: int = 0
    waiting_blocks: int = 0
    usable_blocks_per_pod: float = 0.0
    wanted: int = 0
    fresh_pods: int = 0
    expected_pods: int = 0
    starting_pods: int = 0


@dataclass(frozen=True)
class Decision:
    """How many replicas, why in a sentence, what limited it, and what was looked at.

    `recommended` is the count before windows, rates and bounds: the windows remember it.
    `at_maximum` says that the load asked for more than `max` at some time in the down window.
    """

    desired: int
    why: str
    limited_by: str
    inputs: Inputs
    recommended: int
    at_maximum: bool


@dataclass(frozen=True)
class History:
    """The present count, what was wanted lately, and how the count changed lately."""

    current: int
    wanted: tuple[tuple[float, int], ...] = ()
    changes: tuple[tuple[float, int], ...] = ()

    @classmethod
    def starting(cls, current: int, now: float) -> History:
        """A new history; it counts as wanting the present count, so a restart never shrinks."""
        return cls(current=current, wanted=((now, current),))

    def after(self, decision: Decision, policy: Autoscaling, now: float) -> History:
        """The history once the decision took effect, without what no window needs any more."""
        horizon = now - max(policy.up.window_seconds, policy.down.window_seconds)
        period = now - max(policy.up.period_seconds, policy.down.period_seconds)
        wanted = [*(w for w in self.wanted if w[0] >= horizon), (now, decision.recommended)]
        changes = [c for c in self.changes if c[0] > period]
        if decision.desired != self.current:
            changes.append((now, decision.desired - self.current))
        return replace(self, current=decision.desired, wanted=tuple(wanted), changes=tuple(changes))


def decide(
    policy: Autoscaling, samples: Sequence[Sample], history: History, now: float
) -> Decision:
    """The count that the policy gives for these samples; see the module for the law."""
    inputs = _measure(policy, samples, now)
    current = history.current
    recommended, limited_by = _recommend(policy, inputs, current)
    lowest = min([recommended, *_within(history.wanted, now - policy.up.window_seconds)])
    highest = max([recommended, *_within(history.wanted, now - policy.down.window_seconds)])
    target = max(lowest, min(current, highest))
    if target != recommended:
        limited_by = "UpWindow" if recommended > current else "DownWindow"
    paced = _pace(policy, history, target, now)
    if paced != target:
        limited_by = "UpRate" if target > current else "DownRate"
    desired = min(max(paced, policy.min), policy.max)
    if desired != paced:
        limited_by = "Max" if desired == policy.max else "Min"
    return Decision(
        desired=desired,
        why=_why(policy, inputs, desired, limited_by),
        limited_by=limited_by,
        inputs=inputs,
        recommended=recommended,
        at_maximum=highest > policy.max,
    )


def kv_percent(samples: Sequence[Sample], now: float) -> int | None:
    """Percent of all blocks in use over the replicas that answered; None when none did."""
    loads = _serving(samples, now)
    total = sum(load.total_blocks for load in loads)
    return (
        min(100, round(100 * sum(load.active_blocks for load in loads) / total)) if total else None
    )


def _serving(samples: Sequence[Sample], now: float) -> list[Load]:
    loads = [sample.fresh(now) for sample in samples]
    return [load for load in loads if load and load.state == "Ready" and load.total_blocks > 0]


def _measure(policy: Autoscaling, samples: Sequence[Sample], now: float) -> Inputs:
    loads = _serving(samples, now)
    expected = [sample for sample in samples if sample.expected]
    answered = [sample for sample in expected if sample.fresh(now)]
    inputs = Inputs(
        active_blocks=sum(load.active_blocks for load in loads),
        waiting_blocks=sum(load.waiting_blocks for load in loads),
        fresh_pods=len(answered) if loads else 0,
        expected_pods=len(expected),
        starting_pods=len(samples) - len(expected),
    )
    if not loads:
        return inputs
    pool = sum(load.total_blocks for load in loads) / len(loads)
    usable = pool * policy.targets.kv_utilization
    demand = inputs.active_blocks + inputs.waiting_blocks
    return replace(inputs, usable_blocks_per_pod=usable, wanted=_ceil(demand / usable))


def _ceil(value: float) -> int:
    # 57 blocks over 0.57 x 100 are one replica, whatever binary fractions say.
    return math.ceil(value - _EPSILON)


def _recommend(policy: Autoscaling, inputs: Inputs, current: int) -> tuple[int, str]:
    """What the load asks for, before windows, rates and bounds."""
    if not inputs.usable_blocks_per_pod:
        return current, "Metrics"
    if inputs.fresh_pods < inputs.expected_pods and inputs.wanted <= current:
        return current, "Metrics"
    demand = inputs.active_blocks + inputs.waiting_blocks
    supply = current * inputs.usable_blocks_per_pod
    if (
        inputs.wanted != current
        and supply
        and abs(demand / supply - 1) <= policy.tolerance + _EPSILON
    ):
        return current, "Tolerance"
    return inputs.wanted, "None"


def _within(wanted: Sequence[tuple[float, int]], since: float) -> list[int]:
    return [count for at, count in wanted if at >= since]


def _pace(policy: Autoscaling, history: History, target: int, now: float) -> int:
    """Bound the change by maxPods per period, counting the changes of the running period."""
    if target > history.current:
        done = sum(by for by in _changes(history, policy.up, now) if by > 0)
        return min(target, history.current + max(0, policy.up.max_pods - done))
    done = -sum(by for by in _changes(history, policy.down, now) if by < 0)
    return max(target, history.current - max(0, policy.down.max_pods - done))


def _changes(history: History, pace: Pace, now: float) -> list[int]:
    return [by for at, by in history.changes if at > now - pace.period_seconds]


def _why(policy: Autoscaling, inputs: Inputs, desired: int, limited_by: str) -> str:
    if not inputs.usable_blocks_per_pod:
        return (
            f"None of {inputs.expected_pods} started replicas answered with its load, "
            f"so the count is {desired}{_LIMITS[limited_by]}."
        )
    return (
        f"{inputs.active_blocks} active and {inputs.waiting_blocks} waiting blocks need "
        f"{inputs.wanted} replicas of {inputs.usable_blocks_per_pod:.0f} usable blocks "
        f"({policy.targets.kv_utilization:.0%} of the pool); set to {desired}{_LIMITS[limited_by]}."
    )


_LIMITS = {
    "None": "",
    "Min": " (autoscaling.min)",
    "Max": " (autoscaling.max)",
    "UpWindow": " (up.windowSeconds)",
    "DownWindow": " (down.windowSeconds)",
    "UpRate": " (up.maxPods per period)",
    "DownRate": " (down.maxPods per period)",
    "Tolerance": " (within the tolerance)",
    "Metrics": " (held: load is missing)",
}
