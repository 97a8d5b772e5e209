"""The queue in virtual time: dedupe, one worker a key, backoff, resync, nothing lost."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
import virtual_time

from octavo_operator.queue import KeyedQueue


def middle() -> float:
    """No jitter: the factor is exactly 1."""
    return 0.5


class Worker:
    """Notes when it was called, and does what the test says."""

    def __init__(self, act: Callable[[str], Awaitable[float | None]] | None = None) -> None:
        self.calls: list[tuple[float, str]] = []
        self._act = act

    async def __call__(self, key: str) -> float | None:
        self.calls.append((round(asyncio.get_running_loop().time(), 3), key))
        return await self._act(key) if self._act else None

    def times(self, key: str = "a") -> list[float]:
        return [at for at, found in self.calls if found == key]


async def failing(_: str) -> float | None:
    raise RuntimeError("broken")


async def slow(_: str) -> float | None:
    await asyncio.sleep(1.0)
    return None


def play(worker: Worker, script: Callable[[KeyedQueue], Awaitable[None]], workers: int = 8) -> None:
    async def main() -> None:
        queue = KeyedQueue(worker, workers=workers, rng=middle)
        await script(queue)
        await queue.close()

    virtual_time.run(main())


def test_adding_twice_is_working_once() -> None:
    worker = Worker()

    async def script(queue: KeyedQueue) -> None:
        for _ in range(5):
            queue.add("a", 0.05)
        await asyncio.sleep(1)

    play(worker, script)
    assert worker.times() == [0.05]


def test_the_earlier_time_wins() -> None:
    worker = Worker()

    async def script(queue: KeyedQueue) -> None:
        queue.add("a", 10)
        queue.add("a", 1)
        queue.add("a", 5)
        await asyncio.sleep(20)

    play(worker, script)
    assert worker.times() == [1]


def test_a_key_added_at_work_is_worked_on_again_and_never_twice_at_once() -> None:
    worker = Worker(slow)

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        await asyncio.sleep(0.5)
        queue.add("a")
        queue.add("a")
        await asyncio.sleep(5)

    play(worker, script)
    assert worker.times() == [0, 1]


def test_keys_do_not_wait_for_each_other() -> None:
    worker = Worker(slow)

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        queue.add("b")
        await asyncio.sleep(3)

    play(worker, script)
    assert (worker.times("a"), worker.times("b")) == ([0], [0])


def test_workers_are_limited_and_nothing_is_lost() -> None:
    worker = Worker(slow)
    keys = [str(index) for index in range(10)]
    depths = []

    async def script(queue: KeyedQueue) -> None:
        for key in keys:
            queue.add(key)
        await asyncio.sleep(0.5)
        depths.append((queue.depth(), queue.oldest_seconds()))
        await asyncio.sleep(10)
        depths.append((queue.depth(), queue.oldest_seconds()))

    play(worker, script, workers=2)
    assert sorted(key for _, key in worker.calls) == keys
    assert [at for at, _ in worker.calls] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert depths == [(8, 0.5), (0, 0.0)]


def test_failures_come_again_exponentially_up_to_a_minute() -> None:
    worker = Worker(failing)

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        await asyncio.sleep(300)

    play(worker, script)
    gaps = [round(b - a, 3) for a, b in itertools.pairwise(worker.times())]
    assert gaps[:9] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2]
    assert set(gaps[9:]) == {60.0}


def test_events_do_not_break_the_backoff() -> None:
    """A child that changes all the time must not turn a failure into a busy loop."""
    worker = Worker(failing)

    async def script(queue: KeyedQueue) -> None:
        async def noise() -> None:
            while True:
                queue._keys["a"].again = True  # what add() does during the work
                await asyncio.sleep(0.01)

        queue.add("a")
        task = asyncio.create_task(noise())
        await asyncio.sleep(3)
        task.cancel()

    play(worker, script)
    assert len(worker.times()) <= 6


def test_success_forgets_the_failures() -> None:
    outcomes = iter([True, True, False, True])

    async def act(_: str) -> float | None:
        if next(outcomes, False):
            raise RuntimeError("broken")
        return 1.0

    worker = Worker(act)

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        await asyncio.sleep(2.0)

    play(worker, script)
    assert worker.times()[:5] == [0, 0.2, 0.6, 1.6, 1.8]


def test_keys_come_again_every_five_minutes() -> None:
    worker = Worker()

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        await asyncio.sleep(1000)

    play(worker, script)
    assert worker.times() == [0, 300, 600, 900]


def test_resync_and_retry_are_jittered() -> None:
    worker = Worker()
    draws = iter([0.0, 1.0, 0.5])

    async def main() -> None:
        queue = KeyedQueue(worker, rng=lambda: next(draws, 0.5))
        queue.add("a")
        await asyncio.sleep(901)
        await queue.close()

    virtual_time.run(main())
    assert worker.times() == [0, 240, 600, 900]


@pytest.mark.parametrize("during", [0.5, 1.5])
def test_a_dropped_key_does_not_come_again(during: float) -> None:
    worker = Worker(slow)

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        await asyncio.sleep(during)
        queue.drop("a")
        queue.drop("unknown")
        await asyncio.sleep(1000)

    play(worker, script)
    assert worker.times() == [0]


def test_closing_ends_work_under_way() -> None:
    ended = []

    async def act(_: str) -> float | None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(asyncio.get_running_loop().time())
        return None

    async def script(queue: KeyedQueue) -> None:
        queue.add("a")
        await asyncio.sleep(1)

    play(Worker(act), script)
    assert ended == [1]
