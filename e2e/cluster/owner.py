"""One cluster a machine, so one owner: the checkout that brought it up.

A second checkout is told whose it is. A checkout that no longer exists (a build machine makes a
new clone each time), or of whose cluster no process runs any more, leaves it to the next.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.steps import say


def former_owner(file: Path, me: Path) -> Path | None:
    """The other checkout that owns the cluster and still exists; None when it is mine to take."""
    try:
        owner = Path(file.read_text().strip())
    except OSError:
        return None
    return owner if owner != me and owner.is_dir() else None


def require(file: Path, me: Path) -> None:
    """ClusterError when another checkout owns the cluster: whose it is and how to go on."""
    owner = former_owner(file, me)
    if owner:
        raise ClusterError(
            f"this machine's cluster belongs to the checkout {owner}. Go on there, or end it with "
            f"`python3 {owner}/e2e/cluster/cli.py down`, or take it as it is with `up --take-over`"
        )


def claim(file: Path, me: Path, *, take_over: bool) -> None:
    """Become the owner, where nobody is or one that gives way."""
    if not take_over:
        require(file, me)
    owner = former_owner(file, me)
    if owner:
        say(f"  taking over the cluster of {owner}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{me}\n")


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Checkouts take turns at what a machine has one of."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("  waiting: another run of this tool is at work on this machine")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
