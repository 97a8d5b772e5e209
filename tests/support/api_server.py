"""A server process under test: started on a free port, read by its log, always ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "e2e" / "tinymodel" / "model"
FAKE = Path(__file__).with_name("serve_with_fake_engine.py")


def eventually(
    check: Callable[[], Any], seconds: float = 10, what: str = "condition", step: float = 0.02
) -> Any:
    """Wait until `check()` is true and return what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := check():
            return value
        time.sleep(step)
    raise AssertionError(f"not within {seconds} s: {what}")


class ApiServer:
    """One `octavo serve` process."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.journal_file = folder / "journal.jsonl"
        self.termination_log = folder / "termination"
        port = eventually(self._port, 20, f"listening: {self.log()}")
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def _port(self) -> str | None:
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}: {self.log()}")
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log())
        return found[1] if found else None

    def journal(self) -> list[dict[str, Any]]:
        """What the fake engine received."""
        if not self.journal_file.exists():
            return []
        return [json.loads(line) for line in self.journal_file.read_text().splitlines()]

    def status(self, path: str) -> int:
        return self.http.get(path).status_code

    def load(self) -> dict[str, Any]:
        return self.http.get("/octavo/load").json()

    def until_ready(self, seconds: float = 20) -> None:
        eventually(lambda: self.status("/readyz") == 200, seconds, f"ready: {self.log()}")

    def engine_pid(self) -> int:
        return int((self.folder / "engine.pid").read_text())

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, seconds: float = 15) -> int:
        return self.process.wait(seconds)


@contextmanager
def running(
    folder: Path,
    *serve_flags: str,
    engine: Sequence[str] | None = (),
    model: Path = MODEL,
    ready: bool = True,
) -> Iterator[ApiServer]:
    """A server with the fake engine and its flags, or with the real one for `engine=None`."""
    served = [str(model), "--host", "127.0.0.1", "--port", "0", "--served-model-name", "tiny"]
    if engine is None:
        command = [sys.executable, "-m", "octavo.cli", "serve", *served]
    else:
        files = ["--journal", f"{folder}/journal.jsonl", "--pid-file", f"{folder}/engine.pid"]
        command = [sys.executable, str(FAKE), *files, *engine, "--", *served]
    paths = [str(ROOT / part) for part in ("server", "operator", "kernels")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    # A killed server cannot remove its socket folder, so it gets one that is removed here.
    sockets = tempfile.mkdtemp(prefix="octavo-test-", dir="/tmp")
    environment = os.environ | {
        "TMPDIR": sockets,
        "PYTHONPATH": os.pathsep.join(paths),
        "OCTAVO_TERMINATION_LOG": f"{folder}/termination",
    }
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, *serve_flags], stderr=log, env=environment)
    server = None
    try:
        server = ApiServer(process, folder)
        if ready:
            server.until_ready()
        yield server
    finally:
        if server is not None:
            server.http.close()
        process.kill()
        process.wait()
        shutil.rmtree(sockets, ignore_errors=True)
