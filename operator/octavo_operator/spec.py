"""A typed, frozen view of an LLMService as the API server returns it, defaults filled in.

The schema in crds/llmservice.yaml is the source of truth and holds every default; this view has
none, so a field that the schema defaults is required here and one that it does not is `| None`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

GROUP = "octavo.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "LLMService"
PLURAL = "llmservices"

T = TypeVar("T")
Quantity = str | int


class SpecError(ValueError):
    """The object does not fit the schema that this operator was built for."""


@dataclass(frozen=True)
class SecretRef:
    """A Secret of the same namespace."""

    name: str


@dataclass(frozen=True)
class Model:
    """Which model is served, and from where."""

    uri: str
    revision: str | None
    served_names: tuple[str, ...] | None
    secret_ref: SecretRef | None


@dataclass(frozen=True)
class EnvVar:
    """One environment variable of the server."""

    name: str
    value: str


@dataclass(frozen=True)
class Engine:
    """How each replica serves the model."""

    image: str | None
    image_pull_policy: str | None
    device: str
    dtype: str
    max_model_len: int | None
    block_size: int
    num_kv_blocks: int | None
    gpu_memory_utilization: float | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    extra_args: tuple[str, ...]
    env: tuple[EnvVar, ...]


@dataclass(frozen=True)
class Accelerator:
    """Accelerators of one replica."""

    count: int
    resource: str


@dataclass(frozen=True)
class Targets:
    """What the replicas are sized for."""

    kv_utilization: float


@dataclass(frozen=True)
class Pace:
    """How fast replicas may change in one direction."""

    window_seconds: int
    max_pods: int
    period_seconds: int


@dataclass(frozen=True)
class Autoscaling:
    """The policy of the autoscaler."""

    min: int
    max: int
    targets: Targets
    tolerance: float
    interval_seconds: int
    up: Pace
    down: Pace


@dataclass(frozen=True)
class Resources:
    """CPU, memory and other resources of one replica."""

    requests: Mapping[str, Quantity] | None
    limits: Mapping[str, Quantity] | None


@dataclass(frozen=True)
class Toleration:
    """A taint that the replicas tolerate."""

    key: str | None
    operator: str | None
    value: str | None
    effect: str | None
    toleration_seconds: int | None


@dataclass(frozen=True)
class Spec:
    """The spec of an LLMService."""

    model: Model
    engine: Engine
    accelerator: Accelerator | None
    replicas: int | None
    autoscaling: Autoscaling | None
    resources: Resources
    node_selector: Mapping[str, str]
    tolerations: tuple[Toleration, ...]
    termination_grace_period_seconds: int
    paused: bool

    @property
    def wanted_accelerator(self) -> Accelerator | None:
        """What a replica asks for; the schema cannot default one field by another."""
        if self.engine.device == "cpu":
            return None
        accelerator = self.accelerator or Accelerator(count=1, resource="nvidia.com/gpu")
        return accelerator if accelerator.count > 0 else None

    @property
    def fixed_replicas(self) -> int:
        """The count without autoscaling; a schema default would clash with `autoscaling`."""
        return 1 if self.replicas is None else self.replicas


@dataclass(frozen=True)
class LLMService:
    """One object: who it is and what it wants."""

    name: str
    namespace: str
    uid: str
    generation: int
    spec: Spec


def parse(body: Mapping[str, Any]) -> LLMService:
    """Build the view from an object of the API server; raise SpecError naming the field."""
    meta = body["metadata"]
    return LLMService(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta["generation"],
        spec=_build(Spec, body.get("spec") or {}, "spec"),
    )


def camel(name: str) -> str:
    """`max_model_len` -> `maxModelLen`, the spelling of the schema."""
    head, *tail = name.split("_")
    return head + "".join(part.capitalize() for part in tail)


def _build(cls: type[T], data: Mapping[str, Any], path: str) -> T:
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]  # mypy cannot bound T to dataclasses
        key = camel(field.name)
        values[field.name] = _convert(hints[field.name], data.get(key), f"{path}.{key}")
    return cls(**values)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _convert(hint: Any, value: Any, path: str) -> Any:
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if value is None:
        if optional:
            return None
        raise SpecError(
            f"{path} is missing, although the schema defaults or requires it: is the CRD in the "
            "cluster the one of this operator?"
        )
    if optional:
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, path)
    if get_origin(hint) is tuple:
        return tuple(_convert(get_args(hint)[0], item, path) for item in value)
    return value
