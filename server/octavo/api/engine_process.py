"""The engine as a child process: watched, and ended in time."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import threading
from concurrent.futures import Future


class EngineProcess:
    """One run of the engine process, which `launch` started before there was an event loop."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._code: Future[int] = Future()
        self._code.set_running_or_notify_cancel()  # who gives up waiting must not end it
        threading.Thread(target=self._reap, name="engine-exit", daemon=True).start()

    def _reap(self) -> None:
        self._code.set_result(self._process.wait())

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return not self._code.done()

    async def wait(self) -> str:
        """Wait for the end and say how it came, in words."""
        return describe_exit(await asyncio.wrap_future(self._code))

    async def end(self, patience: float) -> None:
        """Give the process `patience` seconds to end by itself, then kill it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), patience)
        if self.running:
            self._process.kill()
            await self.wait()


def describe_exit(code: int) -> str:
    """A return code in words, with the usual cause where there is one."""
    if code >= 0:
        return f"the engine process ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = "; the usual cause is the container's memory limit" if name == "SIGKILL" else ""
    return f"the engine process was killed by {name}{cause}"
