"""LLMService -> Deployment and Service, as plain manifests; pure.

The pod template follows from the user's spec and the operator's default image alone: nothing that
changes by itself (a time, a count, a status) may enter it, or pods would restart for no reason.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from octavo_operator.spec import API_VERSION, KIND, LLMService, Spec, Toleration, camel

Manifest = dict[str, Any]

SERVICE_LABEL = "octavo.dev/service"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "octavo-operator"
APPLIED_ANNOTATION = "octavo.dev/applied"
PORT = 8000
USER_ID = 10001
MODELS_DIR = "/models"

# The endpoint leaves the load balancer while the container still accepts: no request meets a
# closed port between SIGTERM and the last kube-proxy's update.
PRE_STOP_SECONDS = 3
# What remains of the grace period after preStop and drain, for the process to end by itself.
EXIT_MARGIN_SECONDS = 7


@dataclass(frozen=True)
class ModelSource:
    """What a model URI means for the pod: arguments, volumes, mounts, environment."""

    args: list[str]
    volumes: list[Manifest]
    mounts: list[Manifest]
    env: list[Manifest]


def selector_labels(service: LLMService) -> dict[str, str]:
    """Labels that select the replicas; part of the Deployment's immutable selector."""
    return {
        "app.kubernetes.io/name": "octavo-server",
        "app.kubernetes.io/instance": service.name,
    }


def labels(service: LLMService) -> dict[str, str]:
    """Labels of every child."""
    return {
        **selector_labels(service),
        MANAGED_BY_LABEL: MANAGER,
        SERVICE_LABEL: service.name,
    }


def selector(service: LLMService) -> str:
    """The selector of the scale subresource."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector_labels(service).items()))


def endpoint(service: LLMService) -> str:
    """Address of the OpenAI API inside the cluster."""
    return f"http://{service.name}.{service.namespace}.svc:{PORT}"


def build_children(service: LLMService, replicas: int, default_image: str) -> list[Manifest]:
    """Every child object of the service, in the order in which they are applied."""
    return [
        build_service(service),
        build_deployment(service, replicas, default_image),
    ]


def build_service(service: LLMService) -> Manifest:
    """The ClusterIP Service in front of the replicas."""
    spec = {
        "type": "ClusterIP",
        "selector": selector_labels(service),
        "ports": [
            {"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"},
        ],
    }
    return _seal(_child(service, "v1", "Service", spec))


def build_deployment(service: LLMService, replicas: int, default_image: str) -> Manifest:
    """The Deployment whose pods are the replicas."""
    spec = {
        "replicas": replicas,
        "revisionHistoryLimit": 5,
        "selector": {"matchLabels": selector_labels(service)},
        # A new replica must answer before an old one leaves.
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        },
        "template": {
            "metadata": {
                "labels": labels(service),
                "annotations": {"kubectl.kubernetes.io/default-container": "server"},
            },
            "spec": _pod(service, default_image),
        },
    }
    return _seal(_child(service, "apps/v1", "Deployment", spec))


def server_args(service: LLMService) -> list[str]:
    """The server's command line after `octavo`."""
    engine, model = service.spec.engine, service.spec.model
    args = ["serve", *_model_source(service.spec).args]
    args += ["--served-model-name", *(model.served_names or (service.name,))]
    args += ["--host", "0.0.0.0", "--port", str(PORT)]
    args += ["--device", engine.device, "--dtype", engine.dtype]
    args += ["--block-size", str(engine.block_size)]
    optional = {
        "--num-kv-blocks": engine.num_kv_blocks,
        "--gpu-memory-utilization": engine.gpu_memory_utilization,
        "--max-model-len": engine.max_model_len,
        "--max-num-seqs": engine.max_num_seqs,
        "--max-num-batched-tokens": engine.max_num_batched_tokens,
    }
    for flag, value in optional.items():
        if value is not None:
            args += [flag, str(value)]
    args += ["--drain-timeout", str(_drain_seconds(service.spec))]
    return args + list(engine.extra_args)


