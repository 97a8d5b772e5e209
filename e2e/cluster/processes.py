"""Daemons that outlive the tool, found again by a mark in their environment.

No pid file: it goes stale, and the number in it is one day someone else's. Each daemon carries
the state folder it belongs to in its environment, where only its starter can have put it, and its
children (container shims, helpers) inherit the mark. A pidfd holds the process between the look
at its mark and the signal, so a foreign process is never hit.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from e2e.cluster.errors import ClusterError, DaemonEndedError

MARK, NAME = "OCTAVO_E2E_STATE", "OCTAVO_E2E_PROCESS"
PROC = Path("/proc")


@dataclass(frozen=True)
class Daemon:
    """One command that keeps running, and the log it writes."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Process:
    """A running process that carries our mark."""

    pid: int
    state: Path
    name: str
    argv: tuple[str, ...]


def parse_environment(raw: bytes) -> dict[str, str]:
    """The pairs of a /proc/PID/environ."""
    pairs = (part.split(b"=", 1) for part in raw.split(b"\0") if b"=" in part)
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in pairs}


def identify(pid: int, state: Path, proc: Path = PROC) -> Process | None:
    """The process when it belongs to `state`; None when it is foreign, a zombie or gone."""
    try:
        environment = parse_environment((proc / str(pid) / "environ").read_bytes())
        if environment.get(MARK) != str(state):
            return None
        raw = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    argv = tuple(part.decode(errors="replace") for part in raw.rstrip(b"\0").split(b"\0"))
    return Process(pid, state, environment.get(NAME, ""), argv)


def of_state(state: Path, proc: Path = PROC) -> list[Process]:
    """All running processes that belong to a state folder."""
    pids = sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdigit())
    return [found for pid in pids if (found := identify(pid, state, proc))]


def running(daemon: Daemon, state: Path) -> Process | None:
    """The daemon itself, when it runs with exactly this command."""
    return next((p for p in of_state(state) if p.argv == daemon.argv), None)


def daemons(state: Path) -> dict[str, Process]:
    """The daemons by name, without their children: each was started as head of a session."""
    return {p.name: p for p in of_state(state) if _session(p.pid) == p.pid}


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def ensure(daemon: Daemon, state: Path, logs: Path) -> bool:
    """Start the daemon unless it runs; one with another command line is replaced. True: started."""
    if running(daemon, state):
        return False
    former = daemons(state).get(daemon.name)
    stop([former] if former else [])
    environment = os.environ | daemon.env | {MARK: str(state), NAME: daemon.name}
    log = logs / f"{daemon.name}.log"
    if log.exists():
        log.replace(log.with_suffix(".log.old"))
    with log.open("wb") as out:
        child = subprocess.Popen(
            daemon.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env=environment, cwd=state, start_new_session=True,
        )  # fmt: skip
    # In the instant of its exec a process shows no environment: wait until it is seen, or ended.
    while not running(daemon, state) and child.poll() is None:
        time.sleep(0.005)
    child.returncode = 0  # let go of it: it outlives this program, and nobody waits for it
    return True


def all_run(daemons: Iterable[Daemon], state: Path, logs: Path) -> Callable[[], None]:
    """A check for `wait_until`: DaemonEndedError with the end of its log when one has ended."""
    wanted = tuple(daemons)

    def check() -> None:
        alive = {process.argv for process in of_state(state)}
        for daemon in wanted:
            if daemon.argv not in alive:
                log = logs / f"{daemon.name}.log"
                tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
                text = f"{daemon.name} ended while starting; the end of {log}:\n{tail}"
                raise DaemonEndedError(daemon.name, text)

    return check


def stop(processes: Iterable[Process], grace: float = 5.0) -> None:
    """Ask all to end, then end what is left; returns when none runs."""
    held = [(process, fd) for process in processes if (fd := _hold(process)) is not None]
    try:
        _send(held, signal.SIGTERM)
        left = _await_end(held, grace)
        _send(left, signal.SIGKILL)
        stuck = _await_end(left, 5.0)
    finally:
        for _, fd in held:
            os.close(fd)
    if stuck:
        names = ", ".join(f"{p.name or p.argv[0]} ({p.pid})" for p, _ in stuck)
        raise ClusterError(f"still running after SIGKILL: {names}; look at /proc/PID/stack")


def _hold(process: Process) -> int | None:
    """A pidfd of exactly this process, or None when it is gone or its number was reused."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if identify(process.pid, process.state) == process:
        return fd
    os.close(fd)
    return None


def _send(held: list[tuple[Process, int]], signum: int) -> None:
    for _, fd in held:
        try:
            signal.pidfd_send_signal(fd, signum)
        except ProcessLookupError:
            continue


def _await_end(held: list[tuple[Process, int]], seconds: float) -> list[tuple[Process, int]]:
    """Those that still run when the time is over. A pidfd is readable once its process ended."""
    deadline, left = time.monotonic() + seconds, list(held)
    while left and (remaining := deadline - time.monotonic()) > 0:
        poll = select.poll()
        for _, fd in left:
            poll.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(remaining * 1000)}
        left = [(process, fd) for process, fd in left if fd not in ended]
    return left
