"""A cluster as the demo and the suite use it: kubectl, helm, the chart, quick reads.

Writes go through kubectl and helm, as a user's would. Reads that are polled go through one
`kubectl proxy`, which costs a fraction of a process per read and works with every kind of
credentials.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
CLUSTER_TOOL = [sys.executable, str(ROOT / "e2e" / "cluster" / "cli.py")]
CHART = ROOT / "charts" / "octavo"
CRD = "llmservices.octavo.dev"
GROUP = "/apis/octavo.dev/v1alpha1"
DATA_PORT = 8000

Json = dict[str, Any]


class ClusterError(Exception):
    """A command failed or a wait ran out; the text is for the person who reads the log."""


def run(command: list[str], *, stdin: str | None = None, timeout: float = 120) -> str:
    """Standard output of a command; ClusterError with both streams when it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command)}: no end after {timeout:.0f} s") from error
    if done.returncode != 0:
        said = (done.stdout.strip() + "\n" + done.stderr.strip()).strip()
        raise ClusterError(f"{' '.join(command)}: exit {done.returncode}\n{said}")
    return done.stdout


def wait_until(look: Callable[[], Any], what: str, *, timeout: float, period: float = 0.5) -> Any:
    """Ask until the answer is truthy and return it; ClusterError names what did not come."""
    deadline = time.monotonic() + timeout
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {timeout:.0f} s")
        time.sleep(period)


@dataclass
class Cluster:
    """One cluster and the images to run on it. `own`: our tool made it, so it may be cleaned."""

    kubectl_path: str
    helm_path: str
    kubeconfig: str
    server_image: str
    operator_image: str
    own: bool
    api: httpx.Client = field(init=False)
    _proxy: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self._proxy = subprocess.Popen(
            [*self._kubectl(), "proxy", "--port=0"], stdout=subprocess.PIPE, text=True
        )
        line = self._proxy.stdout.readline() if self._proxy.stdout else ""
        found = re.search(r"127\.0\.0\.1:\d+", line)
        if not found:
            self._proxy.kill()
            raise ClusterError(f"kubectl proxy did not start: {line!r}")
        self.api = httpx.Client(base_url=f"http://{found[0]}", timeout=20, trust_env=False)

    def close(self) -> None:
        """End the proxy."""
        self.api.close()
        self._proxy.terminate()
        self._proxy.wait(timeout=10)
        if self._proxy.stdout:
            self._proxy.stdout.close()

    def _kubectl(self) -> list[str]:
        flags = [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        return [self.kubectl_path, *flags]

    def kubectl(self, *args: str, stdin: str | None = None, timeout: float = 120) -> str:
        """Run kubectl; its standard output, or ClusterError."""
        return run([*self._kubectl(), *args], stdin=stdin, timeout=timeout)

    def helm(self, *args: str, timeout: float = 180) -> str:
        """Run helm; its standard output, or ClusterError."""
        flags = [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        return run([self.helm_path, *args, *flags], timeout=timeout)

    def get(self, path: str) -> Json | None:
        """One read of the API; None when there is no such object."""
        answer = self.api.get(path)
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise ClusterError(f"GET {path}: {answer.status_code} {answer.text[:500]}")
        result: Json = answer.json()
        return result

    def items(self, path: str) -> list[Json]:
        """The objects of a list."""
        found = self.get(path)
        return list(found["items"]) if found else []

    def service(self, namespace: str, name: str) -> Json | None:
        """An LLMService."""
        return self.get(f"{GROUP}/namespaces/{namespace}/llmservices/{name}")

    def pods(self, namespace: str, name: str) -> list[Json]:
        """The pods of an LLMService, oldest first."""
        pods = self.items(
            f"/api/v1/namespaces/{namespace}/pods?labelSelector=octavo.dev%2Fservice%3D{name}"
        )
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def load(self, namespace: str, pod: str) -> Json | None:
        """A pod's /octavo/load, or None while it does not answer."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}:{DATA_PORT}/proxy/octavo/load"
        try:
            answer = self.api.get(path, timeout=2)
            result: Json | None = answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None
        return result

    def base_url(self, namespace: str, name: str) -> str:
        """Where this machine reaches a Service: its address on our own node, else the API proxy."""
        if not self.own:
            path = f"/api/v1/namespaces/{namespace}/services/{name}:{DATA_PORT}/proxy"
            return str(self.api.base_url).rstrip("/") + path
        found = self.get(f"/api/v1/namespaces/{namespace}/services/{name}")
        if found is None:
            raise ClusterError(f"Service {namespace}/{name} is not there")
        return f"http://{found['spec']['clusterIP']}:{DATA_PORT}"

    def ensure_namespace(self, name: str) -> None:
        """Create a namespace that holds its pods to the restricted standard."""
        namespace = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": name,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))

    def install_chart(self, release: str, namespace: str, *settings: str) -> None:
        """Install or upgrade the chart with this cluster's images and wait for the operator."""
        self.ensure_namespace(namespace)
        values = [
            f"operator.image={self.operator_image}",
            f"server.image={self.server_image}",
            *settings,
        ]
        flags = [part for value in values for part in ("--set", value)]
        self.helm(
            *("upgrade", "--install", release, str(CHART), "--namespace", namespace),
            *("--wait", "--timeout", "120s", *flags),
        )

    def remove_release(self, release: str, namespace: str, *also: str) -> None:
        """Uninstall a release, its CRD with every LLMService, and the namespaces named."""
        self.kubectl("delete", "crd", CRD, "--ignore-not-found", "--timeout=60s")
        self.helm("uninstall", release, "--namespace", namespace, "--ignore-not-found")
        for name in (namespace, *also):
            self.kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=90s")

    def releases(self) -> list[tuple[str, str]]:
        """(name, namespace) of each release of our chart."""
        listed = json.loads(self.helm("list", "--all-namespaces", "--output", "json") or "[]")
        return [(r["name"], r["namespace"]) for r in listed if r["chart"].startswith("octavo-")]


def conditions(found: Json | None) -> dict[str, Json]:
    """An object's conditions by type."""
    listed = (found or {}).get("status", {}).get("conditions", [])
    return {condition["type"]: condition for condition in listed}


def is_ready(found: Json | None) -> bool:
    """Whether the Ready condition is True."""
    return conditions(found).get("Ready", {}).get("status") == "True"


def alive(pods: list[Json]) -> list[Json]:
    """The pods that nobody has asked to end."""
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def restarts(pod: Json) -> int:
    """How often the containers of a pod were started again."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return sum(status["restartCount"] for status in statuses)


def tool(*args: str, timeout: float = 60) -> str:
    """Run the cluster tool; its standard output."""
    return run([*CLUSTER_TOOL, *args], timeout=timeout).strip()


def environment(name: str) -> str:
    """A switch of the person who runs this (CLUSTER, KUBECONFIG, HELM, OCTAVO_REGISTRY)."""
    return os.environ.get(name, "")
