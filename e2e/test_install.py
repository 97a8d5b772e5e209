"""The chart's other mode: an operator with Roles in named namespaces and no right elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments import (
    PREFIX,
    RELEASE,
    SYSTEM_NAMESPACE,
    Bench,
    keep_looking,
    manifest,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture
def only_here(bench: Bench) -> Iterator[None]:
    """The suite's release, confined to the namespace of this module."""
    cluster = bench.cluster
    cluster.install_chart(
        *(RELEASE, SYSTEM_NAMESPACE),
        f"operator.watchNamespaces={{{bench.namespace}}}",
    )
    yield
    cluster.install_chart(RELEASE, SYSTEM_NAMESPACE)


def may(bench: Bench, verb: str, resource: str, namespace: str) -> bool:
    """Whether the operator's account has a right, by the API server's own word."""
    account = f"system:serviceaccount:{SYSTEM_NAMESPACE}:{RELEASE}"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": account,
            "resourceAttributes": {
                "verb": verb,
                "group": "apps" if resource == "deployments" else "",
                "resource": resource,
                "namespace": namespace,
            },
        },
    }
    answer = bench.cluster.api.post(
        "/apis/authorization.k8s.io/v1/subjectaccessreviews", json=review
    )
    return bool(answer.raise_for_status().json()["status"]["allowed"])


def test_an_operator_of_one_namespace(bench: Bench, only_here: None) -> None:
    """It serves there, and has no right and no effect anywhere else."""
    elsewhere = Bench(bench.cluster, f"{PREFIX}elsewhere")
    bench.cluster.ensure_namespace(elsewhere.namespace)
    stranger = elsewhere.apply(manifest("stranger", replicas=1))
    bench.serve(manifest("local", replicas=1))
    assert may(bench, "patch", "deployments", bench.namespace)
    assert not may(bench, "patch", "deployments", elsewhere.namespace)
    assert not may(bench, "get", "secrets", bench.namespace)
    assert not may(bench, "delete", "deployments", bench.namespace)
    keep_looking(lambda: None, 2)
    assert "status" not in elsewhere.service(stranger)
    elsewhere.close()
