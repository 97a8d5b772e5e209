"""The loops in virtual time: what is read, kept, decided, and when a reconcile is asked for."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import llmservices
import virtual_time

from octavo_operator.autoscale import Failure, Load
from octavo_operator.cache import Cache
from octavo_operator.metrics import Metrics
from octavo_operator.scaler import Scaler
from octavo_operator.scraper import ScrapeError
from octavo_operator.status import Scaling

Json = dict[str, Any]
AUTOSCALED = {"autoscaling": {"max": 3}}


class Bench:
    """A scaler over a cache, replicas that answer what the test says, and a list of wishes."""

    def __init__(self, spec: Json | None = None, status: Json | None = None) -> None:
        self.cache = Cache()
        self.cache.put("LLMService", {**llmservices.body(spec), "status": status or {}})
        self.loads: dict[str, Load] = {}
        self.read_at: list[float] = []
        self.changes: list[float] = []
        self.metrics = Metrics()
        self.scaler = Scaler(self.cache, self.read, self.changed, self.metrics)

    async def read(self, ip: str) -> Load:
        self.read_at.append(asyncio.get_running_loop().time())
        if ip not in self.loads:
            raise ScrapeError(f"{ip} is silent")
        return self.loads[ip]

    def changed(self, uid: str) -> None:
        assert uid == "uid-tiny"
        self.changes.append(asyncio.get_running_loop().time())

    def pod(self, name: str, ip: str, version: int = 1, **given: Any) -> None:
        self.cache.put("Pod", llmservices.pod(name, ip=ip, resourceVersion=str(version), **given))

    async def scaling(self) -> Scaling:
        return await self.scaler.scaling("uid-tiny")


def play(bench: Bench, script: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await script()
        await bench.scaler.close()

    virtual_time.run(main())


def busy(active: int, waiting: int = 0) -> Load:
    return Load("Ready", 100, active, waiting)


def test_pressure_becomes_a_wish_with_a_record() -> None:
    bench = Bench(AUTOSCALED)
    bench.pod("a", "1")
    bench.loads["1"] = busy(10)

    async def script() -> None:
        assert (await bench.scaling()).desired == 1
        bench.loads["1"] = busy(100, 100)
        await asyncio.sleep(2.1)
        found = await bench.scaling()
        assert found.desired == 3
        assert found.last_decision
        assert (found.last_decision["from"], found.last_decision["to"]) == (1, 3)
        assert bench.changes == [2.0]

    play(bench, script)


def test_nothing_is_asked_for_while_nothing_changes() -> None:
    bench = Bench(AUTOSCALED)
    bench.pod("a", "1")
    bench.loads["1"] = busy(50)

    async def script() -> None:
        await bench.scaling()
        await asyncio.sleep(601)
        assert len(bench.read_at) == 301
        assert bench.changes == []

    play(bench, script)


def test_the_interval_of_the_policy() -> None:
    bench = Bench({"autoscaling": {"max": 3, "intervalSeconds": 10}})
    bench.pod("a", "1")

    async def script() -> None:
        await bench.scaling()
        await asyncio.sleep(35)
        assert bench.read_at == [0, 10, 20, 30]

    play(bench, script)


def test_a_restart_goes_on_from_the_status_and_holds() -> None:
    """O-55: nobody answers the new process, and nothing shrinks."""
    decision = {"time": "t", "from": 1, "to": 3}
    bench = Bench(AUTOSCALED, {"autoscaling": {"desired": 3, "lastDecision": decision}})
    for name in "abc":
        bench.pod(name, name)

    async def script() -> None:
        await asyncio.sleep(0)
        await bench.scaling()
        await asyncio.sleep(900)
        found = await bench.scaling()
        assert (found.desired, found.last_decision) == (3, decision)

    play(bench, script)


def test_a_restart_with_idle_replicas_waits_for_the_window() -> None:
    bench = Bench(AUTOSCALED, {"autoscaling": {"desired": 3}})
    for name in "abc":
        bench.pod(name, name)
        bench.loads[name] = busy(0)

    async def script() -> None:
        await bench.scaling()
        await asyncio.sleep(299)
        assert (await bench.scaling()).desired == 3
        await asyncio.sleep(5)
        assert (await bench.scaling()).desired == 2

    play(bench, script)


def test_autoscaling_starts_from_what_is_there() -> None:
    bench = Bench(AUTOSCALED)
    bench.cache.put(
        "Deployment",
        {"metadata": {"namespace": "ns", "name": "tiny", "uid": "d"}, "spec": {"replicas": 2}},
    )

    async def script() -> None:
        assert (await bench.scaling()).desired == 2

    play(bench, script)


def test_the_first_reading_is_waited_for() -> None:
    """Or a new process would write that nobody answers, and a second later that they do."""
    bench = Bench()
    bench.pod("a", "1")
    bench.loads["1"] = busy(40)

    async def slow(ip: str) -> Load:
        await asyncio.sleep(1.5)
        return bench.loads[ip]

    bench.scaler = Scaler(bench.cache, slow, bench.changed, bench.metrics)

    async def script() -> None:
        found = await bench.scaling()
        assert asyncio.get_running_loop().time() == 1.5
        assert (found.kv_percent, found.metrics_available) == (40, True)
        assert bench.changes == []

    play(bench, script)


def test_stopping_frees_who_waits_for_the_first_reading() -> None:
    bench = Bench()
    bench.pod("a", "1")

    async def never(_: str) -> Load:
        await asyncio.sleep(1e9)
        return busy(0)

    bench.scaler = Scaler(bench.cache, never, bench.changed, bench.metrics)

    async def script() -> None:
        waiting = asyncio.create_task(bench.scaler.scaling("uid-tiny"))
        await asyncio.sleep(1)
        bench.scaler.stop("uid-tiny")
        await asyncio.wait_for(waiting, 1)

    play(bench, script)


def test_one_lost_answer_changes_nothing_and_a_long_silence_is_told() -> None:
    bench = Bench()
    bench.pod("a", "1")
    bench.loads["1"] = busy(40)

    async def script() -> None:
        await bench.scaling()
        load = bench.loads.pop("1")
        await asyncio.sleep(8)
        assert (await bench.scaling()).metrics_available is True
        await asyncio.sleep(6)
        found = await bench.scaling()
        assert found.metrics_available is False
        assert found.kv_percent == 40, "the last known value stays"
        assert len(bench.changes) == 1
        bench.loads["1"] = load
        await asyncio.sleep(2)
        assert (await bench.scaling()).metrics_available is True

    play(bench, script)


def test_a_starting_replica_may_be_silent() -> None:
    bench = Bench()
    bench.pod("a", "1", started=False, ready=False)
    bench.pod("b", None, started=False, ready=False)  # type: ignore[arg-type]

    async def script() -> None:
        assert (await bench.scaling()).metrics_available is None
        assert len(bench.read_at) == 1, "without an address nobody is asked"

    play(bench, script)
    failures = bench.metrics.registry.get_sample_value("octavo_operator_scrape_failures_total")
    assert failures == 0


def test_the_failure_of_a_model_is_passed_on() -> None:
    bench = Bench()
    bench.pod("a", "1", ready=False)
    failure = Failure("ModelInvalid", "config.json is missing")
    bench.loads["1"] = Load("Failed", failure=failure)

    async def script() -> None:
        assert (await bench.scaling()).failures == {"a": failure}

    play(bench, script)


def test_utilization_is_published_sparingly() -> None:
    bench = Bench()
    bench.pod("a", "1")
    bench.loads["1"] = busy(0)

    async def script() -> None:
        await bench.scaling()
        for percent in range(100):
            bench.loads["1"] = busy(percent)
            await asyncio.sleep(1)
        assert len(bench.changes) <= 10, "not more often than each 10 s"
        bench.loads["1"] = busy(0)
        await asyncio.sleep(2)
        assert (await bench.scaling()).kv_percent == 0, "the return to zero at once"

    play(bench, script)


def test_replicas_that_leave_are_forgotten() -> None:
    bench = Bench(AUTOSCALED)
    bench.pod("a", "1")
    bench.loads["1"] = busy(100, 100)

    async def script() -> None:
        await bench.scaling()
        await asyncio.sleep(3)
        assert (await bench.scaling()).desired == 3
        bench.pod("a", "1", version=2, deletionTimestamp="2026-01-01T00:00:00Z")
        await asyncio.sleep(2)
        found = await bench.scaling()
        assert (found.desired, found.kv_percent, found.metrics_available) == (3, None, None)

    play(bench, script)


def test_switching_autoscaling_off_forgets_its_count() -> None:
    bench = Bench(AUTOSCALED, {"autoscaling": {"desired": 3}})

    async def script() -> None:
        assert (await bench.scaling()).desired == 3
        bench.cache.put("LLMService", llmservices.body({"replicas": 1}, resourceVersion="2"))
        await asyncio.sleep(3)
        assert (await bench.scaling()).desired is None

    play(bench, script)


def test_a_gone_service_ends_its_loop() -> None:
    bench = Bench()
    bench.pod("a", "1")

    async def script() -> None:
        await bench.scaling()
        bench.cache.forget("LLMService", ("ns", "tiny"))
        bench.scaler.stop("uid-tiny")
        reads = len(bench.read_at)
        await asyncio.sleep(60)
        assert len(bench.read_at) == reads
        assert await bench.scaling() == Scaling()

    play(bench, script)


def test_an_unexpected_error_does_not_end_the_loop() -> None:
    bench = Bench(AUTOSCALED)
    bench.pod("a", "1")
    bench.loads["1"] = busy(0)
    outcomes = iter([True])

    async def flaky(ip: str) -> Load:
        if next(outcomes, False):
            raise RuntimeError("a bug")
        return bench.loads[ip]

    bench.scaler = Scaler(bench.cache, flaky, bench.changed, bench.metrics)

    async def script() -> None:
        await bench.scaling()
        await asyncio.sleep(3)
        assert (await bench.scaling()).kv_percent == 0

    play(bench, script)
