"""What the cluster looks like, as small frozen views of raw objects; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo_operator.spec import LLMService

Raw = Mapping[str, Any]

IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True)
class PodProblem:
    """Why a pod does not get ready, as the kubelet or the scheduler says."""

    reason: str
    message: str
    # Whether waiting can heal it: a full cluster may get a node, a crashing server stays broken.
    stalled: bool


@dataclass(frozen=True)
class PodView:
    """One replica."""

    name: str
    created: str
    ip: str | None
    deleting: bool
    started: bool
    ready: bool
    problem: PodProblem | None


@dataclass(frozen=True)
class DeploymentView:
    """The counts of the Deployment and whether its controller has seen the latest spec."""

    settled: bool
    wanted: int
    replicas: int
    updated: int
    ready: int
    failure: str | None


@dataclass(frozen=True)
class Observed:
    """A service with everything that belongs to it."""

    service: LLMService
    status: Raw
    deployment: Raw | None
    endpoint: Raw | None
    pods: tuple[PodView, ...] = field(default=())

    def child(self, kind: str) -> Raw | None:
        """The live child of a kind."""
        return self.deployment if kind == "Deployment" else self.endpoint


def view_deployment(raw: Raw) -> DeploymentView:
    """The view of a Deployment."""
    status = raw.get("status") or {}
    return DeploymentView(
        settled=status.get("observedGeneration", 0) >= raw["metadata"].get("generation", 0),
        wanted=raw["spec"].get("replicas", 1),
        replicas=status.get("replicas", 0),
        updated=status.get("updatedReplicas", 0),
        ready=status.get("readyReplicas", 0),
        failure=_replica_failure(status),
    )


def view_pod(raw: Raw) -> PodView:
    """The view of a pod."""
    meta, status = raw["metadata"], raw.get("status") or {}
    container = next(
        (c for c in status.get("containerStatuses") or () if c["name"] == "server"), None
    )
    return PodView(
        name=meta["name"],
        created=meta.get("creationTimestamp") or "",
        ip=status.get("podIP"),
        deleting=bool(meta.get("deletionTimestamp"))
        or status.get("phase") in ("Succeeded", "Failed"),
        started=bool(container and container.get("started")),
        ready=_condition(status, "Ready").get("status") == "True",
        problem=_problem(status, container),
    )


def _condition(status: Raw, kind: str) -> Raw:
    return next((c for c in status.get("conditions") or () if c.get("type") == kind), {})


def _replica_failure(status: Raw) -> str | None:
    """What stops the ReplicaSet from making pods: a quota, an admission rule."""
    condition = _condition(status, "ReplicaFailure")
    return condition.get("message") if condition.get("status") == "True" else None


def _problem(status: Raw, container: Raw | None) -> PodProblem | None:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return PodProblem(
            "Unschedulable", scheduled.get("message") or "no node fits", stalled=False
        )
    if container is None or container.get("ready"):
        return None
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message") or ""
    if reason in IMAGE_REASONS:
        # The kubelet alternates between two of them; one name keeps the status still.
        text = f"image {container.get('image')} cannot be pulled: {message or reason}"
        return PodProblem("ImagePullBackOff", _without_backoff(text), stalled=True)
    if reason in CONFIG_REASONS:
        return PodProblem(reason, message or reason, stalled=True)
    return _crash(container)


def _crash(container: Raw) -> PodProblem | None:
    """A server that ended and was started again, also while it runs once more but is not ready."""
    ended = (container.get("state") or {}).get("terminated") or (
        container.get("lastState") or {}
    ).get("terminated")
    if not ended or not container.get("restartCount"):
        return None
    said = (ended.get("message") or "").strip() or ended.get("reason") or "no message"
    return PodProblem(
        "CrashLoopBackOff",
        f"the server ended with exit code {ended.get('exitCode')}: {said}",
        stalled=container["restartCount"] >= 2,
    )


def _without_backoff(message: str) -> str:
    """ErrImagePull and ImagePullBackOff carry the same cause behind different prefixes."""
    return message.replace("Back-off pulling image", "pulling image")
