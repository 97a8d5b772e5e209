"""Policies order the waiting queue; the factory knows them by name."""

import random

import pytest

from octavo.core.group import Group
from octavo.core.policy import FcfsPolicy, PolicyFactory, PriorityPolicy, UnknownPolicyError
from octavo.core.sequence import Sequence, blocks_for
from octavo.core.waiting import WaitingQueue
from octavo.kv_layout import KvGroups
from octavo.params import SamplingParams


def sequence(arrival, priority=0, length=5, max_new=10):
    return Sequence(
        seq_id=arrival,
        request_id=str(arrival),
        tokens=[1] * length,
        num_prompt_tokens=length,
        max_new_tokens=max_new,
        params=SamplingParams(),
        arrival=arrival,
        priority=priority,
    )


def drain(queue):
    return [queue.pop().arrival for _ in range(len(queue))]


def filled(policy, sequences):
    queue = WaitingQueue(policy, KvGroups(4))
    for item in random.Random(3).sample(sequences, len(sequences)):
        queue.push(Group(item.arrival, [item]))
    return queue


def test_fcfs_is_order_of_arrival_whatever_the_priority():
    assert drain(filled(FcfsPolicy(), [sequence(i, priority=-i) for i in range(20)])) == [
        *range(20)
    ]


def test_priority_is_lowest_value_first_then_order_of_arrival():
    sequences = [sequence(i, priority=i % 3) for i in range(9)]
    assert drain(filled(PriorityPolicy(), sequences)) == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_removal_anywhere_keeps_order_and_sums():
    sequences = [sequence(i, length=1 + i % 7, max_new=i + 1) for i in range(300)]
    queue = filled(FcfsPolicy(), sequences)
    groups = {group.arrival: group for group in queue}
    gone = set(random.Random(5).sample(range(300), 290))
    for i in gone:
        queue.remove(groups[i])
    left = [s for s in sequences if s.seq_id not in gone]
    totals = queue.totals
    assert totals.count == len(queue) == 10
    assert totals.tokens == sum(len(s.tokens) for s in left)
    assert totals.blocks == sum(blocks_for(len(s.tokens), 4) for s in left)
    assert totals.growth == sum(s.remaining for s in left)
    # Removed entries do not pile up: the heap was rebuilt on the way.
    assert len(queue._heap) < 2 * 10 + 70
    assert drain(queue) == [s.seq_id for s in left]
    assert (totals.count, totals.tokens, totals.blocks, totals.growth) == (0, 0, 0, 0)


def test_the_factory_names_the_nearest_policy():
    with pytest.raises(
        UnknownPolicyError, match=r"no scheduling policy 'fcsf'; did you mean 'fcfs'"
    ):
        PolicyFactory.get_policy("fcsf")


def test_a_users_own_policy(monkeypatch):
    class Lifo:
        def sort_key(self, sequence):
            return (-sequence.arrival,)

    monkeypatch.setattr(PolicyFactory, "_policies", dict(PolicyFactory._policies))
    PolicyFactory.register("lifo", Lifo)
    assert PolicyFactory.names() == ("fcfs", "lifo", "priority")
    queue = filled(PolicyFactory.get_policy("lifo"), [sequence(i) for i in range(5)])
    assert drain(queue) == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="'lifo' is already registered"):
        PolicyFactory.register("lifo", Lifo)
