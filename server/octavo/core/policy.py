"""Scheduling policies: each gives waiting sequences an order, and decides nothing else."""

from __future__ import annotations

import difflib
from typing import ClassVar, Protocol

from octavo.core.sequence import Sequence


class SchedulingPolicy(Protocol):
    """Orders the waiting queue: the sequence with the smallest key is admitted first.

    The key is read once, when the sequence starts to wait, so it must not change while it waits.
    End it with `arrival`, which is unique: the order is then total, and a preempted sequence
    returns to the place it had.
    """

    def sort_key(self, sequence: Sequence) -> tuple[float, ...]:
        """The sequence's place in the queue, smallest first."""
        ...


class FcfsPolicy:
    """First come, first served."""

    def sort_key(self, sequence: Sequence) -> tuple[float, ...]:
        """Order of arrival."""
        return (sequence.arrival,)


# So much waiting makes up for a priority one higher.
AGEING_S = 30.0


class PriorityPolicy:
    """Lowest `priority` value first, with ageing; equal priorities in order of arrival.

    All that wait grow older at one pace, so that their order follows from when they came: nobody
    waits for ever behind a stream of more important ones, and no key needs to change.
    """

    def sort_key(self, sequence: Sequence) -> tuple[float, ...]:
        """Time of arrival, later by so much for each step of priority; then order of arrival."""
        return (sequence.arrival_time + AGEING_S * sequence.priority, sequence.arrival)


class UnknownPolicyError(ValueError):
    """No policy is registered under the name that was asked for."""


class PolicyFactory:
    """Policies by name; `register` adds a user's own."""

    _policies: ClassVar[dict[str, type[SchedulingPolicy]]] = {
        "fcfs": FcfsPolicy,
        "priority": PriorityPolicy,
    }

    @classmethod
    def register(cls, name: str, policy: type[SchedulingPolicy]) -> None:
        """Make `policy` available under `name`; a name already taken is refused."""
        if name in cls._policies:
            raise ValueError(f"a scheduling policy named {name!r} is already registered")
        cls._policies[name] = policy

    @classmethod
    def get_policy(cls, name: str) -> SchedulingPolicy:
        """A new policy object for `name`."""
        if name not in cls._policies:
            near = difflib.get_close_matches(name, cls._policies, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(cls.names())
            raise UnknownPolicyError(f"no scheduling policy {name!r}{hint} (known: {known})")
        return cls._policies[name]()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The registered names, sorted."""
        return tuple(sorted(cls._policies))
