"""The watch tells the right story from a recorded sequence of API answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "e2e"))

from scaling import Decision, NewPod, ScaleWatch, Story, demand_ratio

SPEC = {"autoscaling": {"targets": {"kvUtilization": 0.8}, "tolerance": 0.1}}


def load(active: int, waiting: int = 0, total: int = 100) -> dict[str, Any]:
    return {"blocks": {"total": total, "active": active}, "waiting_blocks": waiting}


@pytest.mark.parametrize(
    ("loads", "ratio"),
    [([], 0), ([load(80)], 1), ([load(40, 40), load(0)], 0.5), ([load(100, 60)], 2)],
)
def test_demand_ratio(loads: list[dict[str, Any]], ratio: float) -> None:
    assert demand_ratio(SPEC, loads) == pytest.approx(ratio)


def test_a_starting_pod_has_no_blocks_yet() -> None:
    starting = {"blocks": None, "waiting_blocks": 0}
    assert demand_ratio(SPEC, [starting, load(80)]) == pytest.approx(1)


class Recorded:
    """A cluster that says one thing after the other."""

    def __init__(self, frames: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
        self.frames, self.at = frames, 0

    def service(self, namespace: str, name: str) -> dict[str, Any]:
        return {"spec": SPEC, "status": {"autoscaling": self.frames[self.at][0]}}

    def pods(self, namespace: str, name: str) -> list[dict[str, Any]]:
        return self.frames[self.at][1]

    def load(self, namespace: str, pod: str) -> dict[str, Any]:
        return load(300)


def pod(name: str, ready: bool, ending: bool = False) -> dict[str, Any]:
    metadata = {"name": name, "creationTimestamp": "2026-01-01T00:00:05Z"}
    if ending:
        metadata["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    status = "True" if ready else "False"
    return {"metadata": metadata, "status": {"conditions": [{"type": "Ready", "status": status}]}}


def decision(time: str, before: int, after: int) -> dict[str, Any]:
    return {"lastDecision": {"time": time, "from": before, "to": after, "reason": "demand"}}


def test_the_story_of_a_rise_and_a_fall() -> None:
    up, down = decision("2026-01-01T00:00:04Z", 1, 3), decision("2026-01-01T00:01:00Z", 3, 1)
    frames = [
        ({}, [pod("a", True)]),
        (up, [pod("a", True), pod("b", False), pod("c", False)]),
        (up, [pod("a", True), pod("b", True), pod("c", True)]),
        (down, [pod("a", True), pod("b", True, ending=True), pod("c", True)]),
        (down, [pod("a", True)]),
    ]
    recorded = Recorded(frames)
    watch = ScaleWatch(recorded, "ns", "tiny", say=lambda line: None)  # type: ignore[arg-type]
    watch._old_pods = {"a"}
    for recorded.at in range(len(frames)):
        watch._look()
    story = watch.story
    assert story.ready_counts == [1, 3, 2, 1]
    assert story.rose_and_fell(1, 3)
    assert [(d.before, d.after) for d in story.decisions] == [(1, 3), (3, 1)]
    assert set(story.pods) == {"b", "c"}
    assert story.pressure is not None


def test_figures_come_from_the_rise_that_asked_for_the_pod() -> None:
    story = Story()
    story.pressure = 100.0
    story.decisions = [Decision(101.0, 101.5, 1, 2, ""), Decision(110.0, 110.2, 2, 3, "")]
    story.pods = {"b": NewPod(101.0, 106.0), "c": NewPod(110.0, 113.0)}
    assert story.pressure_to_decision() == pytest.approx(1.5)
    assert story.decision_to_ready() == pytest.approx(5.0)


def test_what_did_not_happen_has_no_figure() -> None:
    story = Story()
    assert story.pressure_to_decision() is None
    assert story.decision_to_ready() is None
    assert not story.rose_and_fell(1, 3)
    story.ready_counts = [1, 2, 3]
    assert not story.rose_and_fell(1, 3)
