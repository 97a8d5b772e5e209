"""The only file that talks to the API server: reads, server-side apply, events.

The official client is synchronous, so each request runs in a thread. Every write is counted.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kubernetes import client, config

from octavo_operator.metrics import Metrics
from octavo_operator.observed import Raw
from octavo_operator.plan import Event
from octavo_operator.resources import SERVICE_LABEL, Manifest
from octavo_operator.spec import API_VERSION, KIND, PLURAL, LLMService

FIELD_MANAGER = "octavo-operator"
REPORTING_CONTROLLER = "octavo.dev/operator"
NOTE_LIMIT = 1000
TIMEOUT_SECONDS = (10.0, 30.0)
PATHS = {
    KIND: f"/apis/{API_VERSION}/namespaces/{{namespace}}/{PLURAL}",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "Event": "/apis/events.k8s.io/v1/namespaces/{namespace}/events",
}


class ClusterError(Exception):
    """The API server did not do what was asked; trying again may help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the API server answered {status}: {message}")
        self.status = status
        self.message = message


class RefusedError(ClusterError):
    """The API server understood and refuses: trying the same again will not help."""


def connect() -> client.ApiClient:
    """A client by the pod's service account, or by the kubeconfig outside of a cluster."""
    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    return client.ApiClient()


class Cluster:
    """Reads and writes of the objects that the operator is concerned with."""

    def __init__(self, api: client.ApiClient, metrics: Metrics, instance: str) -> None:
        self._api = api
        self._metrics = metrics
        self._instance = instance

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """One object as it is now; None when there is none."""
        try:
            found: Raw = await self._call("GET", f"{_path(kind, namespace)}/{name}")
        except ClusterError as error:
            if error.status == 404:
                return None
            raise
        return found

    async def pods(self, namespace: str, service: str) -> list[Raw]:
        """The pods of a service as they are now."""
        query = {"labelSelector": f"{SERVICE_LABEL}={service}"}
        answer = await self._call("GET", _path("Pod", namespace), query)
        return list(answer["items"])

    async def apply(self, manifest: Manifest) -> Raw:
        """Server-side apply of a child; returns it as it is then."""
        meta = manifest["metadata"]
        path = f"{_path(manifest['kind'], meta['namespace'])}/{meta['name']}"
        return await self._apply(path, manifest)

    async def apply_status(self, service: LLMService, status: Mapping[str, Any]) -> Raw:
        """Server-side apply of the status of a service, all of which is the operator's own."""
        manifest = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            # The UID makes the API server refuse a newer object of the same name.
            "metadata": {
                "name": service.name,
                "namespace": service.namespace,
                "uid": service.uid,
            },
            "status": dict(status),
        }
        return await self._apply(
            f"{_path(KIND, service.namespace)}/{service.name}/status", manifest
        )

    async def emit(self, service: LLMService, event: Event) -> None:
        """Create an Event about a service."""
        manifest = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{service.name}.{uuid.uuid4().hex[:16]}",
                "namespace": service.namespace,
            },
            "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": REPORTING_CONTROLLER,
            "reportingInstance": self._instance,
            "type": event.kind,
            "reason": event.reason,
            "action": "Reconcile",
            "note": event.note[:NOTE_LIMIT],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": service.name,
                "namespace": service.namespace,
                "uid": service.uid,
            },
        }
        self._metrics.api_writes.labels("Event", "create").inc()
        await self._call("POST", _path("Event", service.namespace), body=manifest)

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    async def _apply(self, path: str, manifest: Mapping[str, Any]) -> Raw:
        kind = manifest["kind"] + ("Status" if path.endswith("/status") else "")
        self._metrics.api_writes.labels(kind, "apply").inc()
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        applied: Raw = await self._call(
            "PATCH", path, query, manifest, "application/apply-patch+yaml"
        )
        return applied

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        return await asyncio.to_thread(self._request, method, path, query, body, content_type)

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
    ) -> Any:
        request = self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*request, _request_timeout=TIMEOUT_SECONDS)
        data = response.read()
        if 200 <= response.status <= 299:
            return json.loads(data)
        raise _error(response.status, data)


def _path(kind: str, namespace: str) -> str:
    return PATHS[kind].format(namespace=namespace)


def _error(status: int, data: bytes) -> ClusterError:
    try:
        message = json.loads(data)["message"]
    except (ValueError, KeyError, TypeError):
        message = data.decode(errors="replace")[:500]
    # 400, 403 and 422 judge the content; the rest (404 of a namespace that ends, 409, 429, 5xx)
    # judges the moment.
    kind = RefusedError if status in (400, 403, 422) else ClusterError
    return kind(status, message)
