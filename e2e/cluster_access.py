"""The cluster that CLUSTER names, through the cluster tool: up, images, and a way in."""

from __future__ import annotations

import json
import shutil
import subprocess

from kube import CLUSTER_TOOL, Cluster, ClusterError, environment, tool


def bring_up() -> None:
    """Have the cluster; the tool prints its own steps."""
    _verb("up")


def build_images() -> None:
    """Build both images and bring them to where the cluster pulls from."""
    _verb("images")


def connect() -> Cluster:
    """The running cluster with the images that were last built for it."""
    own = environment("CLUSTER") in ("", "own")
    images = json.loads(tool("images", "--recorded"))
    return Cluster(
        kubectl_path=_binary("kubectl", own),
        helm_path=environment("HELM") or _binary("helm", own),
        kubeconfig=tool("kubeconfig"),
        server_image=images["server"],
        operator_image=images["operator"],
        own=own,
    )


def _verb(name: str) -> None:
    done = subprocess.run([*CLUSTER_TOOL, name], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ClusterError(f"e2e/cluster/cli.py {name}: exit {done.returncode}, see above")


def _binary(name: str, own: bool) -> str:
    """Our own build for our own cluster; what is on the user's path for his."""
    return (None if own else shutil.which(name)) or tool("binary", name)
