"""What one replica says about itself on GET /octavo/load; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A sample older than this says nothing about now. Several readings fit in, so that one lost
# answer changes nothing.
FRESH_SECONDS = 10.0

STATES = ("Starting", "Ready", "Draining", "Sleeping", "Failed")
_REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_]{0,126}[A-Za-z0-9_])?")


class LoadError(ValueError):
    """The replica's answer is not the load document of the contract."""


@dataclass(frozen=True)
class Failure:
    """Why a replica can never become ready, in the server's words."""

    reason: str
    message: str


@dataclass(frozen=True)
class Load:
    """The part of a replica's load document that the operator uses."""

    state: str
    total_blocks: int = 0
    active_blocks: int = 0
    waiting_blocks: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class Sample:
    """One replica: whether it has to answer, and its last answer, if any.

    `expected` is True once the container passed its startup probe and until it is told to end; the
    silence of such a replica is missing data, while the silence of a starting one is normal.
    """

    pod: str
    expected: bool
    at: float = 0.0
    load: Load | None = None

    def fresh(self, now: float) -> Load | None:
        """The load, unless it is absent or too old."""
        return self.load if self.load and now - self.at <= FRESH_SECONDS else None


def parse_load(document: Any) -> Load:
    """Read a load document; raise LoadError saying what is wrong. Unknown keys are ignored."""
    if not isinstance(document, Mapping):
        raise LoadError(f"the answer is not an object but a {type(document).__name__}")
    state = document.get("state")
    if state not in STATES:
        raise LoadError(f"state is {state!r}, not one of {', '.join(STATES)}")
    blocks = document.get("blocks") or {}
    if not isinstance(blocks, Mapping):
        raise LoadError("blocks is neither an object nor null")
    return Load(
        state=state,
        total_blocks=_count(blocks, "total"),
        active_blocks=_count(blocks, "active"),
        waiting_blocks=_count(document, "waiting_blocks"),
        failure=_failure(document.get("failure")) if state == "Failed" else None,
    )


def _count(document: Mapping[str, Any], key: str) -> int:
    value = document.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise LoadError(f"{key} is {value!r}, not a count")
    return int(value)


def _failure(document: Any) -> Failure | None:
    """A failure that a retry cannot heal; the others end the process and show as restarts."""
    if not isinstance(document, Mapping) or document.get("retryable"):
        return None
    reason = str(document.get("reason") or "")
    return Failure(
        reason=reason if _REASON.fullmatch(reason) else "ModelFailed",
        message=str(document.get("message") or "the server gave no message"),
    )
