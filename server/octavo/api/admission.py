"""Who may come in: counts unfinished requests, bounds them, and estimates when to come back."""

from __future__ import annotations

import math

MIN_RETRY_S = 1
MAX_RETRY_S = 30
# Weight of the newest request in the running mean of durations.
SMOOTHING = 0.1


class Admission:
    """Unfinished requests, from the moment they are let in until their last byte is out."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.unfinished = 0
        self._mean_seconds = 0.0

    def enter(self, count: int) -> bool:
        """Let `count` sequences in together, or none of them."""
        if self.unfinished + count > self.limit:
            return False
        self.unfinished += count
        return True

    def leave(self, count: int, seconds: float | None) -> None:
        """Give places back; `seconds` is how long the request ran, None if it never did."""
        self.unfinished -= count
        if seconds is not None:
            self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)

    def retry_after(self, slots: int) -> int:
        """Seconds after which a place is likely, given how many sequences run at once.

        By Little's law the queue ahead drains at `slots` / mean duration.
        """
        wait = self._mean_seconds * self.unfinished / max(1, slots)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(wait)))
