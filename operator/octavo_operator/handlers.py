"""The only kopf file: what is watched, and how kopf is set up for a long life.

Handlers see events and nothing else. There are no create, update, delete, timer or daemon handlers:
each of those makes kopf write annotations or a finalizer onto the user's object.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import kopf

from octavo_operator.app import App
from octavo_operator.config import Config
from octavo_operator.resources import MANAGED_BY_LABEL, MANAGER
from octavo_operator.spec import GROUP, PLURAL, VERSION

WATCHED_CHILDREN = (
    ("Deployment", ("apps", "v1", "deployments")),
    ("Service", ("", "v1", "services")),
    ("Pod", ("", "v1", "pods")),
)


class EndlessBackoff:
    """1, 2, 4, 8, 15, 15 … seconds, jittered: no outage of the API server ends the process."""

    def __iter__(self) -> Iterator[float]:
        """A new series of delays for each request."""
        for seconds in itertools.chain((1, 2, 4, 8), itertools.repeat(15)):
            yield seconds * random.uniform(0.8, 1.2)  # noqa: S311  jitter, not a secret


def build_registry(app: App, config: Config) -> kopf.OperatorRegistry:
    """Everything that kopf calls."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry, id="start", errors=kopf.ErrorsMode.PERMANENT)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings, config)
        await app.start()

    @kopf.on.cleanup(registry=registry, id="stop")
    async def stop(**_: Any) -> None:
        await app.close()

    @kopf.on.login(registry=registry, id="login")
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry, id="saw-llmservice")
    async def service(event: kopf.RawEvent, **_: Any) -> None:
        app.saw_service(event["type"] == "DELETED", event["object"])

    for kind, resource in WATCHED_CHILDREN:
        kopf.on.event(*resource, registry=registry, id=f"saw-{kind.lower()}")(_child(app, kind))
    return registry


def configure(settings: kopf.OperatorSettings, config: Config) -> None:
    """Settings for production; kopf's defaults give up, wait or write where we must not."""
    settings.networking.error_backoffs = EndlessBackoff()
    settings.networking.enforce_retry_after = True
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 60
    # A regular reconnection, besides kopf's own check of silent streams after 70 s.
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 360
    settings.watching.chunk_size = 500
    for _, resource in WATCHED_CHILDREN:
        settings.watching.label_selectors[resource] = f"{MANAGED_BY_LABEL}={MANAGER}"
    settings.queueing.worker_limit = None
    settings.queueing.error_delays = (1, 2, 5, 10, 30, 60)
    settings.execution.max_workers = 8
    settings.posting.level = logging.WARNING
    settings.posting.loggers = False
    settings.posting.worker_limit = 4
    settings.posting.reporting_component = "octavo-operator"
    settings.posting.reporting_instance = config.instance
    # Unused as long as there are only event handlers; should one ever write, then under our name.
    settings.persistence.finalizer = f"{GROUP}/operator"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    # Watching CRDs and namespaces needs rights in the whole cluster.
    settings.scanning.disabled = bool(config.namespaces)
    settings.peering.standalone = True
    settings.process.ultimate_exiting_timeout = 30


def _child(app: App, kind: str) -> Callable[..., Awaitable[None]]:
    async def child(event: kopf.RawEvent, **_: Any) -> None:
        app.saw_child(kind, event["type"] == "DELETED", event["object"])

    return child
