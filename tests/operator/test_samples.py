"""The load document: what is read, and what is refused with a sentence."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_operator.autoscale import Failure, Load, LoadError, Sample, parse_load

READY = {
    "schema": 1,
    "state": "Ready",
    "blocks": {"total": 100, "active": 60, "shared": 5, "cached": 10, "free": 30},
    "waiting_blocks": 20,
    "kv_utilization": 0.6,
}


def test_ready() -> None:
    assert parse_load(READY) == Load("Ready", 100, 60, 20)


def test_starting_has_no_blocks() -> None:
    assert parse_load({"state": "Starting", "blocks": None}) == Load("Starting")


def test_failure_is_kept_when_it_is_final() -> None:
    failure = {"reason": "ModelInvalid", "message": "a.json is missing", "retryable": False}
    found = parse_load({"state": "Failed", "blocks": None, "failure": failure}).failure
    assert found == Failure("ModelInvalid", "a.json is missing")


def test_a_failure_that_will_be_retried_is_none() -> None:
    failure = {"reason": "EngineDied", "message": "", "retryable": True}
    assert parse_load({"state": "Failed", "failure": failure}).failure is None


@pytest.mark.parametrize("reason", ["", "no spaces allowed", "x" * 300, 7, None])
def test_a_reason_that_no_condition_can_hold_is_replaced(reason: Any) -> None:
    found = parse_load({"state": "Failed", "failure": {"reason": reason, "message": "m"}}).failure
    assert found == Failure("ModelFailed", "m")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "not an object"),
        (None, "not an object"),
        ({}, "state is None"),
        ({"state": "Happy"}, "state is 'Happy'"),
        ({"state": "Ready", "blocks": 7}, "blocks"),
        ({"state": "Ready", "blocks": {"total": "many"}}, "total is 'many'"),
        ({"state": "Ready", "blocks": {"active": -1}}, "active is -1"),
        ({"state": "Ready", "blocks": {"active": True}}, "active is True"),
        ({"state": "Ready", "waiting_blocks": float("nan")}, "waiting_blocks is nan"),
    ],
)
def test_nonsense_is_refused_by_name(document: Any, said: str) -> None:
    with pytest.raises(LoadError, match=said):
        parse_load(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*READY, "failure", "progress"]), JSON) | JSON)
def test_any_document_is_read_or_refused(document: Any) -> None:
    try:
        load = parse_load(document)
    except LoadError:
        return
    assert load.total_blocks >= 0
    assert load.waiting_blocks >= 0


def test_samples_age() -> None:
    sample = Sample("p", True, 100.0, Load("Ready", 1))
    assert sample.fresh(109.0)
    assert sample.fresh(111.0) is None
    assert Sample("p", True).fresh(0.0) is None
