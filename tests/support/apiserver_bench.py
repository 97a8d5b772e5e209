"""A real API server, fake replicas and an operator in a thread, for tests/apiserver."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kopf
from kubernetes import client, config

from octavo_operator.app import App
from octavo_operator.cluster import Cluster
from octavo_operator.config import Config
from octavo_operator.handlers import build_registry

ROOT = Path(__file__).resolve().parents[2]
LLMSERVICES = "/apis/octavo.dev/v1alpha1/namespaces/{ns}/llmservices"
DEPLOYMENTS = "/apis/apps/v1/namespaces/{ns}/deployments"
SERVICES = "/api/v1/namespaces/{ns}/services"
PODS = "/api/v1/namespaces/{ns}/pods"
EVENTS = "/apis/events.k8s.io/v1/namespaces/{ns}/events"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
Json = dict[str, Any]


def eventually(check: Callable[[], Any], seconds: float = 10.0, what: str = "") -> Any:
    """Wait until `check()` gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what or check}")


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


def _message(data: bytes) -> str:
    """What an error says: a Status, or plain text where no API is served at a path yet."""
    try:
        return str(json.loads(data)["message"])
    except ValueError:
        return data.decode().strip()


class Kube:
    """The API server as a user of one namespace sees it."""

    def __init__(self, kubeconfig: Path, namespace: str = "") -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace
        self._api = config.new_client_from_config(str(kubeconfig))

    def raw(
        self,
        method: str,
        path: str,
        body: Any = None,
        content: str = "application/json",
        **query: str,
    ) -> bytes:
        request = self._api.param_serialize(
            method,
            path.format(ns=self.namespace),
            query_params=list(query.items()),
            header_params={"Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*request, _request_timeout=20)
        data: bytes = response.read()
        if response.status > 299:
            raise ApiError(response.status, _message(data))
        return data

    def call(self, method: str, path: str, body: Any = None, **query: str) -> Json:
        found: Json = json.loads(self.raw(method, path, body, **query))
        return found

    def create(self, path: str, body: Json) -> Json:
        """As `kubectl apply` asks for it: unknown fields are errors."""
        return self.call("POST", path, body, fieldValidation="Strict")

    def get(self, path: str, name: str) -> Json | None:
        try:
            return self.call("GET", f"{path}/{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, path: str) -> list[Json]:
        return list(self.call("GET", path)["items"])

    def merge(self, path: str, body: Json) -> Json:
        data = self.raw("PATCH", path, body, "application/merge-patch+json")
        found: Json = json.loads(data)
        return found

    def delete(self, path: str, name: str, **query: str) -> None:
        self.call("DELETE", f"{path}/{name}", **query)

    def service(self, spec: Json, name: str = "tiny") -> Json:
        """Create an LLMService."""
        body = {
            "apiVersion": "octavo.dev/v1alpha1",
            "kind": "LLMService",
            "metadata": {"name": name},
            "spec": {"model": {"uri": "file:///opt/model"}, **spec},
        }
        return self.create(LLMSERVICES, body)

    def status(self, name: str = "tiny") -> Json:
        found = self.get(LLMSERVICES, name) or {}
        return dict(found.get("status") or {})

    def condition(self, kind: str, name: str = "tiny") -> Json:
        conditions = self.status(name).get("conditions") or ()
        return next((dict(c) for c in conditions if c["type"] == kind), {})

    def replicas(self, name: str = "tiny") -> int | None:
        found = self.get(DEPLOYMENTS, name)
        return found["spec"]["replicas"] if found else None

    def roll(self, ready: int, *, total: int | None = None, name: str = "tiny") -> None:
        """What the deployment controller would report."""
        found = self.get(DEPLOYMENTS, name)
        assert found
        count = found["spec"]["replicas"] if total is None else total
        status = {
            "observedGeneration": found["metadata"]["generation"],
            "replicas": count,
            "updatedReplicas": count,
            "readyReplicas": ready,
        }
        self.merge(f"{DEPLOYMENTS}/{name}/status", {"status": status})

    def pod(self, name: str, ip: str, *, of: str = "tiny", **status: Any) -> None:
        """A replica as the deployment controller and the kubelet would make and report it."""
        template = (self.get(DEPLOYMENTS, of) or {})["spec"]["template"]
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": template["metadata"]["labels"]},
            "spec": {**template["spec"], "nodeName": "none"},
        }
        self.create(PODS, body)
        container = {
            "name": "server", "image": "img", "imageID": "", "ready": True, "started": True,
            "restartCount": 0, "state": {"running": {}}, **status,
        }  # fmt: skip
        ready = "True" if container["ready"] else "False"
        report = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": ready}],
            "containerStatuses": [container],
        }
        self.merge(f"{PODS}/{name}/status", {"status": report})

    def events(self) -> dict[str, str]:
        """Notes by reason."""
        return {e["reason"]: e.get("note", "") for e in self.list(EVENTS)}

    def writes(self) -> int:
        """Every write that the API server has served so far, by its own count."""
        text = self.raw("GET", "/metrics").decode()
        pattern = r"^apiserver_request_total\{(.*)\} (\S+)$"
        total = 0.0
        for labels, value in re.findall(pattern, text, re.MULTILINE):
            verb = re.search(r'verb="(\w+)"', labels)
            resource = re.search(r'resource="([\w/]+)"', labels)
            ours = {"llmservices", "deployments", "services", "pods", "events"}
            if verb and resource and resource[1] in ours:
                total += float(value) if verb[1] not in ("GET", "LIST", "WATCH") else 0
        return int(total)

    def versions(self) -> dict[str, str]:
        """Resource versions of everything that an operator could touch."""
        paths = (LLMSERVICES, DEPLOYMENTS, SERVICES, EVENTS)
        return {
            f"{path}/{item['metadata']['name']}": item["metadata"]["resourceVersion"]
            for path in paths
            for item in self.list(path)
        }

    def close(self) -> None:
        self._api.close()


class FakeLoads:
    """Serves /octavo/load for any address: loads[ip] is what that replica says."""

    def __init__(self) -> None:
        self.loads: dict[str, Json] = {}
        loads = self.loads

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                document = loads.get(self.path.split("/")[1])
                body = json.dumps(document).encode()
                self.send_response(200 if document else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def url(self, ip: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{ip}/octavo/load"

    def say(self, ip: str, active: int, waiting: int = 0, total: int = 100) -> None:
        self.loads[ip] = {
            "schema": 1,
            "state": "Ready",
            "blocks": {"total": total, "active": active},
            "waiting_blocks": waiting,
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _PausingClient(client.ApiClient):
    """Pauses after each write of a status, before what is written next.

    The operator writes the status first. A test that sees it and at once asserts an Event or a
    count of replicas fails here each time, instead of once in a hundred runs on a busy machine.
    """

    PAUSE_SECONDS = 0.2
    _status_written = False

    def call_api(self, method: str, url: str, *rest: Any, **options: Any) -> Any:
        if self._status_written:
            time.sleep(self.PAUSE_SECONDS)
        self._status_written = urlsplit(url).path.endswith("/status")
        return super().call_api(method, url, *rest, **options)


class Operator:
    """An operator in a thread of this process, serving one namespace."""

    def __init__(self, kube: Kube, loads: FakeLoads) -> None:
        settings = Config(
            server_image="octavo-server:test", namespaces=(kube.namespace,), http_port=0
        )
        self.app = App(settings, lambda metrics: self._connect(kube, metrics), loads.url)
        self._stop, ready = threading.Event(), threading.Event()
        self._failure: list[BaseException] = []
        arguments = {
            "registry": build_registry(self.app, settings),
            "standalone": True,
            "namespaces": [kube.namespace],
            "stop_flag": self._stop,
            "ready_flag": ready,
        }
        self._thread = threading.Thread(target=self._run, args=(arguments,))
        self._thread.start()
        assert ready.wait(20), self._failure

    @staticmethod
    def _connect(kube: Kube, metrics: Any) -> Cluster:
        api = _PausingClient(config.new_client_from_config(str(kube.kubeconfig)).configuration)
        return Cluster(api, metrics, "test")

    def _run(self, arguments: Json) -> None:
        try:
            asyncio.run(self._main(arguments))
        except BaseException as error:
            self._failure.append(error)

    async def _main(self, arguments: Json) -> None:
        self._loop = asyncio.get_running_loop()
        await kopf.operator(**arguments)
        # kopf closes its TLS connections without waiting for the last bytes.
        await asyncio.sleep(0.1)

    def wake(self, uid: str) -> None:
        """Have a service reconciled, from the thread of the test."""
        self._loop.call_soon_threadsafe(self.app.wake, uid)

    def count(self, name: str, **labels: str) -> float:
        """A counter's sum over all series with these labels."""
        return sum(
            sample.value
            for metric in self.app.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def writes(self) -> float:
        return self.count("octavo_operator_api_writes_total")

    def reconciles(self) -> float:
        return self.count("octavo_operator_reconciles_total")

    def stop(self) -> float:
        """End it; returns how many seconds that took."""
        began = time.monotonic()
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self._failure == []
        return time.monotonic() - began
