"""The operator put together: cache, queue, reconciler, scaler and its small HTTP endpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from aiohttp import web
from prometheus_client import generate_latest

from octavo_operator.cache import Cache, owner_of
from octavo_operator.cluster import Cluster
from octavo_operator.config import Config
from octavo_operator.metrics import Metrics
from octavo_operator.observed import Raw
from octavo_operator.queue import KeyedQueue
from octavo_operator.reconciler import Reconciler
from octavo_operator.scaler import Scaler
from octavo_operator.scraper import Scraper, pod_url
from octavo_operator.spec import KIND

logger = logging.getLogger(__name__)

# Several events of one change (a pod gets an address, a condition, ready) make one reconcile.
COALESCE_SECONDS = 0.05
STUCK_SECONDS = 300.0


class App:
    """One operator. `start` and `close` belong inside the event loop that runs it."""

    def __init__(
        self,
        config: Config,
        connect: Callable[[Metrics], Cluster],
        url_of: Callable[[str], str] = pod_url,
    ) -> None:
        self.metrics = Metrics()
        self.cache = Cache()
        self._config = config
        self._connect = connect
        self._url_of = url_of
        # What was started, to be ended in the opposite order, also when a later step fails.
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Connect, and serve /healthz and /metrics; keys can be added from now on."""
        cluster = self._connect(self.metrics)
        self._stack.callback(cluster.close)
        scraper = Scraper(self._url_of)
        self._stack.push_async_callback(scraper.close)
        self.scaler = Scaler(self.cache, scraper.load, self.wake, self.metrics)
        self._stack.push_async_callback(self.scaler.close)
        self.reconciler = Reconciler(
            self.cache, cluster, self.scaler, self.metrics, self._config.server_image
        )
        self.queue = KeyedQueue(self.reconciler.reconcile)
        self._stack.push_async_callback(self.queue.close)
        self.metrics.queue_depth.set_function(self.queue.depth)
        await self._serve()

    async def close(self) -> None:
        """Stop everything; requests under way to the API server are finished in their threads."""
        await self._stack.aclose()

    def wake(self, uid: str) -> None:
        """Have a service reconciled soon."""
        self.queue.add(uid, COALESCE_SECONDS)

    def saw_service(self, deleted: bool, raw: Raw) -> None:
        """An LLMService appeared, changed or went."""
        uid = raw["metadata"]["uid"]
        if deleted:
            self.cache.remove(KIND, raw)
            self.queue.drop(uid)
            self.reconciler.forget(uid)
            return
        self.cache.put(KIND, raw)
        self.wake(uid)

    def saw_child(self, kind: str, deleted: bool, raw: Raw) -> None:
        """A Deployment, Service or Pod with our label appeared, changed or went."""
        if deleted:
            self.cache.remove(kind, raw)
        else:
            self.cache.put(kind, raw)
        if uid := self.cache.service_uid(owner_of(raw)):
            self.wake(uid)

    def problem(self) -> str | None:
        """Why this process should be restarted; None while it is well."""
        age = self.queue.oldest_seconds()
        if age > STUCK_SECONDS:
            return f"a service has been waiting or at work for {age:.0f} s"
        return None

    async def _serve(self) -> None:
        server = web.Application()
        server.router.add_get("/healthz", self._healthz)
        server.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(server, access_log=None)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, port=self._config.http_port).start()

    async def _healthz(self, _: web.Request) -> web.Response:
        problem = self.problem()
        return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self.metrics.registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )
