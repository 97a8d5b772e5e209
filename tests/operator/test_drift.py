"""A drifted field is found; what the API server adds or rewrites is not a drift."""

import copy
from typing import Any

import llmservices
import pytest

from octavo_operator.drift import first_difference
from octavo_operator.resources import build_deployment

MANIFEST = build_deployment(
    llmservices.service(
        {
            "resources": {"requests": {"cpu": "0.5", "memory": "1024Mi"}, "limits": {"cpu": 2}},
            "engine": {"device": "cpu", "env": [{"name": "A", "value": "1"}]},
        }
    ),
    2,
    "img",
)


def live() -> dict[str, Any]:
    return copy.deepcopy(MANIFEST)


def server(found: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = found["spec"]["template"]["spec"]["containers"][0]
    return container


def test_equal_objects_do_not_differ() -> None:
    assert first_difference(MANIFEST, live()) is None


def test_defaults_and_additions_of_others_are_no_drift() -> None:
    found = live()
    found["spec"]["progressDeadlineSeconds"] = 600
    found["metadata"]["annotations"]["someone/else"] = "x"
    pod = found["spec"]["template"]["spec"]
    pod["containers"].insert(0, {"name": "injected", "image": "mesh"})
    server(found)
    assert first_difference(MANIFEST, found) is None


def test_rewritten_quantities_are_no_drift() -> None:
    found = live()
    server(found)["resources"] = {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"cpu": "2"},
    }
    assert first_difference(MANIFEST, found) is None


def test_another_quantity_is_a_drift() -> None:
    found = live()
    server(found)["resources"]["requests"]["memory"] = "1000Mi"
    difference = first_difference(MANIFEST, found)
    assert difference
    assert difference.endswith("resources.requests.memory")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicas"), 7),
        (("spec", "strategy", "rollingUpdate", "maxUnavailable"), 1),
        (("metadata", "ownerReferences"), []),
        (("metadata", "labels"), {}),
        (("metadata", "annotations", "octavo.dev/applied"), "other"),
        (("spec", "template", "spec", "automountServiceAccountToken"), True),
    ],
)
def test_a_changed_field_is_named(path: tuple[str, ...], value: Any) -> None:
    found = live()
    where = found
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    difference = first_difference(MANIFEST, found)
    assert difference
    assert difference.startswith("." + path[0])


def test_items_are_found_by_name_whatever_their_order() -> None:
    found = live()
    server(found)["env"].reverse()
    server(found)["env"].append({"name": "INJECTED", "value": "x"})
    assert first_difference(MANIFEST, found) is None
    server(found)["env"] = [v for v in server(found)["env"] if v["name"] != "A"]
    assert first_difference(MANIFEST, found) is not None


def test_lists_without_keys_are_compared_whole() -> None:
    found = live()
    server(found)["args"].append("--more")
    assert first_difference(MANIFEST, found) is not None


def test_an_empty_field_that_the_server_left_out_is_no_drift() -> None:
    assert first_difference({"a": {}, "b": []}, {}) is None
    assert first_difference({"a": {"x": 1}}, {}) == ".a"
