"""Watches one LLMService scale: what was demanded, what was decided, which pods became ready.

Every figure is an upper bound. A pod is ready and a decision is there when this watch first sees
it (it looks four times a second); the way from a decision to a pod is counted from the decision's
own time, which the operator may have cut to the second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from kube import Cluster, ClusterError, Json, alive, conditions

LOOK_EVERY_S = 0.25


def seconds(timestamp: str) -> float:
    """A Kubernetes time as seconds since the epoch."""
    return datetime.fromisoformat(timestamp).timestamp()


@dataclass(frozen=True)
class Decision:
    """One change of the replica count, as status tells it, and when it was first seen."""

    at: float
    seen: float
    before: int
    after: int
    reason: str


@dataclass
class NewPod:
    """A pod that came while we looked."""

    created: float
    ready: float | None = None


@dataclass
class Story:
    """What was seen, in order."""

    began: float = field(default_factory=time.time)
    pressure: float | None = None
    decisions: list[Decision] = field(default_factory=list)
    ready_counts: list[int] = field(default_factory=list)
    pods: dict[str, NewPod] = field(default_factory=dict)
    max_restarts: int = 0

    def first_rise(self) -> Decision | None:
        """The first decision that added replicas."""
        return next((d for d in self.decisions if d.after > d.before), None)

    def pressure_to_decision(self) -> float | None:
        """Seconds from the first look that found too much demand to the first rise."""
        rise = self.first_rise()
        return None if rise is None or self.pressure is None else rise.seen - self.pressure

    def decision_to_ready(self) -> float | None:
        """The longest way of a new pod from the rise that asked for it to its readiness."""
        took = []
        for pod in self.pods.values():
            rises = [d.at for d in self.decisions if d.after > d.before and d.at <= pod.created + 1]
            if pod.ready is not None and rises:
                took.append(pod.ready - rises[-1])
        return max(took, default=None)

    def rose_and_fell(self, low: int, high: int) -> bool:
        """Whether the ready replicas went from `low` to `high` and back, in that order."""
        counts = self.ready_counts
        return counts[:1] == [low] and counts[-1:] == [low] and max(counts, default=0) == high


def demand_ratio(spec: Json, loads: list[Json]) -> float:
    """Blocks that running and waiting work need ÷ blocks that may be in use at the target."""
    total = sum(load["blocks"]["total"] for load in loads if load["blocks"])
    if not total:
        return 0.0
    target = spec["autoscaling"]["targets"]["kvUtilization"]
    need = sum(
        load["blocks"]["active"] + load["waiting_blocks"] for load in loads if load["blocks"]
    )
    return float(need / (total * target))


class ScaleWatch:
    """Looks at a service in a thread, from `start()` to `stop()`; tells `say` what changed."""

    def __init__(
        self, cluster: Cluster, namespace: str, name: str, say: Callable[[str], None] = print
    ) -> None:
        self.cluster, self.namespace, self.name, self.say = cluster, namespace, name, say
        self.story = Story()
        self._old_pods: set[str] = set()
        self._old_decision: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scale-watch", daemon=True)
        self.error: Exception | None = None

    def start(self) -> ScaleWatch:
        """Take the present state as the beginning, then look on in the background."""
        found = self.cluster.service(self.namespace, self.name)
        self._old_decision = _last_decision(found).get("time")
        pods = self.cluster.pods(self.namespace, self.name)
        self._old_pods = {pod["metadata"]["name"] for pod in pods}
        self._look()
        self._thread.start()
        return self

    def stop(self) -> Story:
        """End the watch and return what was seen."""
        self._stopping.set()
        self._thread.join()
        if self.error:
            raise self.error
        return self.story

    def _run(self) -> None:
        try:
            while not self._stopping.wait(LOOK_EVERY_S):
                self._look()
        except (ClusterError, httpx.HTTPError, KeyError) as error:
            self.error = error

    def _look(self) -> None:
        # Pods first: the operator writes its decision before it acts, so the later read has it.
        pods = self.cluster.pods(self.namespace, self.name)
        found = self.cluster.service(self.namespace, self.name)
        if found is None:
            raise ClusterError(f"LLMService {self.namespace}/{self.name} is gone")
        now = time.time()
        self._note_decision(_last_decision(found), now)
        self._note_pods(pods, now)
        if self.story.pressure is None and "autoscaling" in found["spec"]:
            self._note_pressure(found["spec"], pods)

    def _note_pods(self, pods: list[Json], now: float) -> None:
        ready = 0
        for pod in pods:
            metadata = pod["metadata"]
            is_ready = conditions(pod).get("Ready", {}).get("status") == "True"
            ready += is_ready and "deletionTimestamp" not in metadata
            if metadata["name"] in self._old_pods:
                continue
            seen = self.story.pods.setdefault(
                metadata["name"], NewPod(seconds(metadata["creationTimestamp"]))
            )
            if is_ready and seen.ready is None:
                seen.ready = now
        if self.story.ready_counts[-1:] != [ready]:
            self.story.ready_counts.append(ready)
            self.say(f"ready replicas: {ready}")

    def _note_decision(self, told: dict[str, Any], now: float) -> None:
        if not told or told["time"] == self._old_decision:
            return
        self._old_decision = told["time"]
        decision = Decision(seconds(told["time"]), now, told["from"], told["to"], told["reason"])
        self.story.decisions.append(decision)
        self.say(f"decision {decision.before} → {decision.after}: {decision.reason}")

    def _note_pressure(self, spec: Json, pods: list[Json]) -> None:
        names = [pod["metadata"]["name"] for pod in alive(pods)]
        loads = [load for name in names if (load := self.cluster.load(self.namespace, name))]
        ratio = demand_ratio(spec, loads)
        # Inside the tolerance the autoscaler holds on purpose, so that is not yet pressure.
        if ratio > 1 + spec["autoscaling"]["tolerance"]:
            self.story.pressure = time.time()
            self.say(f"pressure: demand is {ratio:.2f} times what the replicas are sized for")


def _last_decision(found: Json | None) -> Json:
    status = (found or {}).get("status", {})
    decision: Json = status.get("autoscaling", {}).get("lastDecision", {})
    return decision
