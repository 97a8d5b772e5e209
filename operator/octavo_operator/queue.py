"""A queue of keys for a level-triggered reconciler: what happened is forgotten, who is kept.

Adding a key that waits already does nothing; a key is never worked on twice at once; one that is
added while it is worked on is worked on again. A failure is retried after 0.2 s, doubling to 60 s;
after a success the key comes again by itself every five minutes. All delays are jittered, so that a
thousand keys that failed together do not return together.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 60.0
RESYNC_SECONDS = 300.0
JITTER = 0.2

# Works on a key; may return after how many seconds it wants the key again.
Work = Callable[[str], Awaitable[float | None]]


@dataclass(eq=False)
class _Key:
    """Where a key stands: waiting for its time, for a worker, or at work."""

    due: float = 0.0
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    working: bool = False
    again: bool = False
    failures: int = 0


class KeyedQueue:
    """Runs `work` for every key that was added; needs a running event loop."""

    def __init__(
        self, work: Work, *, workers: int = 8, rng: Callable[[], float] = random.random
    ) -> None:
        self._work = work
        self._workers = asyncio.Semaphore(workers)
        self._rng = rng
        self._keys: dict[str, _Key] = {}

    def add(self, key: str, delay: float = 0.0) -> None:
        """Have the key worked on after `delay` seconds at the latest."""
        state = self._keys.setdefault(key, _Key())
        if state.working:
            state.again = True
        elif state.task is None:
            self._schedule(key, state, delay)

    def drop(self, key: str) -> None:
        """Forget a key; work on it that is under way is finished but not repeated."""
        state = self._keys.pop(key, None)
        if state is None:
            return
        if state.timer:
            state.timer.cancel()
        if state.task and not state.working:
            state.task.cancel()

    def depth(self) -> int:
        """Keys whose time has come and that no worker has taken up."""
        return sum(state.task is not None and not state.working for state in self._keys.values())

    def oldest_seconds(self) -> float:
        """How long the oldest key has been due or at work; a stuck worker shows here."""
        now = asyncio.get_running_loop().time()
        return max((now - s.due for s in self._keys.values() if s.task is not None), default=0.0)

    async def close(self) -> None:
        """Cancel everything and wait until it has ended."""
        tasks = [state.task for state in self._keys.values() if state.task]
        for key in list(self._keys):
            self.drop(key)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _schedule(self, key: str, state: _Key, delay: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + delay
        if state.timer:
            if state.due <= due:
                return
            state.timer.cancel()
        state.due = due
        state.timer = loop.call_at(due, self._start, key, state)

    def _start(self, key: str, state: _Key) -> None:
        state.timer = None
        state.task = asyncio.get_running_loop().create_task(self._run(key, state))

    async def _run(self, key: str, state: _Key) -> None:
        async with self._workers:
            state.working = True
            delay = await self._attempt(key, state)
        state.working, state.task = False, None
        if self._keys.get(key) is not state:
            return
        if state.again and not state.failures:
            delay = 0.0
        state.again = False
        self._schedule(key, state, delay)

    async def _attempt(self, key: str, state: _Key) -> float:
        """Work once; return after how many seconds the key comes again."""
        try:
            wish = await self._work(key)
        except Exception as error:
            state.failures += 1
            delay = self._retry_delay(state.failures)
            logger.warning("%s failed, again in %.1f s: %s", key, delay, error)
            logger.debug("the failure of %s in full", key, exc_info=True)
            return delay
        state.failures = 0
        resync = self._jittered(RESYNC_SECONDS)
        return resync if wish is None else min(resync, self._jittered(wish))

    def _retry_delay(self, failures: int) -> float:
        exponential = FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 16)
        return self._jittered(min(LAST_RETRY_SECONDS, exponential))

    def _jittered(self, seconds: float) -> float:
        return seconds * (1 - JITTER + 2 * JITTER * self._rng())
