"""The API server itself takes the CRD, fills in its defaults and refuses what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from apiserver_bench import CRDS, LLMSERVICES, ROOT, ApiError, Kube
from llmservices import SCHEMA, with_defaults

EXAMPLES = ROOT / "docs" / "examples"
CRD = yaml.safe_load((ROOT / "crds" / "llmservice.yaml").read_text())
Json = dict[str, Any]


def refusal(kube: Kube, body: Json) -> str:
    with pytest.raises(ApiError) as caught:
        kube.create(LLMSERVICES, body)
    assert caught.value.status in (400, 422)
    return caught.value.message


def manifest(**spec: Any) -> Json:
    return {
        "apiVersion": "octavo.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"uri": "hf://org/name"}, **spec},
    }


def test_the_crd_is_structural_and_established(cluster: Kube) -> None:
    found = cluster.get(CRDS, CRD["metadata"]["name"])
    assert found
    conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
    assert conditions["Established"] == "True"
    assert conditions["NamesAccepted"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"


def test_what_is_not_served_yet_is_not_there(kube: Kube) -> None:
    """Such a path is answered in plain text: a group's, in the moment after its first CRD."""
    assert kube.get("/apis/nobody.octavo.dev", "v1") is None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_are_accepted(kube: Kube, path: Path) -> None:
    kube.create(LLMSERVICES, yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted((EXAMPLES / "bad").glob("*.yaml")), ids=lambda p: p.stem)
def test_wrong_manifests_are_refused_with_the_sentence_they_expect(kube: Kube, path: Path) -> None:
    text = path.read_text()
    expected = text.splitlines()[0].removeprefix("# Expected: ")
    assert expected in refusal(kube, yaml.safe_load(text))


def test_defaults_are_filled_in(kube: Kube) -> None:
    spec = kube.create(LLMSERVICES, manifest(autoscaling={"max": 3}))["spec"]
    engine = {"device": "auto", "dtype": "auto", "blockSize": 16, "extraArgs": [], "env": []}
    assert spec["engine"] == engine
    assert spec["autoscaling"] == {
        "min": 1, "max": 3, "targets": {"kvUtilization": 0.8}, "tolerance": 0.1,
        "intervalSeconds": 2,
        "up": {"windowSeconds": 0, "maxPods": 4, "periodSeconds": 15},
        "down": {"windowSeconds": 300, "maxPods": 1, "periodSeconds": 60},
    }  # fmt: skip
    assert spec["terminationGracePeriodSeconds"] == 120
    assert spec["paused"] is False
    assert (spec["resources"], spec["nodeSelector"], spec["tolerations"]) == ({}, {}, [])
    assert "replicas" not in spec
    assert "accelerator" not in spec


def test_the_support_for_unit_tests_fills_in_the_same_defaults(kube: Kube) -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        body = yaml.safe_load(path.read_text())
        filled = with_defaults(copy.deepcopy(body), SCHEMA)
        assert kube.create(LLMSERVICES, body)["spec"] == filled["spec"]


WRONG: list[tuple[Json, str]] = [
    ({"model": {"uri": "file://opt/model"}}, "three slashes"),
    ({"model": {"uri": "file:///a b"}}, "three slashes"),
    ({"model": {"uri": "pvc:///x"}}, "names a claim and a path"),
    ({"model": {"uri": "hf://name"}}, "names an organisation and a model"),
    ({"model": {"uri": "file:///a/../b"}}, "may not contain '..'"),
    ({"model": {"uri": "file:///a", "revision": "v1"}}, "is for hf:// models only"),
    ({"model": {"uri": "hf://o/n@v1", "revision": "v1"}}, "the revision is given twice"),
    ({"model": {}}, "spec.model.uri: Required value"),
    ({"engine": {"device": "cuda"}, "accelerator": {"count": 0}}, "needs an accelerator"),
    ({"engine": {"device": "tpu"}}, 'supported values: "auto", "cuda", "cpu"'),
    ({"engine": {"blockSize": 24}}, 'supported values: "8", "16", "32"'),
    ({"engine": {"extraArgs": ["--host", "1.2.3.4"]}}, "a flag that the operator owns"),
    ({"engine": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}, "set by the operator"),
    ({"accelerator": {"count": 2}}, "one replica runs on one accelerator"),
    ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "ask for GPUs with accelerator.count"),
    ({"resources": {"requests": {"memory": "lots"}}}, "spec.resources.requests.memory"),
    ({"resources": {"requests": {"cpu": 3}, "limits": {"cpu": "2"}}}, "above its limit"),
    ({"autoscaling": {"min": 0, "max": 3}}, "greater than or equal to 1"),
    ({"autoscaling": {}}, "spec.autoscaling.max: Required value"),
    ({"replicas": -1}, "greater than or equal to 0"),
    ({"replicas": "three"}, "must be of type integer"),
    ({"replica": 3}, 'unknown field "spec.replica"'),
]


@pytest.mark.parametrize(("spec", "sentence"), WRONG, ids=[s for _, s in WRONG])
def test_other_mistakes(kube: Kube, spec: Json, sentence: str) -> None:
    assert sentence in refusal(kube, manifest(**spec))


@pytest.mark.parametrize("name", ["my.model", "9lives"])
def test_a_name_that_no_service_can_have(kube: Kube, name: str) -> None:
    body = manifest()
    body["metadata"]["name"] = name
    assert "metadata.name is also the name of a Service" in refusal(kube, body)


def test_every_rule_is_tried() -> None:
    """A rule without a wrong manifest could be one that never fires."""
    tried = [sentence for _, sentence in WRONG]
    tried += ["metadata.name is also the name of a Service"]
    bad = sorted((EXAMPLES / "bad").glob("*.yaml"))
    tried += [p.read_text().splitlines()[0].removeprefix("# Expected: ") for p in bad]
    for message in messages(SCHEMA):
        assert any(sentence in message for sentence in tried), message


def messages(node: Any) -> list[str]:
    if isinstance(node, list):
        return [found for item in node for found in messages(item)]
    if not isinstance(node, dict):
        return []
    own = [rule["message"] for rule in node.get("x-kubernetes-validations", [])]
    return own + [found for child in node.values() for found in messages(child)]


def test_the_scale_subresource(kube: Kube) -> None:
    kube.create(LLMSERVICES, manifest(replicas=2))
    scale = kube.call("GET", f"{LLMSERVICES}/tiny/scale")
    assert scale["spec"]["replicas"] == 2
    kube.merge(f"{LLMSERVICES}/tiny/scale", {"spec": {"replicas": 5}})
    found = kube.get(LLMSERVICES, "tiny")
    assert found
    assert found["spec"]["replicas"] == 5


def test_scaling_by_hand_what_is_autoscaled_is_refused(kube: Kube) -> None:
    kube.create(LLMSERVICES, manifest(autoscaling={"max": 3}))
    with pytest.raises(ApiError, match="set either replicas or autoscaling, not both"):
        kube.merge(f"{LLMSERVICES}/tiny/scale", {"spec": {"replicas": 2}})


def test_the_status_is_not_the_users_to_write(kube: Kube) -> None:
    found = kube.create(LLMSERVICES, {**manifest(), "status": {"replicas": 7}})
    assert "status" not in found
