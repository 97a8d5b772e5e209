"""Clusters that are not ours: CLUSTER=current (the current context) and CLUSTER=kind (Docker).

Neither could be run where this was written, which had no Docker and no second cluster: the commands
are those that kubectl, docker and kind document. Our own cluster is what the tests prove.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import images
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import CHECKOUT, cache_dir
from e2e.cluster.steps import say, step

KIND = "octavo"
INSTALL = {
    "kubectl": "install it from https://kubernetes.io/docs/tasks/tools/",
    "docker": "install it from https://docs.docker.com/engine/install/",
    "kind": "install it with `go install sigs.k8s.io/kind@latest`",
}


def chosen() -> str:
    """own, current or kind, as the environment says."""
    kind = os.environ.get("CLUSTER") or "own"
    if kind not in {"own", "current", "kind"}:
        raise ClusterError(f"CLUSTER={kind} is not known: leave it out, or say current or kind")
    return kind


def run(*command: str) -> str:
    """Standard output of one of these tools; a sentence when it is missing or fails."""
    name = command[0]
    if not shutil.which(name):
        raise ClusterError(f"no {name} on the PATH: {INSTALL[name]}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"`{' '.join(command)}`: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class External:
    """One of the two ways; `own` never gets here."""

    kind: str

    @property
    def references_file(self) -> Path:
        return cache_dir() / f"images-{self.kind}.json"

    def kubeconfig(self) -> Path:
        """The file that leads to the cluster."""
        if self.kind == "kind":
            return cache_dir() / "kind.kubeconfig"
        return Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")

    def answers(self) -> bool:
        """Whether the API server says that it is ready; prints where it is."""
        config = ("--kubeconfig", str(self.kubeconfig()), "--request-timeout=10s")
        try:
            run("kubectl", *config, "get", "--raw", "/readyz")
        except ClusterError as error:
            say(f"  {error}")
            return False
        return True

    def up(self) -> None:
        """Make the kind cluster; of the current context only ask whether it answers."""
        if self.kind == "kind" and KIND not in run("kind", "get", "clusters").split():
            with step("kind cluster"):
                self.kubeconfig().parent.mkdir(parents=True, exist_ok=True)
                run("kind", "create", "cluster", "--name", KIND, "--wait", "120s",
                    "--kubeconfig", str(self.kubeconfig()))  # fmt: skip
        if not self.answers():
            raise ClusterError(f"CLUSTER={self.kind}: the cluster does not answer; see above")

    def down(self) -> None:
        """Delete the kind cluster; the current context is not ours to end."""
        if self.kind == "kind":
            run("kind", "delete", "cluster", "--name", KIND)
        else:
            say("CLUSTER=current: nothing to bring down, the cluster is not ours")

    def images(self, targets: list[str]) -> dict[str, str]:
        """Build with Docker and bring the images to where the cluster finds them."""
        registry = os.environ.get("OCTAVO_REGISTRY", "").rstrip("/")
        if self.kind == "current" and not registry:
            raise ClusterError("CLUSTER=current needs a registry that the cluster pulls from: "
                               "set OCTAVO_REGISTRY, for example to ghcr.io/you")  # fmt: skip
        references: dict[str, str] = self.references()
        for target in targets:
            tag = images.content_tag(CHECKOUT, images.INPUTS[target])
            # A tag other than `latest`: kubelet takes what was loaded and asks no registry.
            reference = images.Image(target, tag).reference(registry or "localhost")
            with step(f"{target}: build"):
                run("docker", "build", "--target", target, "--tag", reference, str(CHECKOUT))
            with step(f"{target}: to the cluster"):
                if self.kind == "kind":
                    run("kind", "load", "docker-image", reference, "--name", KIND)
                else:
                    run("docker", "push", reference)
            references[target] = reference
        self.references_file.parent.mkdir(parents=True, exist_ok=True)
        self.references_file.write_text(json.dumps(references, indent=1) + "\n")
        return references

    def references(self) -> dict[str, str]:
        """What the last `images` made."""
        return images.read_references(self.references_file)
