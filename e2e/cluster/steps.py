"""Named steps with their seconds: a line for the reader, and a JSON line for the Makefile's timers.

Progress goes to standard error, so that standard output holds results only (a path, a reference).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.cluster.errors import ClusterError


def say(text: str) -> None:
    """One line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print a step's name and seconds; also append them to the file that OCTAVO_STEPS names."""
    began, outcome = time.monotonic(), "failed"
    try:
        yield
        outcome = "done"
    finally:
        seconds = time.monotonic() - began
        say(f"  {name:<40} {seconds:7.1f} s{'' if outcome == 'done' else '  ' + outcome}")
        _record({"step": name, "seconds": round(seconds, 2), "outcome": outcome})


def _record(row: dict[str, object]) -> None:
    path = os.environ.get("OCTAVO_STEPS")
    if not path:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a") as file:
        file.write(json.dumps(row) + "\n")


def wait_until(
    look: Callable[[], bool], what: str, *, timeout: float, check: Callable[[], None]
) -> None:
    """Ask until true. `check` raises when there is nothing left to wait for."""
    deadline = time.monotonic() + timeout
    while not look():
        check()
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {timeout:.0f} s")
        time.sleep(0.1)
