"""LLMServices for the tests: manifests, a bench to put them on, and what to wait for."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from kube import CRD, Cluster, ClusterError, Json, alive, conditions, is_ready, wait_until
from tinymodel import tasks

RELEASE, SYSTEM_NAMESPACE = "octavo-e2e", "octavo-e2e-system"
PREFIX = "octavo-e2e-"
DEMO_RELEASE, DEMO_SYSTEM_NAMESPACE, DEMO_NAMESPACE = "octavo", "octavo-system", "octavo-demo"
TINY = "file:///opt/octavo/models/tiny"
OPERATOR_PORT = 8081

# Blocks run out long before two cores do; windows short enough to watch.
SMALL_POOL = {"numKvBlocks": 64, "maxModelLen": 768}
SHORT_WINDOWS = {
    "intervalSeconds": 1,
    "up": {"windowSeconds": 0, "maxPods": 4, "periodSeconds": 5},
    "down": {"windowSeconds": 15, "maxPods": 1, "periodSeconds": 5},
}

# Against that pool: clients whose answers differ in length, so that they do not end together, and
# need about 150 blocks at any time where one replica may use 51.
CLIENTS = 16
COUNTS = [tasks.count_task(a, a + 50 + 17 * n % 60) for n, a in enumerate(range(100, 180, 5))]


def manifest(name: str, uri: str = TINY, **spec: Any) -> Json:
    """An LLMService on the CPU that is quick to stop; `spec` is merged one level deep."""
    engine = {"device": "cpu", **spec.pop("engine", {})}
    return {
        "apiVersion": "octavo.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": uri},
            "engine": engine,
            "resources": {
                "requests": {"cpu": "100m", "memory": "512Mi"},
                "limits": {"memory": "2Gi"},
            },
            "terminationGracePeriodSeconds": 60,
            **spec,
        },
    }


@dataclass
class Bench:
    """One test namespace and what is in it."""

    cluster: Cluster
    namespace: str
    services: list[str] = field(default_factory=list)

    def apply(self, found: Json) -> str:
        """Apply an LLMService; its name."""
        self.cluster.kubectl(
            "apply", "--namespace", self.namespace, "-f", "-", stdin=json.dumps(found)
        )
        name: str = found["metadata"]["name"]
        self.services.append(name)
        return name

    def serve(self, found: Json, timeout: float = 90) -> str:
        """Apply an LLMService and wait for Ready; its name."""
        name = self.apply(found)
        self.wait_ready(name, timeout)
        return name

    def wait_ready(self, name: str, timeout: float = 90) -> None:
        """Wait as a user would."""
        self.cluster.kubectl(
            *("wait", f"llmsvc/{name}", "--namespace", self.namespace),
            *("--for=condition=Ready", f"--timeout={timeout:.0f}s"),
            timeout=timeout + 10,
        )

    def patch(self, name: str, spec: Json) -> None:
        """Merge a patch into the spec, as a user would."""
        self.cluster.kubectl(
            *("patch", "llmsvc", name, "--namespace", self.namespace, "--type=merge"),
            *("--patch", json.dumps({"spec": spec})),
        )

    def delete(self, name: str, timeout: float = 90) -> None:
        """Delete an LLMService and wait until its pods are gone."""
        self.cluster.kubectl("delete", "llmsvc", name, "--namespace", self.namespace)
        wait_until(lambda: not self.pods(name), f"the pods of {name} are gone", timeout=timeout)

    def service(self, name: str) -> Json:
        """The object; ClusterError when it is gone."""
        found = self.cluster.service(self.namespace, name)
        if found is None:
            raise ClusterError(f"LLMService {self.namespace}/{name} is not there")
        return found

    def pods(self, name: str) -> list[Json]:
        """Its pods, oldest first."""
        return self.cluster.pods(self.namespace, name)

    def ready_pods(self, name: str) -> list[Json]:
        """Its pods that answer and that nobody has asked to end."""
        return [pod for pod in alive(self.pods(name)) if is_ready(pod)]

    def condition(self, name: str, kind: str) -> Json:
        """A condition, empty when it is not there."""
        return conditions(self.service(name)).get(kind, {})

    def url(self, name: str) -> str:
        """Where its Service answers."""
        return self.cluster.base_url(self.namespace, name)

    def post(self, name: str, content: bytes) -> httpx.Response:
        """A raw chat request."""
        return httpx.post(
            f"{self.url(name)}/v1/chat/completions",
            content=content,
            headers={"content-type": "application/json"},
            timeout=60,
            trust_env=False,
        )

    def settled(self, name: str, pods: int = 1) -> bool:
        """Whether the latest spec is what runs, on just so many pods."""
        found = self.service(name)
        observed = found.get("status", {}).get("observedGeneration")
        return (
            observed == found["metadata"]["generation"]
            and is_ready(found)
            and len(self.pods(name)) == len(self.ready_pods(name)) == pods
        )

    def close(self, *, wait: bool = True) -> None:
        """Delete the namespace with all that is in it."""
        self.cluster.kubectl(
            *(
                "delete",
                "namespace",
                self.namespace,
                "--ignore-not-found",
                f"--wait={wait}".lower(),
            ),
            timeout=180,
        )


def make_room(cluster: Cluster, release: str) -> None:
    """Two operators would fight: our own cluster is cleared, anybody else's is left alone."""
    for found, namespace in cluster.releases():
        if found == release:
            continue
        if not cluster.own:
            raise ClusterError(
                f"release {found} in namespace {namespace} is an Octavo too, and two operators "
                f"would fight: helm uninstall {found} --namespace {namespace}, or take another "
                f"cluster"
            )
        print(f"  removing release {found} of namespace {namespace}", flush=True)
        demo = (DEMO_NAMESPACE,) if namespace == DEMO_SYSTEM_NAMESPACE else ()
        cluster.remove_release(found, namespace, *demo, *suite_namespaces(cluster))
    _drop_kept_crd(cluster, release)


