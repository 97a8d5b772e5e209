"""Stop strings on a growing text: hold back what may become one, cut what did."""

from __future__ import annotations


class StopMatcher:
    """Finds the stop string that is completed first; ties go to the longer one.

    Because "completed first" looks only at where matches end, the result does not depend on how
    the text was cut into pieces. With `include` the stop string itself is let through.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what is certain to be before any stop string. Sets `matched`."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        hits = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if hits:
            end, at, self.matched = min(hits)
            self._held = ""
            return text[: end if self._include else at]
        keep = max(_overlap(text, s) for s in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The output is over: return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
