"""The operator against a real API server: what it writes, and when it writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from apiserver_bench import (
    DEPLOYMENTS,
    LLMSERVICES,
    PODS,
    SERVICES,
    FakeLoads,
    Kube,
    Operator,
    eventually,
)

Json = dict[str, Any]
# Production windows are minutes; these tests want to see the way down within seconds.
QUICK = {
    "min": 1,
    "max": 3,
    "intervalSeconds": 1,
    "down": {"windowSeconds": 2, "maxPods": 1, "periodSeconds": 1},
}


def running(kube: Kube, count: int = 1) -> None:
    """Wait for the Deployment and report that many ready replicas of it."""
    eventually(lambda: kube.replicas() == count, what=f"{count} replicas are wanted")
    kube.roll(count)


def ready(kube: Kube) -> None:
    eventually(lambda: kube.condition("Ready").get("status") == "True", what="Ready")


def serving(kube: Kube, loads: FakeLoads, spec: Json | None = None) -> None:
    """One replica that answers and is idle."""
    kube.service(spec or {})
    running(kube)
    loads.say("10.0.0.1", 0)
    kube.pod("tiny-a", "10.0.0.1")
    ready(kube)


def test_children_appear_and_the_service_becomes_ready(kube: Kube, operator: Operator) -> None:
    made = kube.service({"autoscaling": {"max": 3}})
    running(kube)
    ready(kube)
    for path in (DEPLOYMENTS, SERVICES):
        child = kube.get(path, "tiny")
        assert child
        (owner,) = child["metadata"]["ownerReferences"]
        assert owner == {
            "apiVersion": "octavo.dev/v1alpha1",
            "kind": "LLMService",
            "name": "tiny",
            "uid": made["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        managers = {entry["manager"] for entry in child["metadata"]["managedFields"]}
        assert "octavo-operator" in managers
    status = kube.status()
    assert status["observedGeneration"] == made["metadata"]["generation"]
    assert status["replicasSummary"] == "1/1"
    assert status["endpoint"] == f"http://tiny.{kube.namespace}.svc:8000"
    assert kube.condition("Reconciling")["status"] == "False"
    assert kube.condition("Stalled")["status"] == "False"


def test_the_scale_subresource_tells_count_and_selector(kube: Kube, operator: Operator) -> None:
    kube.service({"replicas": 2})
    running(kube, 2)
    eventually(lambda: kube.status().get("replicas") == 2)
    scale = kube.call("GET", f"{LLMSERVICES}/tiny/scale")
    assert scale["status"]["replicas"] == 2
    deployment = kube.get(DEPLOYMENTS, "tiny")
    assert deployment
    labels = deployment["spec"]["selector"]["matchLabels"]
    wanted = {f"{key}={value}" for key, value in labels.items()}
    assert set(scale["status"]["selector"].split(",")) == wanted
    kube.merge(f"{LLMSERVICES}/tiny/scale", {"spec": {"replicas": 4}})
    eventually(lambda: kube.replicas() == 4)


def test_nothing_is_left_on_the_users_object(
    kube: Kube, loads: FakeLoads, operator: Operator
) -> None:
    """After ten reconciles: no finalizer, no annotation, the spec as it was."""
    made = kube.service({"replicas": 1})
    running(kube)
    before = operator.reconciles()
    for turn in range(12):
        kube.roll(turn % 2)
        eventually(lambda turn=turn: kube.status().get("readyReplicas") == turn % 2)
    assert operator.reconciles() - before >= 10
    found = kube.get(LLMSERVICES, "tiny")
    assert found
    assert "finalizers" not in found["metadata"]
    assert "annotations" not in found["metadata"]
    assert found["metadata"]["generation"] == 1
    assert found["spec"] == made["spec"]
    for path in (DEPLOYMENTS, SERVICES):
        child = kube.get(path, "tiny")
        assert child
        assert "finalizers" not in child["metadata"]


def test_unchanged_input_means_no_writes(kube: Kube, loads: FakeLoads, operator: Operator) -> None:
    """By the operator's count, by the API server's count and by the resource versions."""
    serving(kube, loads, {"autoscaling": QUICK, "resources": {"requests": {"cpu": "0.5"}}})
    eventually(lambda: kube.status().get("kvUtilizationPercent") == 0)
    made = kube.get(LLMSERVICES, "tiny")
    assert made
    time.sleep(0.5)
    counted, served, versions = operator.writes(), kube.writes(), kube.versions()
    time.sleep(4)
    # Load that moves, but not by what is worth a write.
    loads.say("10.0.0.1", 3)
    for _ in range(5):
        before = operator.reconciles()
        operator.wake(made["metadata"]["uid"])
        eventually(lambda before=before: operator.reconciles() > before)
    assert operator.writes() == counted
    assert kube.writes() == served
    assert kube.versions() == versions


def test_a_restart_of_the_operator_writes_nothing(
    kube: Kube, loads: FakeLoads, operate: Callable[[], Operator]
) -> None:
    first = operate()
    serving(kube, loads, {"autoscaling": QUICK, "resources": {"limits": {"memory": "1024Mi"}}})
    eventually(lambda: kube.status().get("kvUtilizationPercent") == 0)
    time.sleep(0.5)
    assert first.stop() < 3
    versions = kube.versions()
    second = operate()
    eventually(lambda: second.reconciles() >= 1)
    time.sleep(2.5)
    assert second.writes() == 0
    assert kube.versions() == versions


@pytest.mark.parametrize(
    ("path", "change", "healed"),
    [
        (
            DEPLOYMENTS,
            {"spec": {"replicas": 9}},
            lambda child: child["spec"]["replicas"] == 1,
        ),
        (
            DEPLOYMENTS,
            {"metadata": {"ownerReferences": None}},
            lambda child: child["metadata"].get("ownerReferences"),
        ),
        (
            SERVICES,
            {"spec": {"selector": {"app": "other"}}},
            lambda child: child["spec"]["selector"].get("app.kubernetes.io/instance") == "tiny",
        ),
    ],
)
def test_drift_is_healed(
    kube: Kube, operator: Operator, path: str, change: Json, healed: Callable[[Json], bool]
) -> None:
    kube.service({})
    running(kube)
    ready(kube)
    kube.merge(f"{path}/tiny", change)
    eventually(lambda: healed(kube.get(path, "tiny") or {}), what=f"healed: {change}")


@pytest.mark.parametrize("path", [DEPLOYMENTS, SERVICES])
def test_a_deleted_child_comes_back(kube: Kube, operator: Operator, path: str) -> None:
    kube.service({})
    running(kube)
    ready(kube)
    before = kube.get(path, "tiny")
    assert before
    kube.delete(path, "tiny")

    def back() -> bool:
        found = kube.get(path, "tiny")
        return bool(found and found["metadata"]["uid"] != before["metadata"]["uid"])

    eventually(back)


def test_fields_of_others_are_left_alone(kube: Kube, operator: Operator) -> None:
    kube.service({})
    running(kube)
    ready(kube)
    template = {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}}
    kube.merge(f"{DEPLOYMENTS}/tiny", {"spec": {"template": template}})
    kube.service({}, name="other")
    eventually(lambda: kube.replicas("other") == 1)
    found = kube.get(DEPLOYMENTS, "tiny")
    assert found
    annotations = found["spec"]["template"]["metadata"]["annotations"]
    assert annotations["kubectl.kubernetes.io/restartedAt"] == "now"


def test_a_changed_spec_is_rolled_out(kube: Kube, operator: Operator) -> None:
    kube.service({"nodeSelector": {"zone": "a"}})
    running(kube)
    ready(kube)
    change = {"spec": {"nodeSelector": None, "engine": {"maxModelLen": 256}}}
    kube.merge(f"{LLMSERVICES}/tiny", change)

    def changed() -> bool:
        pod = (kube.get(DEPLOYMENTS, "tiny") or {})["spec"]["template"]["spec"]
        return "--max-model-len" in pod["containers"][0]["args"] and "nodeSelector" not in pod

    eventually(changed, what="the new argument is there, the removed selector is gone")
    eventually(lambda: kube.condition("Ready")["observedGeneration"] == 2)
    assert kube.condition("Ready")["status"] == "False"
    kube.roll(1)
    ready(kube)


def test_paused_children_are_left_alone(kube: Kube, operator: Operator) -> None:
    kube.service({"paused": True})
    eventually(lambda: kube.condition("Reconciling").get("reason") == "Paused")
    assert kube.get(DEPLOYMENTS, "tiny") is None
    kube.merge(f"{LLMSERVICES}/tiny", {"spec": {"paused": False}})
    eventually(lambda: kube.replicas() == 1)


def test_a_taken_name_is_told_and_nothing_is_overwritten(kube: Kube, operator: Operator) -> None:
    ports = [{"port": 80}]
    kube.create(SERVICES, {"metadata": {"name": "tiny"}, "spec": {"ports": ports}})
    kube.service({})
    eventually(lambda: kube.condition("Stalled").get("reason") == "NameTaken")
    assert "belongs to nobody" in kube.condition("Ready")["message"]
    found = kube.get(SERVICES, "tiny")
    assert found
    assert found["spec"]["ports"][0]["port"] == 80
    assert kube.get(DEPLOYMENTS, "tiny") is None
    eventually(lambda: "NameTaken" in kube.events())
    kube.delete(SERVICES, "tiny")
    eventually(lambda: kube.replicas() == 1, seconds=20)


def test_what_the_api_server_refuses_is_told(kube: Kube, operator: Operator) -> None:
    """The schema cannot know everything: a toleration that no pod may have."""
    toleration = {"key": "a", "operator": "Exists", "value": "no value allowed"}
    kube.service({"tolerations": [toleration]})
    eventually(lambda: kube.condition("Stalled").get("reason") == "ApplyRefused")
    assert "tolerations" in kube.condition("Stalled")["message"]
    eventually(lambda: "ApplyRefused" in kube.events())
    versions = kube.versions()
    time.sleep(1)
    assert kube.versions() == versions, "a refusal is written once"
    kube.merge(f"{LLMSERVICES}/tiny", {"spec": {"tolerations": []}})
    running(kube)
    ready(kube)
    assert kube.condition("Stalled")["status"] == "False"


# Failures of replicas


def test_a_bad_model_is_told_in_the_servers_words(
    kube: Kube, loads: FakeLoads, operator: Operator
) -> None:
    kube.service({"replicas": 1})
    eventually(lambda: kube.replicas() == 1)
    kube.roll(0, total=1)
    message = "/opt/model/config.json: no such file; check model.uri"
    loads.loads["10.0.0.1"] = {
        "state": "Failed",
        "blocks": None,
        "failure": {"reason": "ModelInvalid", "message": message, "retryable": False},
    }
    kube.pod("tiny-a", "10.0.0.1", ready=False)
    eventually(lambda: kube.condition("Stalled").get("status") == "True")
    for kind in ("Ready", "Stalled"):
        assert kube.condition(kind)["reason"] == "ModelInvalid"
        assert kube.condition(kind)["message"] == message
    assert kube.condition("Ready")["status"] == "False"
    eventually(lambda: kube.events().get("ModelInvalid") == message)


def test_an_image_that_cannot_be_pulled(kube: Kube, operator: Operator) -> None:
    kube.service({"replicas": 1})
    eventually(lambda: kube.replicas() == 1)
    kube.roll(0, total=1)
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such host"}}
    kube.pod("tiny-a", "10.0.0.1", ready=False, started=False, state=waiting)
    eventually(lambda: kube.condition("Stalled").get("reason") == "ImagePullBackOff")
    assert "no such host" in kube.condition("Ready")["message"]


# Autoscaling


def test_pressure_scales_up_and_its_end_down(
    kube: Kube, loads: FakeLoads, operator: Operator
) -> None:
    serving(kube, loads, {"autoscaling": QUICK})
    assert kube.replicas() == 1
    loads.say("10.0.0.1", 100, waiting=130)
    eventually(lambda: kube.replicas() == 3, what="three replicas for 230 blocks of 80 each")
    decision = eventually(lambda: kube.status()["autoscaling"].get("lastDecision"))
    assert (decision["from"], decision["to"], decision["limitedBy"]) == (1, 3, "None")
    assert decision["inputs"]["wanted"] == 3
    assert "100 active and 130 waiting blocks" in decision["reason"]
    assert decision["reason"] in eventually(lambda: kube.events().get("ScaledUp"))
    assert kube.condition("Ready")["status"] == "True", "one replica serves all the while"
    assert kube.condition("Reconciling")["status"] == "True"

    for index in (2, 3):
        loads.say(f"10.0.0.{index}", 0)
        kube.pod(f"tiny-{index}", f"10.0.0.{index}")
    kube.roll(3)
    eventually(lambda: kube.condition("Reconciling")["status"] == "False")
    loads.say("10.0.0.1", 0)
    eventually(lambda: kube.replicas() == 1, seconds=20, what="back to one")
    assert "ScaledDown" in kube.events()
    assert operator.count("octavo_operator_scale_decisions_total", direction="up") == 1
    assert operator.count("octavo_operator_scale_decisions_total", direction="down") == 2
    kube.roll(1)
    eventually(lambda: kube.status()["kvUtilizationPercent"] == 0)


def test_silent_replicas_hold_the_count(kube: Kube, loads: FakeLoads, operator: Operator) -> None:
    serving(kube, loads, {"autoscaling": {**QUICK, "down": {"windowSeconds": 0}}})
    loads.say("10.0.0.1", 100, waiting=40)
    eventually(lambda: kube.replicas() == 2)
    kube.pod("tiny-b", "10.0.0.2")
    kube.roll(2)
    loads.say("10.0.0.1", 0)
    eventually(lambda: kube.condition("MetricsAvailable").get("reason") == "LoadMissing")
    time.sleep(2)
    assert kube.replicas() == 2
    assert operator.count("octavo_operator_scrape_failures_total") > 0
    loads.say("10.0.0.2", 0)
    eventually(lambda: kube.replicas() == 1, what="with the data back, down it goes")


def test_at_the_maximum_a_condition_says_so(
    kube: Kube, loads: FakeLoads, operator: Operator
) -> None:
    serving(kube, loads, {"autoscaling": QUICK})
    loads.say("10.0.0.1", 100, waiting=900)
    eventually(lambda: kube.condition("ScalingLimited").get("status") == "True")
    assert "autoscaling.max = 3" in kube.condition("ScalingLimited")["message"]
    eventually(lambda: kube.replicas() == 3)


def test_a_restart_under_load_keeps_the_replicas(
    kube: Kube, loads: FakeLoads, operate: Callable[[], Operator]
) -> None:
    """O-55. Also when nobody answers the new process."""
    first = operate()
    serving(kube, loads, {"autoscaling": {**QUICK, "down": {"windowSeconds": 60}}})
    loads.say("10.0.0.1", 100, waiting=130)
    eventually(lambda: kube.replicas() == 3)
    first.stop()
    del loads.loads["10.0.0.1"]
    generation = (kube.get(DEPLOYMENTS, "tiny") or {})["metadata"]["generation"]
    second = operate()
    eventually(lambda: second.reconciles() >= 1)
    time.sleep(3)
    found = kube.get(DEPLOYMENTS, "tiny")
    assert found
    assert found["spec"]["replicas"] == 3
    assert found["metadata"]["generation"] == generation, "it was never anything else"


def test_the_count_is_written_down_before_it_is_acted_on(
    kube: Kube, loads: FakeLoads, operate: Callable[[], Operator]
) -> None:
    """A crash between the two loses no decision: the next process goes on from the status."""
    first = operate()
    serving(kube, loads, {"autoscaling": QUICK})
    first.stop()
    kube.merge(f"{LLMSERVICES}/tiny/status", {"status": {"autoscaling": {"desired": 3}}})
    loads.say("10.0.0.1", 80, waiting=150)
    operate()
    eventually(lambda: kube.replicas() == 3)


# Deletion


def test_a_deleted_service_is_forgotten_and_nothing_holds_it(
    kube: Kube, loads: FakeLoads, operator: Operator
) -> None:
    serving(kube, loads, {"autoscaling": QUICK})
    kube.delete(LLMSERVICES, "tiny", propagationPolicy="Background")
    assert kube.get(LLMSERVICES, "tiny") is None, "no finalizer: gone at once"
    eventually(lambda: operator.app.cache.size()["LLMService"] == 0)
    # The garbage collector would take the children now; the operator must not bring them back.
    for path in (PODS, DEPLOYMENTS, SERVICES):
        for child in kube.list(path):
            kube.delete(path, child["metadata"]["name"], gracePeriodSeconds="0")
    writes = operator.writes()
    time.sleep(1)
    assert kube.list(DEPLOYMENTS) == []
    assert operator.writes() == writes


def test_the_same_name_again_waits_for_the_former_children(kube: Kube, operator: Operator) -> None:
    kube.service({})
    running(kube)
    ready(kube)
    kube.delete(LLMSERVICES, "tiny", propagationPolicy="Background")
    made = kube.service({})
    eventually(lambda: kube.condition("Reconciling").get("reason") == "WaitingForDeletion")
    for path in (DEPLOYMENTS, SERVICES):
        kube.delete(path, "tiny")

    def adopted() -> bool:
        found = kube.get(DEPLOYMENTS, "tiny")
        owners = (found or {"metadata": {}})["metadata"].get("ownerReferences") or [{}]
        return owners[0].get("uid") == made["metadata"]["uid"]

    eventually(adopted, seconds=20)


def test_ending_is_quick(operate: Callable[[], Operator], kube: Kube, loads: FakeLoads) -> None:
    found = operate()
    serving(kube, loads, {"autoscaling": QUICK})
    assert found.stop() < 3
