"""What the operator leaves on the user's object, what it writes, and what goes with the object."""

from __future__ import annotations

from typing import Any

import pytest

from deployments import (
    PREFIX,
    Bench,
    keep_looking,
    manifest,
    operator_writes,
    scale_operator,
    suite_namespaces,
    versions,
)
from kube import Cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

CHILDREN = {
    "deployments": "/apis/apps/v1/namespaces/{}/deployments",
    "replicasets": "/apis/apps/v1/namespaces/{}/replicasets",
    "pods": "/api/v1/namespaces/{}/pods",
    "services": "/api/v1/namespaces/{}/services",
    "endpointslices": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
}


@pytest.fixture(scope="module")
def quiet(bench: Bench) -> str:
    """An autoscaled service without load."""
    return bench.serve(manifest("quiet", autoscaling={"max": 2, "intervalSeconds": 1}))


def children(cluster: Cluster, namespace: str) -> dict[str, list[str]]:
    found = {
        kind: [item["metadata"]["name"] for item in cluster.items(path.format(namespace))]
        for kind, path in CHILDREN.items()
    }
    return {kind: names for kind, names in found.items() if names}


def test_nothing_is_left_on_the_users_object(bench: Bench, quiet: str) -> None:
    metadata = bench.service(quiet)["metadata"]
    assert metadata.get("finalizers", []) == []
    annotations = set(metadata.get("annotations", {}))
    assert annotations <= {"kubectl.kubernetes.io/last-applied-configuration"}


def test_the_spec_is_as_the_user_wrote_it(bench: Bench, quiet: str) -> None:
    """Only kubectl is a manager of the spec; the operator manages the status."""
    for entry in bench.service(quiet)["metadata"]["managedFields"]:
        if "f:spec" in entry["fieldsV1"]:
            assert entry["manager"].startswith("kubectl"), entry["manager"]


def watch_for_writes(bench: Bench, seconds: float) -> None:
    """Fail when the operator writes anything in this time."""
    wait_until(
        lambda: suite_namespaces(bench.cluster) == [bench.namespace] and bench.settled("quiet"),
        "other tests' services are gone and this one is settled",
        timeout=90,
    )
    keep_looking(lambda: None, 3)

    def state() -> tuple[float, dict[str, str], Any]:
        found = bench.service("quiet")["metadata"]["managedFields"]
        times = [(entry["manager"], entry["time"]) for entry in found]
        return operator_writes(bench.cluster), versions(bench.cluster, bench.namespace), times

    before = state()
    seen = keep_looking(lambda: operator_writes(bench.cluster), seconds, period=5)
    assert state() == before
    assert set(seen) == {before[0]}


def test_an_idle_operator_writes_nothing(bench: Bench, quiet: str) -> None:
    """A minute: no write by its own count, none by resource versions, none by managedFields."""
    watch_for_writes(bench, 60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_idle_operator_writes_nothing_for_ten_minutes(bench: Bench, quiet: str) -> None:
    watch_for_writes(bench, 600)


def test_deleting_the_object_removes_every_child(bench: Bench) -> None:
    cluster, namespace = bench.cluster, f"{PREFIX}delete"
    cluster.ensure_namespace(namespace)
    other = Bench(cluster, namespace)
    name = other.serve(manifest("gone", replicas=1))
    assert set(children(cluster, namespace)) == set(CHILDREN)
    cluster.kubectl("delete", "llmsvc", name, "--namespace", namespace)
    wait_until(lambda: not children(cluster, namespace), "every child is gone", timeout=90)
    other.close()


def test_a_namespace_goes_without_the_operator(bench: Bench) -> None:
    """No finalizer of ours: the namespace goes while nobody is there to take one off."""
    cluster, namespace = bench.cluster, f"{PREFIX}orphan"
    cluster.ensure_namespace(namespace)
    other = Bench(cluster, namespace)
    other.serve(manifest("orphan", replicas=1))
    scale_operator(cluster, 0)
    try:
        cluster.kubectl("delete", "namespace", namespace, "--timeout=90s", timeout=100)
        assert cluster.get(f"/api/v1/namespaces/{namespace}") is None
    finally:
        scale_operator(cluster, 1)
