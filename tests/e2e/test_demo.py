"""The demo's verdict: it is good only when all of it happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))

from demo import LIMITS, Steps, verdict
from load import Tally
from scaling import Story

GOOD = {name: limit / 2 for name, limit in LIMITS.items()}


def story(*counts: int) -> Story:
    return Story(ready_counts=list(counts))


def test_a_whole_run_is_good() -> None:
    assert verdict(GOOD, story(1, 2, 3, 2, 1), Tally(sent=5, right=5, retried=2)) == []


@pytest.mark.parametrize(
    ("changes", "counts", "tally", "word"),
    [
        ({}, (1, 2, 1), Tally(sent=5, right=5), "replicas went"),
        ({}, (1, 3), Tally(sent=5, right=5), "replicas went"),
        ({}, (1, 3, 1), Tally(sent=5, right=4, failed=1), "requests"),
        ({}, (1, 3, 1), Tally(sent=5, right=4, wrong=1), "requests"),
        ({}, (1, 3, 1), Tally(), "requests"),
        *(({name: limit + 0.1}, (1, 3, 1), Tally(1, 1), name) for name, limit in LIMITS.items()),
        *(({name: None}, (1, 3, 1), Tally(1, 1), name) for name in LIMITS),
    ],
)
def test_whatever_did_not_happen_is_named(
    changes: dict[str, Any], counts: tuple[int, ...], tally: Tally, word: str
) -> None:
    (reason,) = verdict({**GOOD, **changes}, story(*counts), tally)
    assert word in reason


def test_a_step_that_raises_is_recorded_as_failed(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps()
    with steps.step("works"):
        pass
    with pytest.raises(OSError, match="gone"), steps.step("breaks"):
        raise OSError("gone")
    assert [(row["step"], row["ok"]) for row in steps.rows] == [("works", True), ("breaks", False)]
    assert all(row["seconds"] >= 0 for row in steps.rows)
    assert "FAILED after" in capsys.readouterr().out
