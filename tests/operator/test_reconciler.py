"""Carrying out a plan on a fake cluster: order of writes, refusals, lost events, live reads."""

import asyncio
import copy
from collections.abc import Callable, Mapping
from typing import Any

import llmservices
import pytest
import virtual_time

from octavo_operator.cache import Cache, key_of
from octavo_operator.cluster import ClusterError, RefusedError
from octavo_operator.metrics import Metrics
from octavo_operator.plan import Event
from octavo_operator.reconciler import Reconciler
from octavo_operator.spec import LLMService
from octavo_operator.status import Scaling

Json = dict[str, Any]
UID = "uid-tiny"
KEY = ("ns", "tiny")


class FakeCluster:
    """Objects by kind and key, and a journal of what was asked."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, tuple[str, str]], Json] = {}
        self.journal: list[str] = []
        self.version = 100
        self.error: Callable[[str], Exception | None] = lambda _: None

    def _store(self, kind: str, found: Json) -> Json:
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        self.objects[kind, key_of(found)] = found
        return copy.deepcopy(found)

    def _ask(self, what: str) -> None:
        self.journal.append(what)
        if error := self.error(what):
            raise error

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        self._ask(f"get {kind}")
        return copy.deepcopy(self.objects.get((kind, (namespace, name))))

    async def pods(self, namespace: str, service: str) -> list[Json]:
        self._ask("list Pod")
        return [copy.deepcopy(o) for (kind, _), o in self.objects.items() if kind == "Pod"]

    async def apply(self, manifest: Json) -> Json:
        self._ask(f"apply {manifest['kind']}")
        made = llmservices.live(manifest)
        return self._store(manifest["kind"], made)

    async def apply_status(self, service: LLMService, status: Mapping[str, Any]) -> Json:
        self._ask("apply status")
        found = copy.deepcopy(self.objects["LLMService", (service.namespace, service.name)])
        return self._store("LLMService", {**found, "status": dict(status)})

    async def emit(self, service: LLMService, event: Event) -> None:
        self._ask(f"event {event.reason}")

    def writes(self) -> list[str]:
        return [entry for entry in self.journal if not entry.startswith(("get", "list"))]


class FixedScaling:
    """A scaler that wants what the test says."""

    def __init__(self) -> None:
        self.value = Scaling()
        self.stopped: list[str] = []

    async def scaling(self, uid: str) -> Scaling:
        return self.value

    def stop(self, uid: str) -> None:
        self.stopped.append(uid)


class Bench:
    """A reconciler with one service that it has seen."""

    def __init__(self, spec: Json | None = None, **meta: Any) -> None:
        self.cache, self.cluster, self.scaler = Cache(), FakeCluster(), FixedScaling()
        self.metrics = Metrics()
        body = llmservices.body(spec, **meta)
        self.cluster.objects["LLMService", KEY] = body
        self.cache.put("LLMService", body)
        self.reconciler = Reconciler(
            self.cache,
            self.cluster,
            self.scaler,
            self.metrics,
            "img",  # type: ignore[arg-type]
        )

    def results(self) -> dict[str, float]:
        name = "octavo_operator_reconciles_total"
        value = self.metrics.registry.get_sample_value
        return {r: value(name, {"result": r}) or 0 for r in ("changed", "unchanged", "failed")}


def test_children_are_made_and_then_nothing_is() -> None:
    bench = Bench()

    async def main() -> None:
        await bench.reconciler.reconcile(UID)
        assert bench.cluster.writes() == ["apply status", "apply Service", "apply Deployment"]
        bench.cluster.journal.clear()
        await bench.reconciler.reconcile(UID)
        assert bench.cluster.journal in ([], ["apply status"])
        bench.cluster.journal.clear()
        for _ in range(10):
            await bench.reconciler.reconcile(UID)
        assert bench.cluster.journal == [], "no write, and no read either"

    virtual_time.run(main())
    assert bench.results()["failed"] == 0
    assert bench.results()["unchanged"] >= 10


def test_a_decision_is_written_down_before_it_is_acted_on() -> None:
    bench = Bench({"autoscaling": {"max": 3}})

    async def main() -> None:
        await bench.reconciler.reconcile(UID)
        await bench.reconciler.reconcile(UID)
        bench.cluster.journal.clear()
        decision = {"time": "t", "from": 1, "to": 3, "reason": "load"}
        bench.scaler.value = Scaling(desired=3, last_decision=decision)
        bench.cluster.error = lambda what: (
            ClusterError(503, "gone") if what == "apply Deployment" else None
        )
        with pytest.raises(ClusterError):
            await bench.reconciler.reconcile(UID)
        assert bench.cluster.writes() == ["apply status", "event ScaledUp", "apply Deployment"]
        status = bench.cluster.objects["LLMService", KEY]["status"]
        assert status["autoscaling"]["desired"] == 3
        bench.cluster.error = lambda _: None
        bench.cluster.journal.clear()
        await bench.reconciler.reconcile(UID)
        assert "apply Deployment" in bench.cluster.writes()
        assert not any(entry.startswith("event") for entry in bench.cluster.writes())

    virtual_time.run(main())
    assert bench.cluster.objects["Deployment", KEY]["spec"]["replicas"] == 3


def test_a_lost_event_does_not_stop_the_work() -> None:
    bench = Bench({"autoscaling": {"max": 3}})
    decision = {"time": "t", "from": 1, "to": 2, "reason": "load"}
    bench.scaler.value = Scaling(desired=2, last_decision=decision)
    bench.cluster.error = lambda what: (
        ClusterError(429, "too many") if what.startswith("event") else None
    )
    virtual_time.run(bench.reconciler.reconcile(UID))
    assert bench.cluster.objects["Deployment", KEY]["spec"]["replicas"] == 2


def test_a_refusal_is_shown_and_goes_when_it_is_over() -> None:
    bench = Bench()

    def refuse(what: str) -> Exception | None:
        return RefusedError(422, "spec.x is wrong") if what == "apply Deployment" else None

    def stalled() -> tuple[str, str]:
        status = bench.cluster.objects["LLMService", KEY]["status"]
        found = next(c for c in status["conditions"] if c["type"] == "Stalled")
        return found["status"], found["reason"]

    async def main() -> None:
        bench.cluster.error = refuse
        for _ in range(3):
            with pytest.raises(RefusedError):
                await bench.reconciler.reconcile(UID)
        assert stalled() == ("True", "ApplyRefused")
        assert bench.cluster.writes().count("apply status") == 2
        bench.cluster.error = lambda _: None
        await bench.reconciler.reconcile(UID)
        await bench.reconciler.reconcile(UID)
        assert stalled()[0] == "False"

    virtual_time.run(main())
    assert bench.results()["failed"] == 3


def test_a_service_that_is_being_deleted_is_left_alone() -> None:
    bench = Bench(deletionTimestamp="2026-01-01T00:00:00Z")
    virtual_time.run(bench.reconciler.reconcile(UID))
    assert bench.cluster.writes() == []


def test_an_unknown_service_is_forgotten() -> None:
    bench = Bench()
    virtual_time.run(bench.reconciler.reconcile("who"))
    assert bench.scaler.stopped == ["who"]


def test_what_a_watch_missed_is_found_by_the_resync() -> None:
    """A Deployment and a pod that went while the watch was blind."""
    bench = Bench()

    async def main() -> None:
        await bench.reconciler.reconcile(UID)
        bench.cache.put("Pod", llmservices.pod("ghost"))
        del bench.cluster.objects["Deployment", KEY]
        bench.cluster.journal.clear()
        await bench.reconciler.reconcile(UID)
        assert "apply Deployment" not in bench.cluster.writes(), "the memory says it is there"
        await asyncio.sleep(301)
        await bench.reconciler.reconcile(UID)
        assert "apply Deployment" in bench.cluster.writes()
        assert bench.cache.pods(KEY) == []

    virtual_time.run(main())


def test_a_service_that_went_unseen_is_found_by_the_resync() -> None:
    bench = Bench()

    async def main() -> None:
        await bench.reconciler.reconcile(UID)
        del bench.cluster.objects["LLMService", KEY]
        bench.cluster.journal.clear()
        await asyncio.sleep(301)
        await bench.reconciler.reconcile(UID)
        assert bench.cluster.writes() == []
        assert bench.scaler.stopped == [UID]

    virtual_time.run(main())


def test_a_name_is_looked_up_before_it_is_taken() -> None:
    bench = Bench()
    bench.cluster.objects["Deployment", KEY] = {
        "kind": "Deployment",
        "metadata": {"name": "tiny", "namespace": "ns", "uid": "x", "resourceVersion": "1"},
        "spec": {"replicas": 7},
    }

    async def main() -> None:
        wait = await bench.reconciler.reconcile(UID)
        assert wait is not None
        assert bench.cluster.writes() == ["apply status", "event NameTaken"]

    virtual_time.run(main())
