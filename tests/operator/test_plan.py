"""The plan: empty when nothing is to be done, and with a reason when something is."""

import copy
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import llmservices

from octavo_operator.observed import Observed
from octavo_operator.plan import Plan, make_plan
from octavo_operator.resources import build_children
from octavo_operator.spec import parse
from octavo_operator.status import Scaling

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
IMAGE = "img:1"
Json = dict[str, Any]


def plan(observed: Observed, scaling: Scaling | None = None, refusal: str | None = None) -> Plan:
    return make_plan(observed, scaling or Scaling(), IMAGE, NOW, refusal)


def observed(spec: Json | None = None, replicas: int = 1) -> Observed:
    """Everything in place and ready, and the status still to be written."""
    service = parse(llmservices.body(spec))
    endpoint, deployment = build_children(service, replicas, IMAGE)
    return Observed(
        service, {}, llmservices.running(deployment, replicas), llmservices.live(endpoint)
    )


def settled(spec: Json | None = None, scaling: Scaling | None = None, **given: Any) -> Observed:
    found = observed(spec, **given)
    status = plan(found, scaling).status
    assert status
    return replace(found, status=status)


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan(settled()) == Plan(None, (), ())


def test_a_new_service_gets_its_children() -> None:
    found = plan(Observed(llmservices.service(), {}, None, None))
    assert [a.manifest["kind"] for a in found.applies] == ["Service", "Deployment"]
    assert {a.reason for a in found.applies} == {"it does not exist"}
    assert found.status


def test_drift_is_named_and_healed() -> None:
    found = settled()
    drifted = copy.deepcopy(found.deployment)
    assert drifted
    drifted["spec"]["replicas"] = 5
    (apply,) = plan(replace(found, deployment=drifted)).applies
    assert apply.reason == "spec.replicas differs"
    assert apply.manifest["spec"]["replicas"] == 1


def test_a_removed_field_of_the_spec_is_noticed() -> None:
    """It leaves the manifest, so only the hash of what was applied can tell."""
    found = settled({"nodeSelector": {"zone": "a"}})
    (apply,) = plan(replace(found, service=llmservices.service())).applies
    assert apply.reason == "metadata.annotations.octavo.dev/applied differs"


def test_paused_leaves_children_alone_and_keeps_the_status_fresh() -> None:
    found = plan(Observed(llmservices.service({"paused": True}), {}, None, None))
    assert found.applies == ()
    assert found.status


def test_fixed_replicas() -> None:
    for spec, count in ((None, 1), ({"replicas": 0}, 0), ({"replicas": 4}, 4)):
        found = plan(Observed(llmservices.service(spec), {}, None, None))
        assert found.applies[1].manifest["spec"]["replicas"] == count
        assert found.status
        assert found.status["desiredReplicas"] == count


def test_the_scaler_decides_within_the_bounds() -> None:
    service = llmservices.service({"autoscaling": {"min": 2, "max": 4}})
    for wanted, count in ((None, 2), (1, 2), (3, 3), (9, 4)):
        found = plan(Observed(service, {}, None, None), Scaling(desired=wanted))
        assert found.applies[1].manifest["spec"]["replicas"] == count
        assert found.status
        assert found.status["autoscaling"]["desired"] == count


DECISION = {"time": "2026-05-01T12:00:00Z", "from": 1, "to": 3, "reason": "2 x the load"}


def test_a_scale_change_makes_one_event() -> None:
    spec = {"autoscaling": {"max": 3}}
    before = settled(spec, Scaling(desired=1))
    scaling = Scaling(desired=3, last_decision=DECISION)
    found = plan(before, scaling)
    (event,) = found.events
    assert (event.kind, event.reason) == ("Normal", "ScaledUp")
    assert event.note == "1 -> 3 replicas: 2 x the load"
    assert found.status
    assert plan(replace(before, status=found.status), scaling).events == ()


def test_scaling_down_is_called_so() -> None:
    spec = {"autoscaling": {"max": 3}}
    decision = {**DECISION, "from": 3, "to": 2}
    found = plan(settled(spec), Scaling(desired=2, last_decision=decision))
    assert [e.reason for e in found.events] == ["ScaledDown"]


def test_an_operator_that_restarts_repeats_no_event() -> None:
    spec = {"autoscaling": {"max": 3}}
    scaling = Scaling(desired=3, last_decision=DECISION)
    assert plan(settled(spec, scaling, replicas=3), scaling).events == ()


def test_a_refusal_is_shown_once_and_stays() -> None:
    new = Observed(llmservices.service(), {}, None, None)
    found = plan(new, refusal="spec.x: forbidden")
    assert found.status
    stalled = next(c for c in found.status["conditions"] if c["type"] == "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "ApplyRefused")
    assert "spec.x: forbidden" in stalled["message"]
    assert [(e.kind, e.reason) for e in found.events] == [("Warning", "ApplyRefused")]
    again = plan(replace(new, status=found.status), refusal="spec.x: forbidden")
    assert again.status is None
    assert again.events == ()
    assert len(again.applies) == 2


def foreign(owner: Json | None) -> Observed:
    found = observed()
    assert found.deployment
    deployment = copy.deepcopy(dict(found.deployment))
    deployment["metadata"] |= {"ownerReferences": [owner] if owner else [], "labels": {}}
    return replace(found, deployment=deployment)


def test_an_object_of_somebody_else_is_left_alone() -> None:
    owner = {"kind": "Rollout", "name": "x", "uid": "other", "controller": True}
    for found, holder in ((foreign(owner), "Rollout x"), (foreign(None), "nobody")):
        made = plan(found)
        assert made.applies == ()
        assert made.retry_after
        assert made.status
        assert made.status["readyReplicas"] == 0
        stalled = next(c for c in made.status["conditions"] if c["type"] == "Stalled")
        assert (stalled["status"], stalled["reason"]) == ("True", "NameTaken")
        assert f"belongs to {holder}" in stalled["message"]
        assert "rename" in stalled["message"]


def test_an_orphan_of_ours_is_adopted() -> None:
    """After `kubectl delete --cascade=orphan` and a new service of the same name."""
    found = observed()
    assert found.deployment
    deployment = copy.deepcopy(dict(found.deployment))
    del deployment["metadata"]["ownerReferences"]
    (apply,) = plan(replace(found, deployment=deployment)).applies
    assert apply.reason == "metadata.ownerReferences differs"


def test_children_of_a_deleted_service_of_the_same_name_are_waited_for() -> None:
    owner = {"kind": "LLMService", "name": "tiny", "uid": "former", "controller": True}
    found = plan(foreign(owner))
    assert found.applies == ()
    assert found.retry_after
    assert found.status
    kinds = {c["type"]: (c["status"], c["reason"]) for c in found.status["conditions"]}
    assert kinds["Stalled"][0] == "False"
    assert kinds["Reconciling"] == ("True", "WaitingForDeletion")
