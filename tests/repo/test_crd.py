"""The CRD, its typed view and the examples say the same; the schema keeps its own discipline."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import jsonschema
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from llmservices import with_defaults

from octavo_operator import spec
from octavo_operator.resources import SERVICE_LABEL, selector, server_args

ROOT = Path(__file__).resolve().parents[2]
CRD = yaml.safe_load((ROOT / "crds" / "llmservice.yaml").read_text())
(VERSION,) = CRD["spec"]["versions"]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yaml"))
BAD = sorted((ROOT / "docs" / "examples" / "bad").glob("*.yaml"))
Json = dict[str, Any]

SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


def nodes(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every schema within the schema, with its path."""
    yield path, schema
    for key, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{key}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


# The API machinery describes and bounds these itself.
MACHINERY = (".metadata", ".apiVersion", ".kind")
NODES = [(path, node) for path, node in nodes(SCHEMA) if not path.startswith(MACHINERY)]


# Names


def test_names() -> None:
    names = CRD["spec"]["names"]
    assert CRD["spec"]["group"] == spec.GROUP
    assert (names["kind"], names["plural"]) == (spec.KIND, spec.PLURAL)
    assert names["shortNames"] == ["llmsvc"]
    assert names["categories"] == ["all", "ai"]
    assert VERSION["name"] == spec.VERSION
    assert CRD["metadata"]["name"] == f"{spec.PLURAL}.{spec.GROUP}"


def at(path: str) -> Json:
    """The schema of a field, or a KeyError when there is none."""
    found = SCHEMA
    for key in path.strip(".").split("."):
        found = found["properties"][key]
    return dict(found)


def test_subresources_point_to_fields() -> None:
    assert VERSION["subresources"]["status"] == {}
    scale = VERSION["subresources"]["scale"]
    assert at(scale["specReplicasPath"])["type"] == "integer"
    assert at(scale["statusReplicasPath"])["type"] == "integer"
    assert at(scale["labelSelectorPath"])["type"] == "string"


def test_printer_columns_point_to_fields() -> None:
    columns = {c["name"]: c for c in VERSION["additionalPrinterColumns"]}
    assert list(columns) == ["Model", "Ready", "Replicas", "KV", "Age", "Endpoint", "Decision"]
    assert {n for n, c in columns.items() if c.get("priority")} == {"Endpoint", "Decision"}
    for name in ("Model", "Replicas", "KV", "Endpoint", "Decision"):
        assert at(columns[name]["jsonPath"])["type"] == columns[name]["type"]


# The schema's discipline


@pytest.mark.parametrize(("path", "node"), NODES, ids=[path or "root" for path, _ in NODES])
def test_every_field_is_described_and_bounded(path: str, node: Json) -> None:
    assert len(node.get("description", "")) > 3, "no description"
    assert node["description"].endswith("."), "not a sentence"
    assert "x-kubernetes-preserve-unknown-fields" not in node
    assert node.get("additionalProperties") is not True
    kind = node.get("type")
    if kind == "string" and "enum" not in node and node.get("format") != "date-time":
        assert "maxLength" in node
    if kind == "array":
        assert "maxItems" in node
        assert node.get("x-kubernetes-list-type") in ("atomic", "map", "set")
    if kind == "object" and "properties" not in node:
        assert "maxProperties" in node
    if kind in ("integer", "number") and path.startswith(".spec"):
        unbounded = {".spec.tolerations[].tolerationSeconds"}
        assert "enum" in node or "maximum" in node or path in unbounded


def test_every_rule_has_a_sentence_that_says_what_to_change() -> None:
    rules = [r for _, node in NODES for r in node.get("x-kubernetes-validations", [])]
    assert len(rules) >= 15
    advice = ("set", "remove", "start", "use", "lower", "write", "ask", "keep", "three slashes",
              "names a", "names an")  # fmt: skip
    for rule in rules:
        assert rule["message"].endswith(".") or ": " in rule["message"]
        assert any(word in rule["message"] for word in advice), rule["message"]


def test_defaults_obey_their_own_schema() -> None:
    for path, node in NODES:
        if "default" in node:
            jsonschema.validate(node["default"], plain(node)), path


