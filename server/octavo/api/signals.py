"""The signals that end the server, and when it hears them. Nothing heavy may be imported here."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

END_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})


def hear_signals() -> None:
    """Have the signals that came meanwhile, and those to come, handled from now on."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Hold signals back until there are handlers: by default they would end this process alone,
    or, where it is a container's first, be lost.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        hear_signals()
