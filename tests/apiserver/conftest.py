"""A real etcd and kube-apiserver, the CRD in it, a namespace a test, and an operator on request.

OCTAVO_TEST_KUBECONFIG names an API server to use; otherwise the cluster tool starts one. There is
no kubelet and no controller manager: the tests write the statuses that these would write.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from apiserver_bench import (
    CRDS,
    DEPLOYMENTS,
    LLMSERVICES,
    PODS,
    ROOT,
    SERVICES,
    FakeLoads,
    Kube,
    Operator,
    eventually,
)

TOOL = [sys.executable, str(ROOT / "e2e" / "cluster" / "cli.py"), "control-plane"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs the API server."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.apiserver)


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An API server for all tests of the session."""
    given = os.environ.get("OCTAVO_TEST_KUBECONFIG")
    if given:
        yield Path(given)
        return
    state = str(tmp_path_factory.mktemp("control-plane"))
    done = subprocess.run([*TOOL, "up", "--state", state], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, "the cluster tool could not start a control plane; see above"
    try:
        yield Path(done.stdout.strip().splitlines()[-1])
    finally:
        subprocess.run([*TOOL, "down", "--state", state, "--purge"], check=True)


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Iterator[Kube]:
    """The API server with our CRD as it is in this checkout."""
    kube = Kube(kubeconfig)
    crd = yaml.safe_load((ROOT / "crds" / "llmservice.yaml").read_text())
    name = crd["metadata"]["name"]
    query = {"fieldManager": "tests", "force": "true"}
    kube.raw("PATCH", f"{CRDS}/{name}", crd, "application/apply-patch+yaml", **query)

    def established() -> bool:
        conditions = (kube.get(CRDS, name) or {}).get("status", {}).get("conditions")
        return any(c["type"] == "Established" and c["status"] == "True" for c in conditions or ())

    eventually(established, what="the CRD is established")
    # Served a moment later than established.
    eventually(lambda: kube.get("/apis/octavo.dev", "v1alpha1"), what="the API is served")
    yield kube
    kube.close()


@pytest.fixture
def kube(cluster: Kube) -> Iterator[Kube]:
    """A namespace of its own."""
    namespace = f"t-{uuid.uuid4().hex[:10]}"
    cluster.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
    account = {"metadata": {"name": "default"}}
    cluster.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", account)
    found = Kube(cluster.kubeconfig, namespace)
    yield found
    for path in (LLMSERVICES, DEPLOYMENTS, SERVICES, PODS):
        for item in found.list(path):
            found.delete(path, item["metadata"]["name"], gracePeriodSeconds="0")
    found.close()


@pytest.fixture
def loads() -> Iterator[FakeLoads]:
    """What the replicas say."""
    found = FakeLoads()
    yield found
    found.close()


@pytest.fixture
def operate(
    kube: Kube, loads: FakeLoads, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Operator]]:
    """Starts an operator; all that run at the end are ended."""
    monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig))
    with ExitStack() as stack:

        def start() -> Operator:
            found = Operator(kube, loads)
            stack.callback(found.stop)
            return found

        yield start


@pytest.fixture
def operator(operate: Callable[[], Operator]) -> Operator:
    """An operator that runs."""
    return operate()
