"""What the pods look like; that they change with the user's intent and with nothing else."""

from typing import Any

import llmservices
import pytest

from octavo_operator import resources


def deployment(spec: dict[str, Any] | None = None, replicas: int = 1) -> dict[str, Any]:
    return resources.build_deployment(llmservices.service(spec), replicas, "default:1")


def pod(spec: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = deployment(spec)["spec"]["template"]["spec"]
    return found


def container(spec: dict[str, Any] | None = None) -> dict[str, Any]:
    (found,) = pod(spec)["containers"]
    return dict(found)


def test_restricted_pod_security() -> None:
    """The rules of the restricted Pod Security Standard, and a read-only root besides."""
    found, server = pod(), container()
    assert found["securityContext"]["runAsNonRoot"] is True
    assert found["securityContext"]["runAsUser"] == 10001
    assert found["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert found["automountServiceAccountToken"] is False
    assert found["enableServiceLinks"] is False
    assert {m["mountPath"] for m in server["volumeMounts"]} == {"/tmp", "/dev/shm"}


def test_children_belong_to_the_service() -> None:
    for child in resources.build_children(llmservices.service(), 1, "img"):
        (owner,) = child["metadata"]["ownerReferences"]
        assert owner["uid"] == "uid-tiny"
        assert owner["kind"] == "LLMService"
        assert owner["controller"] is True
        assert owner["blockOwnerDeletion"] is True
        assert child["metadata"]["labels"]["octavo.dev/service"] == "tiny"
        assert child["metadata"]["name"] == "tiny"


def test_service_and_pods_meet() -> None:
    service, found = resources.build_children(llmservices.service(), 1, "img")
    template = found["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert service["spec"]["selector"] == found["spec"]["selector"]["matchLabels"]
    (port,) = service["spec"]["ports"]
    assert port["port"] == 8000
    assert port["targetPort"] == container()["ports"][0]["name"]


def test_no_replica_leaves_before_its_successor_answers() -> None:
    strategy = deployment()["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


def test_gpu_is_requested_once_and_limited_to_the_same() -> None:
    found = container({"engine": {"device": "cuda"}, "resources": {"requests": {"cpu": 2}}})
    assert found["resources"] == {
        "requests": {"cpu": "2", "nvidia.com/gpu": "1"},
        "limits": {"nvidia.com/gpu": "1"},
    }


def test_cpu_asks_for_no_accelerator() -> None:
    assert "resources" not in container({"engine": {"device": "cpu"}})


def test_an_own_accelerator_resource() -> None:
    found = container({"accelerator": {"count": 1, "resource": "nvidia.com/mig-1g.10gb"}})
    assert found["resources"]["limits"] == {"nvidia.com/mig-1g.10gb": "1"}


def test_model_on_a_claim() -> None:
    spec = {"model": {"uri": "pvc://store/house/v3"}}
    assert container(spec)["args"][1] == "/models/house/v3"
    claim = {"claimName": "store", "readOnly": True}
    assert {"name": "models", "persistentVolumeClaim": claim} in pod(spec)["volumes"]
    mount = {"name": "models", "mountPath": "/models", "readOnly": True}
    assert mount in container(spec)["volumeMounts"]


def test_model_from_the_hub() -> None:
    uri = {"uri": "hf://org/name", "revision": "v2", "secretRef": {"name": "hub"}}
    found = container({"model": uri})
    assert found["args"][1:4] == ["--source", "hub", "org/name@v2"]
    env = {var["name"]: var for var in found["env"]}
    assert env["HF_HOME"]["value"] == "/models/hf"
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert {"name": "models", "emptyDir": {}} in pod({"model": uri})["volumes"]


def test_revision_within_the_uri() -> None:
    found = container({"model": {"uri": "hf://org/name@abc"}})
    assert found["args"][1:4] == ["--source", "hub", "org/name@abc"]


def test_served_names_default_to_the_name_of_the_object() -> None:
    args = container()["args"]
    assert args[args.index("--served-model-name") + 1] == "tiny"
    spec = {"model": {"uri": "file:///m", "servedNames": ["a", "b"]}}
    args = container(spec)["args"]
    at = args.index("--served-model-name")
    assert args[at + 1 : at + 3] == ["a", "b"]


def test_scheduling_fields_are_passed_on() -> None:
    toleration = {"key": "gpu", "operator": "Exists", "tolerationSeconds": 30}
    found = pod({"nodeSelector": {"zone": "a"}, "tolerations": [toleration]})
    assert found["nodeSelector"] == {"zone": "a"}
    assert found["tolerations"] == [toleration]


def test_image_of_the_user_wins() -> None:
    assert container()["image"] == "default:1"
    spec = {"engine": {"image": "mine:2", "imagePullPolicy": "Always"}}
    assert container(spec)["image"] == "mine:2"
    assert container(spec)["imagePullPolicy"] == "Always"


def test_server_stops_before_it_is_killed() -> None:
    spec = {"terminationGracePeriodSeconds": 60}
    args = container(spec)["args"]
    drain = int(args[args.index("--drain-timeout") + 1])
    before = container(spec)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= 1
    assert before + drain < pod(spec)["terminationGracePeriodSeconds"] == 60


@pytest.mark.parametrize(
    "change",
    [
        {"autoscaling": {"max": 3}},
        {"autoscaling": {"max": 9, "up": {"windowSeconds": 5}}},
        {"replicas": 3},
        {"paused": True},
    ],
)
def test_pods_do_not_restart_for_what_is_not_theirs(change: dict[str, Any]) -> None:
    assert deployment(change, 3)["spec"]["template"] == deployment()["spec"]["template"]


def test_pods_do_not_restart_for_generation_or_status() -> None:
    one = resources.build_deployment(llmservices.service(generation=1), 1, "img")
    two = resources.build_deployment(llmservices.service(generation=9), 1, "img")
    assert one == two


def test_the_applied_hash_follows_the_manifest() -> None:
    def digest(found: dict[str, Any]) -> str:
        value: str = found["metadata"]["annotations"][resources.APPLIED_ANNOTATION]
        return value

    assert digest(deployment()) == digest(deployment())
    assert digest(deployment()) != digest(deployment(replicas=2))
    assert digest(deployment({"nodeSelector": {"a": "b"}})) != digest(deployment())
