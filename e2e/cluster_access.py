"""Which cluster to use, and how its images get there.

CLUSTER is empty for the one node that e2e/cluster makes on this machine, `current` for the current
context of KUBECONFIG with a registry of the user's own (OCTAVO_REGISTRY), `kind` for a kind cluster
made with the user's Docker.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kube import CLUSTER_TOOL, ROOT, Cluster, ClusterError, environment, run, tool

IMAGES_FILE = Path("/var/lib/octavo-e2e/images.json")
KIND_NAME = "octavo"
KIND_KUBECONFIG = ROOT / "build" / "kind.kubeconfig"
TARGETS = ("operator", "server")


@dataclass(frozen=True)
class Access:
    """The ways to one sort of cluster. `images` gives the references by target."""

    up: Callable[[], None]
    build: Callable[[], None]
    images: Callable[[], dict[str, str]]
    kubeconfig: Callable[[], str]


def access() -> Access:
    """What CLUSTER asks for."""
    kind = environment("CLUSTER") or "own"
    if kind not in ACCESS:
        raise ClusterError(f"CLUSTER={kind} is not known: leave it out, or say current or kind")
    return ACCESS[kind]


def bring_up() -> None:
    """Have the cluster, or say why not."""
    access().up()


def build_images() -> None:
    """Build both images and bring them to where the cluster pulls from."""
    access().build()


def connect() -> Cluster:
    """The cluster that CLUSTER names, with the images that were last built for it."""
    way = access()
    own = way is ACCESS["own"]
    images = way.images()
    return Cluster(
        kubectl_path=_binary("kubectl", own),
        helm_path=environment("HELM") or _binary("helm", own),
        kubeconfig=way.kubeconfig(),
        server_image=images["server"],
        operator_image=images["operator"],
        own=own,
    )


def _tool_verb(verb: str) -> None:
    """A verb of the cluster tool, whose steps print themselves."""
    done = subprocess.run([*CLUSTER_TOOL, verb], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ClusterError(f"e2e/cluster/cli.py {verb}: exit {done.returncode}, see above")


def _binary(name: str, own: bool) -> str:
    """Our own build for our own cluster; what is on the user's path for his."""
    return (None if own else shutil.which(name)) or tool("binary", name)


def _own_images() -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(IMAGES_FILE.read_text())
    except OSError as error:
        raise ClusterError(f"no images yet ({error}): run `make images`") from error
    missing = set(TARGETS) - set(found)
    if missing:
        raise ClusterError(f"no image of {', '.join(sorted(missing))} yet: run `make images`")
    return found


def _current_up() -> None:
    context = run(["kubectl", "config", "current-context"]).strip()
    print(f"  using the current context {context}", flush=True)


def _registry_images() -> dict[str, str]:
    registry = environment("OCTAVO_REGISTRY").rstrip("/")
    if not registry:
        raise ClusterError(
            "CLUSTER=current needs a registry that the cluster pulls from: set OCTAVO_REGISTRY"
        )
    return {target: f"{registry}/octavo-{target}:{_tag()}" for target in TARGETS}


def _push_to_registry() -> None:
    for reference in _docker_build(_registry_images()):
        run(["docker", "push", reference], timeout=1800)


def _kind_images() -> dict[str, str]:
    # Not `latest`, so that the kubelet takes the loaded image and asks no registry.
    return {target: f"localhost/octavo-{target}:{_tag()}" for target in TARGETS}


def _kind_up() -> None:
    names = run(["kind", "get", "clusters"]).split()
    if KIND_NAME not in names:
        run(["kind", "create", "cluster", "--name", KIND_NAME, "--wait", "120s"], timeout=600)
    KIND_KUBECONFIG.parent.mkdir(exist_ok=True)
    run(["kind", "export", "kubeconfig", "--name", KIND_NAME, "--kubeconfig", str(KIND_KUBECONFIG)])


def _load_into_kind() -> None:
    for reference in _docker_build(_kind_images()):
        run(["kind", "load", "docker-image", reference, "--name", KIND_NAME], timeout=1800)


def _docker_build(images: dict[str, str]) -> list[str]:
    for target, reference in images.items():
        run(["docker", "build", "--target", target, "--tag", reference, str(ROOT)], timeout=3600)
    return list(images.values())


def _tag() -> str:
    """The commit, so that a new build is a new image."""
    return run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]).strip()


ACCESS = {
    "own": Access(
        lambda: _tool_verb("up"),
        lambda: _tool_verb("images"),
        _own_images,
        lambda: tool("kubeconfig"),
    ),
    "current": Access(_current_up, _push_to_registry, _registry_images, lambda: ""),
    "kind": Access(_kind_up, _load_into_kind, _kind_images, lambda: str(KIND_KUBECONFIG)),
}
