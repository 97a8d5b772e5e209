"""The memory of the cluster never goes back in time and finds the pods of a service."""

from typing import Any

import llmservices

from octavo_operator.cache import Cache, owner_of

KEY = ("ns", "tiny")


def versioned(version: int, **meta: Any) -> dict[str, Any]:
    return llmservices.body(resourceVersion=str(version), **meta)


def test_services_are_found_by_uid_and_by_name() -> None:
    cache = Cache()
    cache.put("LLMService", versioned(1))
    assert cache.service("uid-tiny") == cache.get("LLMService", KEY)
    assert cache.service_uid(KEY) == "uid-tiny"
    assert cache.service_uid(("ns", "other")) is None
    assert cache.service_uid(None) is None
    cache.remove("LLMService", versioned(2))
    assert cache.service("uid-tiny") is None
    assert cache.size() == {"LLMService": 0}


def test_an_older_version_never_replaces_a_newer_one() -> None:
    """An event of a watch may come after the answer to our own later write."""
    cache = Cache()
    cache.put("LLMService", versioned(10, generation=2))
    cache.put("LLMService", versioned(9, generation=1))
    found = cache.service("uid-tiny")
    assert found
    assert found["metadata"]["generation"] == 2
    cache.put("LLMService", versioned(11, generation=3))
    found = cache.service("uid-tiny")
    assert found
    assert found["metadata"]["generation"] == 3


def test_a_new_object_of_the_same_name_replaces_the_former() -> None:
    cache = Cache()
    cache.put("LLMService", versioned(10, uid="former"))
    cache.put("LLMService", versioned(3, uid="latter"))
    assert cache.service("former") is None
    assert cache.service("latter")
    cache.remove("LLMService", versioned(10, uid="former"))
    assert cache.service("latter"), "the end of the former is not the end of the latter"


def test_pods_are_found_by_their_service() -> None:
    cache = Cache()
    for name, service in (("b", "tiny"), ("a", "tiny"), ("c", "other")):
        cache.put("Pod", llmservices.pod(name, of=service))
    assert [pod["metadata"]["name"] for pod in cache.pods(KEY)] == ["a", "b"]
    cache.remove("Pod", llmservices.pod("a"))
    assert [pod["metadata"]["name"] for pod in cache.pods(KEY)] == ["b"]
    cache.forget("Pod", ("ns", "b"))
    assert cache.pods(KEY) == []


def test_a_pod_that_changes_its_label_leaves_the_service() -> None:
    cache = Cache()
    cache.put("Pod", llmservices.pod("a"))
    moved = llmservices.pod("a", of="other", resourceVersion="2")
    cache.put("Pod", moved)
    assert cache.pods(KEY) == []
    assert len(cache.pods(("ns", "other"))) == 1


def test_what_managers_own_is_not_remembered() -> None:
    cache = Cache()
    cache.put("LLMService", versioned(1, managedFields=[{"manager": "x"}]))
    found = cache.service("uid-tiny")
    assert found
    assert "managedFields" not in found["metadata"]


def test_owner_of_unlabelled_is_nobody() -> None:
    assert owner_of(llmservices.pod("a")) == KEY
    assert owner_of(llmservices.pod("a", labels={})) is None
    assert owner_of(llmservices.pod("a", labels=None)) is None