def plain(node: Json) -> Json:
    """The schema without what JSON Schema does not know; unknown fields are refused."""
    out = {k: v for k, v in node.items() if not k.startswith("x-kubernetes") and k != "default"}
    if "properties" in out:
        out["properties"] = {k: plain(v) for k, v in out["properties"].items()}
        out.setdefault("additionalProperties", False)
    if "items" in out:
        out["items"] = plain(out["items"])
    if out.get("maxLength") and "anyOf" in out:
        out.pop("type", None)
    return out


# The typed view


def unwrap(hint: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether None was allowed."""
    if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        return inner[0], True
    return hint, False


def compare(view: type, schema: Json, path: str) -> None:
    """Same names, same types, optional exactly where the schema may leave a field out."""
    hints = get_type_hints(view)
    fields = {spec.camel(f.name): hints[f.name] for f in dataclasses.fields(view)}
    assert set(fields) == set(schema["properties"]), path
    for key, hint in fields.items():
        child = schema["properties"][key]
        inner, optional = unwrap(hint)
        always = "default" in child or key in schema.get("required", [])
        assert optional is not always, f"{path}.{key}: optional in one, always there in the other"
        compare_type(inner, child, f"{path}.{key}")


def compare_type(hint: Any, schema: Json, path: str) -> None:
    if dataclasses.is_dataclass(hint):
        assert schema["type"] == "object", path
        compare(hint, schema, path)  # type: ignore[arg-type]
    elif get_origin(hint) is tuple:
        assert schema["type"] == "array", path
        compare_type(get_args(hint)[0], schema["items"], path + "[]")
    elif get_origin(hint) is Mapping:
        assert schema["type"] == "object", path
        assert "properties" not in schema, path
    else:
        assert schema["type"] == SCALARS[hint], path


def test_the_typed_view_is_the_schema() -> None:
    compare(spec.Spec, SCHEMA["properties"]["spec"], "spec")


def test_the_comparison_finds_a_difference() -> None:
    changed = yaml.safe_load(yaml.safe_dump(SCHEMA["properties"]["spec"]))
    changed["properties"]["engine"]["properties"]["blockSize"]["type"] = "string"
    with pytest.raises(AssertionError):
        compare(spec.Spec, changed, "spec")
    changed = yaml.safe_load(yaml.safe_dump(SCHEMA["properties"]["spec"]))
    del changed["properties"]["paused"]["default"]
    with pytest.raises(AssertionError):
        compare(spec.Spec, changed, "spec")


def test_docstrings_say_that_defaults_live_in_the_schema_only() -> None:
    for view in vars(spec).values():
        if dataclasses.is_dataclass(view):
            defaults = [f.name for f in dataclasses.fields(view)
                        if f.default is not dataclasses.MISSING]  # fmt: skip
            assert defaults == [], view


# Examples


def documents(path: Path) -> Json:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_fit_the_schema(path: Path) -> None:
    body = documents(path)
    schema = plain(SCHEMA)
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(body, schema)
    assert path.read_text().startswith("#"), "an example says what it shows"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_become_pods(path: Path) -> None:
    body = with_defaults(documents(path), SCHEMA)
    body["metadata"] |= {"namespace": "ns", "uid": "u", "generation": 1}
    found = spec.parse(body)
    assert server_args(found)[0] == "serve"
    assert found.name in selector(found)
    assert SERVICE_LABEL.startswith(spec.GROUP)


def test_the_first_example_is_the_smallest_real_one() -> None:
    found = documents(ROOT / "docs" / "examples" / "llmservice.yaml")["spec"]
    assert found["model"]["uri"] == "file:///opt/octavo/models/tiny"
    assert found["engine"] == {"device": "cpu"}
    assert (found["autoscaling"]["min"], found["autoscaling"]["max"]) == (1, 3)
    assert set(found["autoscaling"]) == {"min", "max"}, "production defaults, nothing shortened"


def test_ten_wrong_manifests_say_what_they_expect() -> None:
    assert len(BAD) == 10
    for path in BAD:
        expected = path.read_text().splitlines()[0]
        assert expected.startswith("# Expected: "), path
        assert documents(path)["kind"] == spec.KIND