def _drop_kept_crd(cluster: Cluster, release: str) -> None:
    """A definition that an uninstalled release kept would not let another one take its place."""
    crd = cluster.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD}")
    annotations = (crd or {}).get("metadata", {}).get("annotations", {})
    holder = annotations.get("meta.helm.sh/release-name", "nobody")
    if crd is None or holder == release:
        return
    if not cluster.own:
        raise ClusterError(
            f"{CRD} is there already and belongs to {holder}: delete it, with every LLMService, "
            f"or take another cluster"
        )
    cluster.kubectl("delete", "crd", CRD, "--timeout=60s")


def suite_namespaces(cluster: Cluster) -> list[str]:
    """The suite's namespaces for LLMServices that are there."""
    names = [found["metadata"]["name"] for found in cluster.items("/api/v1/namespaces")]
    return [name for name in names if name.startswith(PREFIX) and name != SYSTEM_NAMESPACE]


def operator_pods(cluster: Cluster) -> list[Json]:
    """The operator's pods in the suite's release."""
    return cluster.items(
        f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods"
        "?labelSelector=app.kubernetes.io%2Fname%3Doctavo-operator"
    )


def scale_operator(cluster: Cluster, replicas: int) -> None:
    """Stop or start the operator and wait until it is so."""
    cluster.kubectl(
        *("scale", "deployment", RELEASE, "--namespace", SYSTEM_NAMESPACE),
        f"--replicas={replicas}",
    )

    def is_so() -> bool:
        pods = operator_pods(cluster)
        return len(pods) == replicas and all(is_ready(pod) for pod in pods)

    wait_until(is_so, f"{replicas} operator pods", timeout=90)


def restart_operator(cluster: Cluster) -> None:
    """Kill the operator's pod and wait for the next one."""
    (old,) = operator_pods(cluster)
    cluster.kubectl(
        *("delete", "pod", old["metadata"]["name"], "--namespace", SYSTEM_NAMESPACE),
        *("--grace-period=0", "--force"),
    )

    def replaced() -> bool:
        pods = alive(operator_pods(cluster))
        names = {pod["metadata"]["uid"] for pod in pods}
        return len(pods) == 1 and old["metadata"]["uid"] not in names and is_ready(pods[0])

    wait_until(replaced, "a new operator pod is ready", timeout=90)


def operator_writes(cluster: Cluster) -> float:
    """How often the operator has written to the API server, by its own metric."""
    (pod,) = operator_pods(cluster)
    path = (
        f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods/{pod['metadata']['name']}"
        f":{OPERATOR_PORT}/proxy/metrics"
    )
    text = cluster.api.get(path).raise_for_status().text
    name = "octavo_operator_api_writes_total"
    if f"# TYPE {name} counter" not in text:
        raise ClusterError(f"the operator exports no {name}")
    # A series appears with its first write.
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def versions(cluster: Cluster, namespace: str) -> dict[str, str]:
    """Resource version of each object that the operator could write in a namespace."""
    kinds = {
        "llmservice": f"/apis/octavo.dev/v1alpha1/namespaces/{namespace}/llmservices",
        "deployment": f"/apis/apps/v1/namespaces/{namespace}/deployments",
        "service": f"/api/v1/namespaces/{namespace}/services",
        "event": f"/api/v1/namespaces/{namespace}/events",
    }
    return {
        f"{kind}/{found['metadata']['name']}": found["metadata"]["resourceVersion"]
        for kind, path in kinds.items()
        for found in cluster.items(path)
    }


def keep_looking(look: Any, seconds: float, period: float = 0.25) -> list[Any]:
    """What was seen over a while."""
    seen = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        seen.append(look())
        time.sleep(period)
    return seen
