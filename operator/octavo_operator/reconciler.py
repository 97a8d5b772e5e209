"""Observe, plan, write: carries out octavo_operator.plan for one service at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from octavo_operator.cache import Cache, key_of
from octavo_operator.cluster import Cluster, ClusterError, RefusedError
from octavo_operator.metrics import Metrics
from octavo_operator.observed import Observed, Raw, view_pod
from octavo_operator.plan import Plan, make_plan
from octavo_operator.queue import RESYNC_SECONDS
from octavo_operator.spec import KIND, LLMService, parse
from octavo_operator.status import Scaling

logger = logging.getLogger(__name__)

CHILD_KINDS = ("Deployment", "Service")


class ScalingSource(Protocol):
    """Who knows what the autoscaler wants."""

    async def scaling(self, uid: str) -> Scaling:
        """What is wanted for this service now."""

    def stop(self, uid: str) -> None:
        """This service is gone."""


class Reconciler:
    """The queue's work: makes the cluster what the plan says."""

    def __init__(
        self,
        cache: Cache,
        cluster: Cluster,
        scaler: ScalingSource,
        metrics: Metrics,
        default_image: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cache = cache
        self._cluster = cluster
        self._scaler = scaler
        self._metrics = metrics
        self._default_image = default_image
        self._now = now
        self._read_at: dict[str, float] = {}
        self._refusals: dict[str, str] = {}

    async def reconcile(self, uid: str) -> float | None:
        """Bring one service in order; return after how many seconds it wants to come again."""
        try:
            with self._metrics.reconcile_seconds.time():
                plan = await self._reconcile(uid)
        except Exception:
            self._metrics.reconciles.labels("failed").inc()
            raise
        changed = plan is not None and (plan.status is not None or plan.applies)
        self._metrics.reconciles.labels("changed" if changed else "unchanged").inc()
        return plan.retry_after if plan else None

    def forget(self, uid: str) -> None:
        """A service is gone: its children go by their owner references."""
        self._scaler.stop(uid)
        self._read_at.pop(uid, None)
        self._refusals.pop(uid, None)

    async def _reconcile(self, uid: str) -> Plan | None:
        await self._read_if_due(uid)
        raw = self._cache.service(uid)
        if raw is None:
            self.forget(uid)
            return None
        if raw["metadata"].get("deletionTimestamp"):
            return None
        observed = await self._observe(raw)
        plan = make_plan(
            observed,
            await self._scaler.scaling(uid),
            self._default_image,
            self._now(),
            self._refusals.get(uid),
        )
        await self._carry_out(observed.service, plan)
        return plan

    async def _carry_out(self, service: LLMService, plan: Plan) -> None:
        """Write the status first: a restart in between must find the count it decided for."""
        if plan.status is not None:
            self._cache.put(KIND, await self._cluster.apply_status(service, plan.status))
        for event in plan.events:
            try:
                await self._cluster.emit(service, event)
            except ClusterError as error:
                logger.warning("the event %s is lost: %s", event.reason, error)
        for apply in plan.applies:
            kind = apply.manifest["kind"]
            logger.info("%s/%s: apply %s: %s", service.namespace, service.name, kind, apply.reason)
            try:
                live = await self._cluster.apply(apply.manifest)
            except RefusedError as error:
                # The next try shows the refusal in the status.
                self._refusals[service.uid] = error.message
                raise
            self._cache.put(kind, live)
        self._refusals.pop(service.uid, None)

    async def _observe(self, raw: Raw) -> Observed:
        service = parse(raw)
        key = key_of(raw)
        children = [self._cache.get(kind, key) for kind in CHILD_KINDS]
        for index, kind in enumerate(CHILD_KINDS):
            # Only labelled objects are watched; before one is made, see who has the name.
            children[index] = children[index] or await self._cluster.get(kind, *key)
        return Observed(
            service=service,
            status=raw.get("status") or {},
            deployment=children[0],
            endpoint=children[1],
            pods=tuple(view_pod(pod) for pod in self._cache.pods(key)),
        )

    async def _read_if_due(self, uid: str) -> None:
        """Now and then, and at first, read everything live: watches can miss a deletion."""
        now = asyncio.get_running_loop().time()
        raw = self._cache.service(uid)
        if raw is None or now - self._read_at.get(uid, float("-inf")) < RESYNC_SECONDS / 2:
            return
        namespace, name = key_of(raw)
        live = await self._cluster.get(KIND, namespace, name)
        if live is None or live["metadata"]["uid"] != uid:
            self._cache.remove(KIND, raw)
            return
        self._cache.put(KIND, live)
        for kind in CHILD_KINDS:
            child = await self._cluster.get(kind, namespace, name)
            if child is None:
                self._cache.forget(kind, (namespace, name))
            elif self._cache.get(kind, (namespace, name)):
                self._cache.put(kind, child)
        await self._read_pods(namespace, name)
        self._read_at[uid] = now

    async def _read_pods(self, namespace: str, name: str) -> None:
        live = {key_of(pod): pod for pod in await self._cluster.pods(namespace, name)}
        for pod in self._cache.pods((namespace, name)):
            if key_of(pod) not in live:
                self._cache.forget("Pod", key_of(pod))
        for pod in live.values():
            self._cache.put("Pod", pod)