def _drain_seconds(spec: Spec) -> int:
    return spec.termination_grace_period_seconds - PRE_STOP_SECONDS - EXIT_MARGIN_SECONDS


def _pod(service: LLMService, default_image: str) -> Manifest:
    spec = service.spec
    source = _model_source(spec)
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(service, source, default_image)],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
            *source.volumes,
        ],
        # Spread over nodes where possible: one node's end should not be the service's.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector_labels(service)},
            }
        ],
    }
    if spec.node_selector:
        pod["nodeSelector"] = dict(spec.node_selector)
    if spec.tolerations:
        pod["tolerations"] = [_toleration(item) for item in spec.tolerations]
    return pod


def _container(service: LLMService, source: ModelSource, default_image: str) -> Manifest:
    engine = service.spec.engine
    container: Manifest = {
        "name": "server",
        "image": engine.image or default_image,
        "command": ["octavo"],
        "args": server_args(service),
        "env": [
            {"name": "HOME", "value": "/tmp"},  # noqa: S108  a volume of this pod alone
            *source.env,
            *({"name": var.name, "value": var.value} for var in engine.env),
        ],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  a volume of this pod alone
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  a volume of this pod alone
            *source.mounts,
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        **_probes(),
    }
    if engine.image_pull_policy:
        container["imagePullPolicy"] = engine.image_pull_policy
    if resources := _resources(service.spec):
        container["resources"] = resources
    return container


def _probes() -> Manifest:
    """How the kubelet asks the server; the server itself gives up on a start without progress."""
    return {
        "startupProbe": {
            "httpGet": {"path": "/startupz", "port": "http"},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 86400,
        },
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": "http"},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        "livenessProbe": {
            "httpGet": {"path": "/livez", "port": "http"},
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": 3,
        },
    }


def _resources(spec: Spec) -> Manifest:
    requests = dict(spec.resources.requests or {})
    limits = dict(spec.resources.limits or {})
    if accelerator := spec.wanted_accelerator:
        # Extended resources need request and limit to be equal.
        requests[accelerator.resource] = str(accelerator.count)
        limits[accelerator.resource] = str(accelerator.count)
    return {
        kind: {name: str(amount) for name, amount in sorted(amounts.items())}
        for kind, amounts in (("requests", requests), ("limits", limits))
        if amounts
    }


def _model_source(spec: Spec) -> ModelSource:
    scheme, _, rest = spec.model.uri.partition("://")
    if scheme == "file":
        return ModelSource([rest], [], [], [])
    if scheme == "pvc":
        return _claim_source(rest)
    return _hub_source(spec, rest)


def _claim_source(rest: str) -> ModelSource:
    claim, _, path = rest.partition("/")
    return ModelSource(
        args=[f"{MODELS_DIR}/{path}".rstrip("/")],
        volumes=[
            {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        ],
        mounts=[{"name": "models", "mountPath": MODELS_DIR, "readOnly": True}],
        env=[],
    )


def _hub_source(spec: Spec, rest: str) -> ModelSource:
    repository = f"{rest}@{spec.model.revision}" if spec.model.revision else rest
    env: list[Manifest] = [{"name": "HF_HOME", "value": f"{MODELS_DIR}/hf"}]
    if spec.model.secret_ref:
        reference = {"name": spec.model.secret_ref.name, "key": "token"}
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    return ModelSource(
        args=["--source", "hub", repository],
        volumes=[{"name": "models", "emptyDir": {}}],
        mounts=[{"name": "models", "mountPath": MODELS_DIR}],
        env=env,
    )


def _toleration(toleration: Toleration) -> Manifest:
    return {camel(key): value for key, value in vars(toleration).items() if value is not None}


def _child(service: LLMService, api_version: str, kind: str, spec: Manifest) -> Manifest:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": service.name,
            "namespace": service.namespace,
            "labels": labels(service),
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": service.name,
                    "uid": service.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": spec,
    }


def _seal(manifest: Manifest) -> Manifest:
    """Add the hash of what is applied, by which a field that left the manifest is noticed too."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    manifest["metadata"]["annotations"] = {APPLIED_ANNOTATION: digest}
    return manifest
