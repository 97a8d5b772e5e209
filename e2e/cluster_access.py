"""Which cluster to use: our own node, or the current context when CLUSTER says so."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from kube import CLUSTER_TOOL, Cluster, ClusterError, environment, tool

IMAGES_FILE = "/var/lib/octavo-e2e/images.json"


def bring_up() -> None:
    """Have the cluster tool bring the cluster up; its own steps are printed by itself."""
    _show("up")


def build_images() -> None:
    """Have the cluster tool build and push both images."""
    _show("images")


def connect() -> Cluster:
    """The cluster that CLUSTER names, with the images that were last pushed for it."""
    kind = environment("CLUSTER") or "own"
    images = _images()
    own = kind == "own"
    kubeconfig = tool("kubeconfig") if own else environment("KUBECONFIG")
    return Cluster(
        kubectl_path=_binary("kubectl", own),
        helm_path=environment("HELM") or _binary("helm", own),
        kubeconfig=kubeconfig,
        server_image=images["server"],
        operator_image=images["operator"],
        own=own,
    )


def _show(verb: str) -> None:
    done = subprocess.run([*CLUSTER_TOOL, verb], check=False)
    if done.returncode:
        raise ClusterError(f"e2e/cluster/cli.py {verb}: exit {done.returncode}, see above")


def _binary(name: str, own: bool) -> str:
    """Our own build for our own cluster; what the user has on his path for his."""
    found = None if own else shutil.which(name)
    return found or tool("binary", name)


def _images() -> dict[str, Any]:
    try:
        with open(IMAGES_FILE) as file:
            found: dict[str, Any] = json.load(file)
    except OSError as error:
        raise ClusterError(f"no images yet ({error}): run `make images`") from error
    return found
