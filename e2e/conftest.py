"""One chart for the whole suite, one namespace for each group of tests, nothing left behind.

The suite touches only a cluster that it was pointed at on purpose: the one that our own tool made
on this machine, or the current context when CLUSTER=current says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cluster_access import connect
from deployments import PREFIX, RELEASE, SYSTEM_NAMESPACE, Bench, make_room, suite_namespaces
from kube import Cluster, ClusterError


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster with our chart on it, and on no other."""
    try:
        found = connect()
    except ClusterError as error:
        pytest.exit(f"no cluster to test on: {error}", returncode=3)
    try:
        try:
            make_room(found, RELEASE)
            for name in suite_namespaces(found):
                found.kubectl("delete", "namespace", name, timeout=180)
            found.install_chart(RELEASE, SYSTEM_NAMESPACE)
        except ClusterError as error:
            pytest.exit(f"the chart cannot be tested here: {error}", returncode=3)
        yield found
        found.remove_release(RELEASE, SYSTEM_NAMESPACE, *suite_namespaces(found))
    finally:
        found.close()


@pytest.fixture(scope="module")
def bench(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A namespace for one module, deleted afterwards while the next module begins."""
    module = request.module.__name__.rsplit(".", 1)[-1].removeprefix("test_").replace("_", "-")
    made = Bench(cluster, f"{PREFIX}{module}")
    made.close()
    cluster.ensure_namespace(made.namespace)
    yield made
    made.close(wait=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Put what the cluster says beside a failure, while it is still there to be asked."""
    report = yield
    fixtures: dict[str, Any] = getattr(item, "funcargs", {})
    found = fixtures.get("cluster")
    if report.failed and isinstance(found, Cluster):
        made = fixtures.get("bench")
        namespaces = [SYSTEM_NAMESPACE, *([made.namespace] if isinstance(made, Bench) else [])]
        try:
            said = _evidence(found, namespaces)
        except (ClusterError, httpx.HTTPError) as error:
            said = f"the cluster does not answer any more: {error}"
        report.sections.append(("the cluster at the time", said))
    return report


def _evidence(cluster: Cluster, namespaces: list[str]) -> str:
    parts = []
    for namespace in namespaces:
        here = ("--namespace", namespace)
        questions = [
            ("get", "llmsvc,deployments,pods", "--output=wide", *here),
            ("describe", "llmsvc", *here),
            ("describe", "pods", *here),
            ("get", "events", "--sort-by=.lastTimestamp", *here),
        ]
        for pod in cluster.items(f"/api/v1/namespaces/{namespace}/pods"):
            questions.append(("logs", pod["metadata"]["name"], "--tail=60", *here))
            if any(s["restartCount"] for s in pod["status"].get("containerStatuses", [])):
                questions.append(
                    ("logs", pod["metadata"]["name"], "--tail=60", "--previous", *here)
                )
        for question in questions:
            try:
                parts.append(f"$ kubectl {' '.join(question)}\n{cluster.kubectl(*question)}")
            except ClusterError as error:
                parts.append(str(error))
    return "\n".join(parts)


@pytest.fixture(scope="session")
def gpus(cluster: Cluster) -> Iterator[int]:
    """One fake GPU on the first node: the scheduler and the kubelet take it for a real one."""
    node = cluster.items("/api/v1/nodes")[0]
    if "nvidia.com/gpu" in node["status"]["capacity"] and not cluster.own:
        pytest.skip("this node has real GPUs; the test needs a count of its own")
    name = node["metadata"]["name"]

    def patch(operation: dict[str, str]) -> None:
        path = {"path": "/status/capacity/nvidia.com~1gpu"}
        cluster.kubectl(
            *("patch", "node", name, "--subresource=status", "--type=json"),
            *("--patch", json.dumps([{**operation, **path}])),
        )

    patch({"op": "add", "value": "1"})
    yield 1
    patch({"op": "remove"})
