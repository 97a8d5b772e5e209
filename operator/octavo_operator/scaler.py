"""The loops that read the replicas of each service and let octavo_operator.autoscale decide.

One task a service. A loop writes nothing: it keeps a `Scaling`, and asks for a reconcile when that
changed. The count survives a restart of the operator in status.autoscaling.desired.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from octavo_operator.autoscale import Decision, History, Load, Sample, decide, kv_percent
from octavo_operator.cache import Cache, key_of
from octavo_operator.metrics import Metrics
from octavo_operator.observed import PodView, Raw, view_pod
from octavo_operator.scraper import ScrapeError
from octavo_operator.spec import Autoscaling, LLMService, SpecError, parse
from octavo_operator.status import Scaling, publish_kv, record

logger = logging.getLogger(__name__)

# How often replicas are read when no policy says it.
INTERVAL_SECONDS = 2.0

ReadLoad = Callable[[str], Awaitable[Load]]


@dataclass
class _Loop:
    """What is remembered about one service between two readings."""

    scaling: Scaling
    history: History | None = None
    samples: dict[str, Sample] = field(default_factory=dict)
    published_at: float = float("-inf")
    task: asyncio.Task[None] | None = None
    read_once: asyncio.Event = field(default_factory=asyncio.Event)


class Scaler:
    """Keeps a `Scaling` for every service that it was told of."""

    def __init__(
        self, cache: Cache, read: ReadLoad, changed: Callable[[str], None], metrics: Metrics
    ) -> None:
        self._cache = cache
        self._read = read
        self._changed = changed
        self._metrics = metrics
        self._loops: dict[str, _Loop] = {}

    async def scaling(self, uid: str) -> Scaling:
        """What is known of a service now; its loop is started when it has none.

        Waits for the loop's first reading: a new operator process must not write what it merely
        does not know yet.
        """
        loop = self._loops.get(uid)
        if loop is None:
            raw = self._cache.service(uid)
            if raw is None:
                return Scaling()
            loop = self._loops[uid] = _Loop(scaling=_remembered(raw))
            loop.task = asyncio.get_running_loop().create_task(self._run(uid, loop))
        await loop.read_once.wait()
        return loop.scaling

    def stop(self, uid: str) -> None:
        """Stop reading a service."""
        loop = self._loops.pop(uid, None)
        if loop and loop.task:
            loop.task.cancel()
            loop.read_once.set()

    async def close(self) -> None:
        """Stop all loops and wait until they have ended."""
        tasks = [loop.task for loop in self._loops.values() if loop.task]
        for uid in list(self._loops):
            self.stop(uid)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, uid: str, loop: _Loop) -> None:
        while (raw := self._cache.service(uid)) is not None:
            interval = INTERVAL_SECONDS
            try:
                service = parse(raw)
                if service.spec.autoscaling:
                    interval = service.spec.autoscaling.interval_seconds
                await self._tick(service, raw, loop)
            except SpecError as error:
                logger.warning("%s/%s is not read: %s", *key_of(raw), error)
            except Exception:
                # A loop that ends silently would freeze the count for good.
                logger.exception("reading the replicas of %s/%s failed", *key_of(raw))
            loop.read_once.set()
            await asyncio.sleep(interval)

    async def _tick(self, service: LLMService, raw: Raw, loop: _Loop) -> None:
        pods = [view_pod(pod) for pod in self._cache.pods(key_of(raw))]
        pods = [pod for pod in pods if not pod.deleting]
        await asyncio.gather(*(self._sample(pod, loop) for pod in pods))
        loop.samples = {pod.name: loop.samples[pod.name] for pod in pods}
        now = asyncio.get_running_loop().time()
        scaling = self._observe(loop, now)
        if policy := service.spec.autoscaling:
            scaling = self._scale(service, policy, loop, scaling, now)
        else:
            loop.history = None
            scaling = replace(scaling, desired=None, last_decision=None, at_maximum=False)
        if scaling != loop.scaling:
            loop.scaling = scaling
            # Before the first reading is over somebody waits for it and will see this.
            if loop.read_once.is_set():
                self._changed(service.uid)

    async def _sample(self, pod: PodView, loop: _Loop) -> None:
        """Ask one replica; when it does not answer, its last sample stays and grows old."""
        before = loop.samples.get(pod.name, Sample(pod.name, pod.started))
        sample = replace(before, expected=pod.started)
        if pod.ip:
            try:
                load = await self._read(pod.ip)
                sample = replace(sample, load=load, at=asyncio.get_running_loop().time())
            except ScrapeError as error:
                if pod.started:
                    self._metrics.scrape_failures.inc()
                    logger.info("pod %s gives no load: %s", pod.name, error)
        loop.samples[pod.name] = sample

    def _observe(self, loop: _Loop, now: float) -> Scaling:
        """Everything but the count: utilization, failures, whether all answer."""
        samples = list(loop.samples.values())
        published = loop.scaling.kv_percent
        percent = publish_kv(published, kv_percent(samples, now), now - loop.published_at)
        if not samples:
            percent = None
        if percent != published:
            loop.published_at = now
        expected = [sample for sample in samples if sample.expected]
        answers = [sample for sample in expected if sample.fresh(now)]
        return replace(
            loop.scaling,
            kv_percent=percent,
            metrics_available=len(answers) == len(expected) if expected else None,
            failures={
                sample.pod: sample.load.failure
                for sample in samples
                if sample.load and sample.load.failure
            },
        )

    def _scale(
        self,
        service: LLMService,
        policy: Autoscaling,
        loop: _Loop,
        scaling: Scaling,
        now: float,
    ) -> Scaling:
        if loop.history is None:
            loop.history = History.starting(self._present_count(service, policy, loop), now)
        before = loop.history.current
        decision = decide(policy, list(loop.samples.values()), loop.history, now)
        loop.history = loop.history.after(decision, policy, now)
        scaling = replace(scaling, desired=decision.desired, at_maximum=decision.at_maximum)
        if decision.desired == before:
            return scaling
        self._report(service, before, decision)
        return replace(scaling, last_decision=record(decision, before, datetime.now(UTC)))

    def _present_count(self, service: LLMService, policy: Autoscaling, loop: _Loop) -> int:
        """Where to go on: the count before a restart, or before autoscaling was switched on."""
        if loop.scaling.desired is not None:
            return loop.scaling.desired
        deployment = self._cache.get("Deployment", (service.namespace, service.name))
        count: int = deployment["spec"].get("replicas", 0) if deployment else 0
        return min(max(count, policy.min), policy.max)

    def _report(self, service: LLMService, before: int, decision: Decision) -> None:
        direction = "up" if decision.desired > before else "down"
        self._metrics.scale_decisions.labels(direction).inc()
        logger.info(
            "%s/%s: %d -> %d replicas: %s",
            service.namespace,
            service.name,
            before,
            decision.desired,
            decision.why,
        )


def _remembered(raw: Raw) -> Scaling:
    """What an earlier operator process wrote into the status."""
    status = raw.get("status") or {}
    autoscaling = status.get("autoscaling") or {}
    return Scaling(
        desired=autoscaling.get("desired"),
        last_decision=autoscaling.get("lastDecision"),
        kv_percent=status.get("kvUtilizationPercent"),
    )
