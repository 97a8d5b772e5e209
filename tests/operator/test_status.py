"""Conditions: what is said in which situation, and that they hold still when nothing happens."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import llmservices
import pytest

from octavo_operator.autoscale import Failure, decide
from octavo_operator.autoscale.decide import History
from octavo_operator.autoscale.samples import Load, Sample
from octavo_operator.observed import Observed, view_pod
from octavo_operator.resources import build_deployment
from octavo_operator.spec import parse
from octavo_operator.status import Scaling, Trouble, build_status, publish_kv, record, timestamp

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
Json = dict[str, Any]


def observe(
    spec: Json | None = None,
    *,
    ready: int | None = None,
    replicas: int = 1,
    updated: int | None = None,
    pods: tuple[Json, ...] = (),
    status: Json | None = None,
    generation: int = 1,
    **deployment_status: Any,
) -> Observed:
    service = parse(llmservices.body(spec, generation=generation))
    deployment = None
    if ready is not None:
        manifest = build_deployment(service, replicas, "img")
        deployment = llmservices.running(manifest, ready, updated=updated, **deployment_status)
    return Observed(service, status or {}, deployment, None, tuple(view_pod(p) for p in pods))


def build(
    observed: Observed,
    scaling: Scaling | None = None,
    desired: int = 1,
    *,
    pending: bool = False,
    trouble: Trouble | None = None,
    now: datetime = NOW,
) -> Json:
    return build_status(
        observed, scaling or Scaling(), desired, pending=pending, trouble=trouble, now=now
    )


def conditions(status: Json) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def condition(status: Json, kind: str) -> Json:
    return next(c for c in status["conditions"] if c["type"] == kind)


WAITING_IMAGE = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image x"}}


def test_a_settled_service() -> None:
    status = build(observe(ready=1))
    assert conditions(status) == {
        "Ready": ("True", "Serving"),
        "Available": ("True", "ReplicasAnswer"),
        "Reconciling": ("False", "Settled"),
        "Stalled": ("False", "NothingBlocks"),
        "MetricsAvailable": ("Unknown", "NoReplicaStarted"),
    }
    assert (status["replicas"], status["readyReplicas"], status["desiredReplicas"]) == (1, 1, 1)
    assert status["replicasSummary"] == "1/1"
    assert status["endpoint"] == "http://tiny.ns.svc:8000"
    assert status["selector"] == (
        "app.kubernetes.io/instance=tiny,app.kubernetes.io/name=octavo-server"
    )
    assert "autoscaling" not in status
    assert "kvUtilizationPercent" not in status


def test_a_new_service() -> None:
    found = conditions(build(observe(), pending=True))
    assert found["Ready"] == ("False", "Progressing")
    assert found["Reconciling"] == ("True", "Applying")
    assert found["Stalled"][0] == "False"


def test_replicas_that_start() -> None:
    status = build(observe(ready=0, replicas=2), desired=2)
    assert conditions(status)["Ready"] == ("False", "Progressing")
    assert conditions(status)["Reconciling"] == ("True", "Scaling")
    assert condition(status, "Ready")["message"] == "0 of 2 replicas of this spec answer."


def test_nothing_changes_while_nothing_happens() -> None:
    first = build(observe(ready=1))
    later = build(observe(ready=1, status=first), now=NOW + timedelta(hours=1))
    assert later == first


def test_transition_times_move_only_on_flips() -> None:
    first = build(observe(ready=1))
    second = build(observe(ready=0, status=first), now=NOW + timedelta(minutes=1))
    assert condition(second, "Ready")["lastTransitionTime"] == "2026-05-01T12:01:00Z"
    assert condition(second, "Stalled")["lastTransitionTime"] == "2026-05-01T12:00:00Z"


def test_scaling_up_does_not_flip_ready() -> None:
    spec = {"autoscaling": {"max": 3}}
    first = build(observe(spec, ready=1))
    pending = build(observe(spec, ready=1, status=first), desired=3, pending=True)
    assert conditions(pending)["Ready"] == ("True", "Serving")
    assert conditions(pending)["Reconciling"] == ("True", "Applying")
    growing = build(observe(spec, ready=1, replicas=3, status=pending), desired=3)
    assert conditions(growing)["Ready"] == ("True", "Serving")
    assert conditions(growing)["Reconciling"] == ("True", "Scaling")
    assert growing["replicasSummary"] == "1/3"


def test_a_changed_spec_is_not_ready_before_its_own_replicas_are() -> None:
    first = build(observe(ready=1))
    changed = build(observe(ready=1, status=first, generation=2), pending=True)
    assert conditions(changed)["Ready"] == ("False", "Progressing")
    assert conditions(changed)["Available"][0] == "True"
    surging = build(observe(ready=1, replicas=1, updated=0, generation=2))
    assert conditions(surging)["Ready"][0] == "False"
    assert conditions(surging)["Reconciling"] == ("True", "RollingOut")
    assert condition(surging, "Ready")["observedGeneration"] == 2


def test_a_deployment_that_its_controller_has_not_seen_says_nothing() -> None:
    status = build(stale())
    assert conditions(status)["Ready"] == ("False", "Progressing")
    assert conditions(status)["Reconciling"] == ("True", "Applying")


def stale() -> Observed:
    found = observe(ready=1)
    assert found.deployment is not None
    raw = {**found.deployment, "metadata": {**found.deployment["metadata"], "generation": 2}}
    return replace(found, deployment=raw)


def test_scaled_to_zero_says_what_to_change() -> None:
    status = build(observe({"replicas": 0}, ready=0, replicas=0), desired=0)
    assert conditions(status)["Ready"] == ("False", "ScaledToZero")
    assert "set it to 1 or more" in condition(status, "Ready")["message"]
    assert conditions(status)["Reconciling"] == ("False", "Settled")


def test_paused() -> None:
    status = build(observe({"paused": True}, ready=0))
    assert conditions(status)["Reconciling"] == ("False", "Paused")


# Failures


def test_a_failed_model_stalls_with_the_servers_words() -> None:
    pod = llmservices.pod("a", ready=False)
    failure = Failure("ModelInvalid", "/opt/model/config.json is missing")
    status = build(observe(ready=0, pods=(pod,)), Scaling(failures={"a": failure}))
    for kind in ("Ready", "Stalled"):
        assert condition(status, kind)["reason"] == "ModelInvalid"
        assert condition(status, kind)["message"] == "/opt/model/config.json is missing"
    assert conditions(status)["Stalled"][0] == "True"
    assert conditions(status)["Reconciling"] == ("False", "Stalled")


CAUSES = [
    (
        {"state": WAITING_IMAGE},
        "ImagePullBackOff",
        "image img:1 cannot be pulled: pulling image x",
        True,
    ),
    (
        {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "no secret"}}},
        "CreateContainerConfigError",
        "no secret",
        True,
    ),
    (
        {
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "last": {"terminated": {"exitCode": 70, "message": "the engine died\n"}},
            "restarts": 3,
        },
        "CrashLoopBackOff",
        "exit code 70: the engine died",
        True,
    ),
    (
        {"last": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "restarts": 1},
        "CrashLoopBackOff",
        "exit code 137: OOMKilled",
        False,
    ),
    (
        {
            "ip": None,
            "conditions": (
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                },
            ),
        },
        "Unschedulable",
        "Insufficient nvidia.com/gpu",
        False,
    ),
]


@pytest.mark.parametrize(("given", "reason", "said", "stalled"), CAUSES)
def test_causes_of_pods(given: Json, reason: str, said: str, stalled: bool) -> None:
    pod = llmservices.pod("a", ready=False, started=False, **given)
    status = build(observe(ready=0, pods=(pod,)))
    assert conditions(status)["Ready"] == ("False", reason)
    assert said in condition(status, "Ready")["message"]
    assert conditions(status)["Stalled"][0] == ("True" if stalled else "False")
    assert conditions(status)["Reconciling"][0] == ("False" if stalled else "True")


def test_the_two_faces_of_a_failing_pull_read_the_same() -> None:
    texts = []
    for reason in ("ErrImagePull", "ImagePullBackOff"):
        state = {"waiting": {"reason": reason, "message": ""}}
        pod = llmservices.pod("a", ready=False, started=False, state=state)
        texts.append(conditions(build(observe(ready=0, pods=(pod,)))))
    assert texts[0] == texts[1]


def test_a_failing_extra_replica_does_not_stall_a_service_that_is_ready() -> None:
    spec = {"autoscaling": {"max": 3}}
    pod = llmservices.pod("b", ready=False, started=False, state=WAITING_IMAGE)
    status = build(observe(spec, ready=1, replicas=2, pods=(pod,)), desired=2)
    found = conditions(status)
    assert found["Ready"][0] == "True"
    assert found["Stalled"][0] == "False"
    assert found["Reconciling"] == ("True", "ImagePullBackOff")


def test_pods_that_leave_are_no_cause() -> None:
    pod = llmservices.pod(
        "a", ready=False, state=WAITING_IMAGE, deletionTimestamp="2026-01-01T00:00:00Z"
    )
    assert conditions(build(observe(ready=0, pods=(pod,))))["Stalled"][0] == "False"


def test_refused_pods() -> None:
    refusal = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}
    status = build(observe(ready=0, conditions=[refusal]))
    assert conditions(status)["Stalled"] == ("True", "PodsRefused")
    assert "exceeded quota: gpus" in condition(status, "Ready")["message"]


def test_messages_fit_the_schema() -> None:
    failure = Failure("ModelInvalid", "x" * 10_000)
    pod = llmservices.pod("a", ready=False)
    status = build(observe(ready=0, pods=(pod,)), Scaling(failures={"a": failure}))
    limits = llmservices.SCHEMA["properties"]["status"]["properties"]["conditions"]
    limit = limits["items"]["properties"]["message"]["maxLength"]
    assert len(condition(status, "Ready")["message"]) <= limit


# Autoscaling


def test_metrics_and_limits() -> None:
    spec = {"autoscaling": {"max": 3}}
    fine = conditions(build(observe(spec, ready=1), Scaling(metrics_available=True)))
    assert fine["MetricsAvailable"] == ("True", "AllAnswer")
    assert fine["ScalingLimited"] == ("False", "WithinBounds")
    poor = Scaling(metrics_available=False, at_maximum=True)
    found = conditions(build(observe(spec, ready=1), poor))
    assert found["MetricsAvailable"] == ("False", "LoadMissing")
    assert found["ScalingLimited"] == ("True", "AtMaximum")


def test_the_record_of_a_decision() -> None:
    policy = llmservices.service({"autoscaling": {"max": 3}}).spec.autoscaling
    assert policy
    sample = Sample("a", True, 0.0, Load("Ready", 101, 100, 60))
    decision = decide(policy, [sample], History(1), 0.0)
    written = record(decision, 1, NOW)
    assert (written["from"], written["to"], written["limitedBy"]) == (1, 2, "None")
    assert written["time"] == "2026-05-01T12:00:00Z"
    assert written["inputs"] == {
        "activeBlocks": 100, "waitingBlocks": 60, "usableBlocksPerPod": 80.8, "wanted": 2,
        "freshPods": 1, "expectedPods": 1, "startingPods": 0,
    }  # fmt: skip
    schema = llmservices.SCHEMA["properties"]["status"]["properties"]["autoscaling"]
    fields = schema["properties"]["lastDecision"]["properties"]
    assert set(written) == set(fields)
    assert set(written["inputs"]) == set(fields["inputs"]["properties"])


@pytest.mark.parametrize(
    ("published", "measured", "since", "result"),
    [
        (None, None, 99, None),
        (None, 40, 0, 40),
        (40, None, 99, 40),
        (40, 44, 99, 40),
        (40, 45, 9, 40),
        (40, 45, 10, 45),
        (40, 35, 10, 35),
        (3, 0, 0, 0),
        (0, 3, 99, 0),
    ],
)
def test_utilization_is_published_in_steps(
    published: int | None, measured: int | None, since: float, result: int | None
) -> None:
    assert publish_kv(published, measured, since) == result


def test_timestamps_are_utc_seconds() -> None:
    assert timestamp(NOW) == "2026-05-01T12:00:00Z"


def test_every_key_of_the_status_is_in_the_schema() -> None:
    scaling = Scaling(desired=1, last_decision={"to": 1}, kv_percent=5, metrics_available=True)
    status = build(observe({"autoscaling": {"max": 3}}, ready=1), scaling)
    assert set(status) == set(llmservices.SCHEMA["properties"]["status"]["properties"])
