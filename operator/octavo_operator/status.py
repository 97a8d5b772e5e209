"""The status of an LLMService from what is observed; pure.

Conditions follow kstatus: Reconciling is True while work is under way, Stalled is True when it
cannot go on without somebody's help, both are False in a settled service. Ready says that the
present spec is served by the replicas that it asks for (by autoscaling.min of them, so a scale-up
does not flip it); Available says that at least one replica answers, of this spec or an earlier one.
A condition's lastTransitionTime changes only when its status flips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from octavo_operator import resources
from octavo_operator.autoscale import Decision, Failure
from octavo_operator.observed import DeploymentView, Observed, PodView, view_deployment
from octavo_operator.spec import LLMService, camel

MESSAGE_LIMIT = 2048
KV_STEP = 5
KV_SECONDS = 10.0


@dataclass(frozen=True)
class Scaling:
    """What the scaler knows of one service; plain data, made anew whenever something changed."""

    desired: int | None = None
    # The last change as it stands or will stand in the status, in the schema's own spelling.
    last_decision: Mapping[str, Any] | None = None
    kv_percent: int | None = None
    at_maximum: bool = False
    # None until there is a replica that should answer.
    metrics_available: bool | None = None
    failures: Mapping[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class Trouble:
    """Why the present spec is not served, and whether somebody has to help."""

    reason: str
    message: str
    stalled: bool


def build_status(
    observed: Observed,
    scaling: Scaling,
    desired: int,
    *,
    pending: bool,
    trouble: Trouble | None,
    now: datetime,
) -> dict[str, Any]:
    """The whole status; `pending` says that children are about to be changed."""
    service = observed.service
    view = view_deployment(observed.deployment) if observed.deployment else None
    trouble = trouble or _find_trouble(observed, view, scaling)
    status: dict[str, Any] = {
        "observedGeneration": service.generation,
        "replicas": view.replicas if view else 0,
        "readyReplicas": view.ready if view else 0,
        "desiredReplicas": desired,
        "replicasSummary": f"{view.ready if view else 0}/{desired}",
        "selector": resources.selector(service),
        "endpoint": resources.endpoint(service),
        "conditions": _conditions(observed, view, scaling, desired, pending, trouble, now),
    }
    if scaling.kv_percent is not None:
        status["kvUtilizationPercent"] = scaling.kv_percent
    if service.spec.autoscaling:
        status["autoscaling"] = {"desired": desired}
        if scaling.last_decision:
            status["autoscaling"]["lastDecision"] = dict(scaling.last_decision)
    return status


def record(decision: Decision, before: int, now: datetime) -> dict[str, Any]:
    """A decision as it is written to status.autoscaling.lastDecision."""
    inputs = {camel(key): value for key, value in vars(decision.inputs).items()}
    inputs["usableBlocksPerPod"] = round(decision.inputs.usable_blocks_per_pod, 2)
    return {
        "time": timestamp(now),
        "from": before,
        "to": decision.desired,
        "reason": decision.why[:512],
        "limitedBy": decision.limited_by,
        "inputs": inputs,
    }


def publish_kv(published: int | None, measured: int | None, seconds_since: float) -> int | None:
    """The KV percentage to publish: steps of 5 points every 10 s, and always the return to 0.

    Without a measurement the published value stays, so that a blink of the network writes nothing.
    """
    if measured is None or measured == published:
        return published
    if published is None or measured == 0:
        return measured
    moved = abs(measured - published) >= KV_STEP and seconds_since >= KV_SECONDS
    return measured if moved else published


def timestamp(now: datetime) -> str:
    """RFC 3339 in UTC, in seconds, as the API server writes it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _find_trouble(
    observed: Observed, view: DeploymentView | None, scaling: Scaling
) -> Trouble | None:
    """The first cause that applies, most telling first."""
    newest = sorted(
        (pod for pod in observed.pods if not pod.deleting and not pod.ready),
        key=lambda pod: (pod.created, pod.name),
        reverse=True,
    )
    return (
        _failed_model(newest, scaling.failures)
        or _pod_problem(newest, stalled=True)
        or _no_pods(view)
        or _pod_problem(newest, stalled=False)
    )


def _failed_model(pods: list[PodView], failures: Mapping[str, Failure]) -> Trouble | None:
    for pod in pods:
        if failure := failures.get(pod.name):
            return Trouble(failure.reason, failure.message, stalled=True)
    return None


def _pod_problem(pods: list[PodView], *, stalled: bool) -> Trouble | None:
    for pod in pods:
        if pod.problem and pod.problem.stalled is stalled:
            return Trouble(pod.problem.reason, f"pod {pod.name}: {pod.problem.message}", stalled)
    return None


def _no_pods(view: DeploymentView | None) -> Trouble | None:
    if view and view.failure:
        return Trouble("PodsRefused", f"pods cannot be created: {view.failure}", stalled=True)
    return None


