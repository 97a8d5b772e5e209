"""The engine as a child process: started, watched, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ENGINE_COMMAND = (sys.executable, "-m", "octavo.engine")


class EngineProcess:
    """One run of the engine process.

    It gets a session of its own, so that a terminal's Ctrl-C reaches only the API process, which
    then decides; it follows its parent's death by itself. Start it from the main thread: the
    kernel reports the death of the thread that started it.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str], folder: Path, config_json: str) -> EngineProcess:
        """Start `command` with the wire's folder and the engine's configuration."""
        process = await asyncio.create_subprocess_exec(
            *command,
            "--socket-dir",
            str(folder),
            "--config-json",
            config_json,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        return cls(process)

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.returncode is None

    async def wait(self) -> str:
        """Wait for the end and say how it came, in words."""
        return describe_exit(await self._process.wait())

    async def end(self, patience: float) -> None:
        """Give the process `patience` seconds to end by itself, then kill it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), patience)
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def describe_exit(code: int) -> str:
    """A return code in words, with the usual cause where there is one."""
    if code >= 0:
        return f"the engine process ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = "; the usual cause is the container's memory limit" if name == "SIGKILL" else ""
    return f"the engine process was killed by {name}{cause}"
