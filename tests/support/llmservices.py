"""Raw Kubernetes objects as the API server would return them, for tests of the operator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from octavo_operator import spec as specs
from octavo_operator.resources import SERVICE_LABEL

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CRD = yaml.safe_load((ROOT / "crds" / "llmservice.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
Json = dict[str, Any]


def with_defaults(value: Any, schema: Json) -> Any:
    """The schema's defaults filled in, as the API server does it."""
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for key, child in schema.get("properties", {}).items():
        if key not in filled and "default" in child:
            filled[key] = copy.deepcopy(child["default"])
        if key in filled:
            filled[key] = with_defaults(filled[key], child)
    return filled


def body(spec: Json | None = None, *, name: str = "tiny", **meta: Any) -> Json:
    """A defaulted LLMService; `spec` is merged into a minimal one."""
    raw = {
        "apiVersion": specs.API_VERSION,
        "kind": specs.KIND,
        "metadata": {
            "name": name, "namespace": "ns", "uid": f"uid-{name}", "generation": 1,
            "resourceVersion": "1", **meta,
        },
        "spec": {"model": {"uri": "file:///opt/model"}, **(spec or {})},
    }  # fmt: skip
    return with_defaults(raw, SCHEMA)


def service(spec: Json | None = None, **meta: Any) -> specs.LLMService:
    """The typed view of `body`."""
    return specs.parse(body(spec, **meta))


def example(name: str) -> specs.LLMService:
    """An example of the documentation, as it would come back from the API server."""
    raw = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    raw["metadata"] |= {"namespace": "ns", "uid": f"uid-{name}", "generation": 1}
    return specs.parse(with_defaults(raw, SCHEMA))


def live(manifest: Json, *, generation: int = 1, **status: Any) -> Json:
    """A child as it is once applied; `status` says what its controller reports."""
    made = copy.deepcopy(manifest)
    made["metadata"] |= {
        "uid": f"uid-{made['kind']}", "resourceVersion": "1", "generation": generation
    }  # fmt: skip
    made["status"] = status
    return made


def running(manifest: Json, ready: int, *, updated: int | None = None, **status: Any) -> Json:
    """A Deployment whose controller has seen the spec and has so many ready replicas."""
    count = manifest["spec"]["replicas"]
    counts = {
        "observedGeneration": 1,
        "replicas": count,
        "updatedReplicas": count if updated is None else updated,
        "readyReplicas": ready,
    }
    return live(manifest, **counts, **status)


def pod(
    name: str,
    *,
    of: str = "tiny",
    ip: str | None = "10.0.0.1",
    started: bool = True,
    ready: bool = True,
    state: Json | None = None,
    last: Json | None = None,
    restarts: int = 0,
    conditions: tuple[Json, ...] = (),
    **meta: Any,
) -> Json:
    """A replica as the kubelet reports it."""
    container = {
        "name": "server", "image": "img:1", "ready": ready, "started": started,
        "restartCount": restarts, "state": state or {"running": {}}, "lastState": last or {},
    }  # fmt: skip
    verdict = "True" if ready else "False"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "ns", "uid": f"uid-{name}", "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {SERVICE_LABEL: of}, **meta,
        },
        "status": {
            "phase": "Running",
            **({"podIP": ip} if ip else {}),
            "conditions": [{"type": "Ready", "status": verdict}, *conditions],
            "containerStatuses": [container],
        },
    }  # fmt: skip