def _conditions(
    observed: Observed,
    view: DeploymentView | None,
    scaling: Scaling,
    desired: int,
    pending: bool,
    trouble: Trouble | None,
    now: datetime,
) -> list[dict[str, Any]]:
    service = observed.service
    ready = _ready(observed, view, desired, pending, trouble)
    stalled = bool(trouble and trouble.stalled and ready[0] != "True")
    conditions = [
        ("Ready", *ready),
        ("Available", *_available(view)),
        ("Reconciling", *_reconciling(service, view, desired, pending, stalled, trouble)),
        ("Stalled", *_stalled(stalled, trouble)),
        ("MetricsAvailable", *_metrics(scaling)),
    ]
    if service.spec.autoscaling:
        conditions.append(("ScalingLimited", *_limited(service, scaling)))
    before = {c["type"]: c for c in observed.status.get("conditions") or ()}
    return [
        _condition(kind, verdict, reason, message, service.generation, before.get(kind), now)
        for kind, verdict, reason, message in conditions
    ]


def _condition(
    kind: str,
    verdict: str,
    reason: str,
    message: str,
    generation: int,
    before: Mapping[str, Any] | None,
    now: datetime,
) -> dict[str, Any]:
    flipped = before is None or before["status"] != verdict
    return {
        "type": kind,
        "status": verdict,
        "observedGeneration": generation,
        "lastTransitionTime": timestamp(now)
        if flipped or before is None
        else before["lastTransitionTime"],
        "reason": reason,
        "message": message[:MESSAGE_LIMIT],
    }


Verdict = tuple[str, str, str]


def _ready(
    observed: Observed,
    view: DeploymentView | None,
    desired: int,
    pending: bool,
    trouble: Trouble | None,
) -> Verdict:
    service = observed.service
    if view is None or pending or not view.settled:
        if view and view.ready and (carried := _carried(observed)):
            return carried
        if trouble:
            return "False", trouble.reason, trouble.message
        return "False", "Progressing", "The replicas are being set up."
    if desired == 0:
        return "False", "ScaledToZero", "spec.replicas is 0: set it to 1 or more to serve."
    floor = service.spec.autoscaling.min if service.spec.autoscaling else desired
    # Pods of an earlier spec may be among the ready ones; what is left over is surely of this one.
    current = max(0, view.ready - max(0, view.replicas - view.updated))
    if current >= floor:
        return "True", "Serving", f"The model is served at {resources.endpoint(service)}."
    if trouble:
        return "False", trouble.reason, trouble.message
    return "False", "Progressing", f"{current} of {floor} replicas of this spec answer."


def _carried(observed: Observed) -> Verdict | None:
    """Ready as it was for this same spec, while the Deployment's own status lags behind.

    A scale-up changes the Deployment but not what is served; after a change of the spec, the old
    verdict says nothing.
    """
    for condition in observed.status.get("conditions") or ():
        same_spec = condition.get("observedGeneration") == observed.service.generation
        if condition["type"] == "Ready" and condition["status"] == "True" and same_spec:
            return condition["status"], condition["reason"], condition["message"]
    return None


def _available(view: DeploymentView | None) -> Verdict:
    if view and view.ready:
        return "True", "ReplicasAnswer", "At least one replica answers."
    return "False", "NoReplicaAnswers", "No replica answers."


def _reconciling(
    service: LLMService,
    view: DeploymentView | None,
    desired: int,
    pending: bool,
    stalled: bool,
    trouble: Trouble | None,
) -> Verdict:
    if stalled:
        return "False", "Stalled", "See the condition Stalled."
    if service.spec.paused:
        return "False", "Paused", "spec.paused is true: child objects are left as they are."
    if view is None or pending or not view.settled:
        verdict = "True", "Applying", "Child objects are being applied."
    elif view.updated < view.replicas or view.updated < view.wanted:
        verdict = "True", "RollingOut", "Replicas of this spec replace earlier ones."
    elif view.ready != desired or view.replicas != desired:
        verdict = "True", "Scaling", f"The number of ready replicas moves to {desired}."
    else:
        return "False", "Settled", "The cluster is as the spec says."
    return ("True", trouble.reason, trouble.message) if trouble else verdict


def _stalled(stalled: bool, trouble: Trouble | None) -> Verdict:
    if stalled and trouble:
        return "True", trouble.reason, trouble.message
    return "False", "NothingBlocks", "Nothing needs help from outside."


def _metrics(scaling: Scaling) -> Verdict:
    if scaling.metrics_available is None:
        return "Unknown", "NoReplicaStarted", "No replica has started yet."
    if scaling.metrics_available:
        return "True", "AllAnswer", "Every started replica answers with its load."
    return (
        "False",
        "LoadMissing",
        "A started replica does not answer with its load: the replica count will not fall.",
    )


def _limited(service: LLMService, scaling: Scaling) -> Verdict:
    autoscaling = service.spec.autoscaling
    if scaling.at_maximum and autoscaling:
        return (
            "True",
            "AtMaximum",
            f"The load asks for more than autoscaling.max = {autoscaling.max}: raise it if the "
            "cluster has room.",
        )
    return "False", "WithinBounds", "The load asks for a count within the bounds."
