"""(service, what is observed, what the scaler wants) -> what to write, with reasons; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from octavo_operator.drift import first_difference
from octavo_operator.observed import Observed, Raw
from octavo_operator.resources import Manifest, build_children, labels
from octavo_operator.status import Scaling, Trouble, build_status

# How soon to look again at a name that another owner holds: no event tells when it is given up.
NAME_TAKEN_RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Apply:
    """A child to apply, and which field made it necessary."""

    manifest: Manifest
    reason: str


@dataclass(frozen=True)
class Event:
    """An Event on the service."""

    kind: str
    reason: str
    note: str


@dataclass(frozen=True)
class Plan:
    """What to write; empty when the cluster is as it should be."""

    status: dict[str, Any] | None
    applies: tuple[Apply, ...]
    events: tuple[Event, ...]
    retry_after: float | None = None


def make_plan(
    observed: Observed,
    scaling: Scaling,
    default_image: str,
    now: datetime,
    refusal: str | None = None,
) -> Plan:
    """Decide every write. `refusal` is the API server's answer to the last try to apply, if bad."""
    service = observed.service
    desired = _desired(observed, scaling)
    wanted = [] if service.spec.paused else build_children(service, desired, default_image)
    taken = _taken(observed)
    applies = () if taken else tuple(_drifted(observed, wanted))
    trouble = taken
    if taken:
        observed = replace(observed, deployment=None, endpoint=None)
    elif refusal and applies:
        trouble = Trouble("ApplyRefused", f"The API server refuses a child: {refusal}", True)
    pending = bool(applies or taken)
    status = build_status(observed, scaling, desired, pending=pending, trouble=trouble, now=now)
    return Plan(
        status=None if status == observed.status else status,
        applies=applies,
        events=tuple(_events(observed.status, status)),
        retry_after=NAME_TAKEN_RETRY_SECONDS if taken else None,
    )


def _desired(observed: Observed, scaling: Scaling) -> int:
    spec = observed.service.spec
    if not spec.autoscaling:
        return spec.fixed_replicas
    wanted = spec.autoscaling.min if scaling.desired is None else scaling.desired
    return min(max(wanted, spec.autoscaling.min), spec.autoscaling.max)


def _drifted(observed: Observed, wanted: list[Manifest]) -> list[Apply]:
    applies = []
    for manifest in wanted:
        live = observed.child(manifest["kind"])
        if live is None:
            applies.append(Apply(manifest, "it does not exist"))
        elif path := first_difference(manifest, live):
            applies.append(Apply(manifest, f"{path.lstrip('.')} differs"))
    return applies


def _taken(observed: Observed) -> Trouble | None:
    """An object of the same name that is not ours is left alone, whoever it belongs to."""
    for live in (observed.deployment, observed.endpoint):
        if live is None:
            continue
        owner = _controller(live)
        if owner.get("uid") == observed.service.uid or (not owner and _orphan(observed, live)):
            continue
        name = f"{live.get('kind', 'object')} {live['metadata']['name']}"
        if owner.get("kind") == "LLMService":
            return Trouble(
                "WaitingForDeletion", f"{name} of a deleted service is still there.", False
            )
        holder = f"{owner.get('kind')} {owner.get('name')}" if owner else "nobody"
        message = (
            f"{name} exists already and belongs to {holder}: delete it or rename this service."
        )
        return Trouble("NameTaken", message, True)
    return None


def _orphan(observed: Observed, live: Raw) -> bool:
    """Made by this operator for a service of this name and then left without an owner: adopted."""
    return labels(observed.service).items() <= (live["metadata"].get("labels") or {}).items()


def _controller(live: Raw) -> Mapping[str, Any]:
    for reference in live["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            return dict(reference)
    return {}


def _events(before: Raw, after: Mapping[str, Any]) -> list[Event]:
    events = []
    decision = (after.get("autoscaling") or {}).get("lastDecision")
    if decision and decision != (before.get("autoscaling") or {}).get("lastDecision"):
        up = decision["to"] > decision["from"]
        note = f"{decision['from']} -> {decision['to']} replicas: {decision['reason']}"
        events.append(Event("Normal", "ScaledUp" if up else "ScaledDown", note))
    stalled = _stalled(after)
    if stalled and stalled.get("reason") != _stalled(before).get("reason"):
        events.append(Event("Warning", stalled["reason"], stalled["message"]))
    return events


def _stalled(status: Raw) -> Mapping[str, Any]:
    for condition in status.get("conditions") or ():
        if condition["type"] == "Stalled" and condition["status"] == "True":
            return dict(condition)
    return {}
