"""The node: containerd, kubelet, kube-proxy, and CoreDNS as a process on the bridge's address."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from string import Template

from e2e.cluster import binaries, kernel, network, pause, processes
from e2e.cluster.api import Api, Json
from e2e.cluster.controlplane import BRIDGE_ADDRESS, POD_CIDR
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import TEMPLATES, State
from e2e.cluster.pki import NODE, write_private
from e2e.cluster.processes import Daemon

CNI_PLUGINS = Path("/usr/lib/cni")
NODE_PATH = f"/api/v1/nodes/{NODE}"
# CoreDNS reads what names stand for; nothing more.
DNS_ROLE: Json = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "octavo-e2e:coredns"},
    "rules": [
        {
            "apiGroups": [""],
            "resources": ["endpoints", "services", "pods", "namespaces"],
            "verbs": ["list", "watch"],
        },
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["list", "watch"],
        },
    ],
}
DNS_BINDING: Json = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "octavo-e2e:coredns"},
    "roleRef": {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "octavo-e2e:coredns",
    },
    "subjects": [
        {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "octavo:coredns"}
    ],
}
RBAC = "/apis/rbac.authorization.k8s.io/v1"


@dataclass(frozen=True)
class Node:
    """The one node of the cluster whose folders `state` names."""

    state: State

    def configure(self) -> None:
        """Write every daemon's configuration."""
        values = {
            "root": self.state.root,
            "run": self.state.run,
            "config": self.state.config,
            "pki": self.state.pki,
            "socket": self.state.containerd_socket,
            "pause_image": pause.reference(),
            "restrict_oom": "false" if kernel.may_lower_oom_score() else "true",
            "cni_plugins": CNI_PLUGINS,
            "runc": binaries.path("runc"),
            "bridge": network.BRIDGE,
            "bridge_address": BRIDGE_ADDRESS,
            "node_cidr": network.NODE_CIDR,
            "first_address": network.FIRST_ADDRESS,
            "pod_cidr": POD_CIDR,
            "cgroup": f"/{kernel.GROUP}",
            "node": NODE,
        }
        (self.state.config / "cni").mkdir(exist_ok=True)
        for template, target in {
            "containerd.toml": "containerd.toml",
            "kubelet.yaml": "kubelet.yaml",
            "kube-proxy.yaml": "kube-proxy.yaml",
            "Corefile": "Corefile",
            "cni.json": "cni/10-octavo.conflist",
        }.items():
            text = Template((TEMPLATES / template).read_text()).substitute(values)
            write_private(self.state.config / target, text)

    def containerd(self) -> Daemon:
        """The container runtime; shims are its children and outlive it."""
        return Daemon(
            "containerd",
            (str(binaries.path("containerd")), f"--config={self.state.config / 'containerd.toml'}"),
            {"PATH": binaries.search_path()},
        )

    def agents(self) -> list[Daemon]:
        """What follows the API server on the node."""
        config = self.state.config
        path = {"PATH": binaries.search_path()}
        return [
            Daemon(
                "kubelet",
                (
                    str(binaries.path("kubelet")),
                    f"--config={config / 'kubelet.yaml'}",
                    f"--kubeconfig={config / 'kubelet.kubeconfig'}",
                    f"--root-dir={self.state.root / 'kubelet'}",
                    f"--hostname-override={NODE}",
                    f"--node-ip={BRIDGE_ADDRESS}",
                ),
                path,
            ),
            Daemon(
                "kube-proxy",
                (str(binaries.path("kube-proxy")), f"--config={config / 'kube-proxy.yaml'}"),
                path,
            ),
            Daemon("coredns", (str(binaries.path("coredns")), f"-conf={config / 'Corefile'}")),
        ]

    def ctr(self, *args: str) -> subprocess.CompletedProcess[str]:
        """containerd's own client, in the namespace that kubelet uses."""
        command = [str(binaries.path("ctr")), "--address", str(self.state.containerd_socket)]
        return subprocess.run(
            [*command, "--namespace", "k8s.io", *args], capture_output=True, text=True
        )

    def runtime_answers(self) -> bool:
        """Whether containerd serves."""
        return self.ctr("version").returncode == 0

    def import_pause(self) -> None:
        """Give containerd the pause image unless it has it."""
        have = self.ctr("images", "list", "-q").stdout.split()
        if pause.reference() in have:
            return
        done = self.ctr("images", "import", str(pause.archive()))
        if done.returncode:
            raise ClusterError(f"containerd refused the pause image: {done.stderr.strip()}")

    def ready(self, api: Api) -> bool:
        """Whether the API server has the node Ready by a heartbeat of the kubelet that runs now."""
        found = api.get(NODE_PATH)
        if not found:
            return False
        conditions = {c["type"]: c for c in found["status"].get("conditions", [])}
        return bool(conditions.get("Ready", {}).get("status") == "True")

    def forget_readiness(self, api: Api) -> None:
        """A kubelet that was killed left its node Ready in the store: do not believe it."""
        if api.get(NODE_PATH):
            api.patch(
                f"{NODE_PATH}/status",
                [{"op": "replace", "path": "/status/conditions", "value": []}],
            )

    def allow_dns(self, api: Api) -> None:
        """Let CoreDNS read what it answers from."""
        name = DNS_ROLE["metadata"]["name"]
        api.apply(f"{RBAC}/clusterroles/{name}", DNS_ROLE)
        api.apply(f"{RBAC}/clusterrolebindings/{name}", DNS_BINDING)

    def fake_gpus(self, api: Api, count: int) -> None:
        """Make scheduler and kubelet treat the node as one with GPUs."""
        gpus = [
            {"op": "add", "path": f"/status/{part}/nvidia.com~1gpu", "value": str(count)}
            for part in ("capacity", "allocatable")
        ]
        api.patch(f"{NODE_PATH}/status", gpus)

    def end(self) -> None:
        """End kubelet first, so that nothing comes back; then containers, shims, mounts."""
        found = processes.of_state(self.state.root)
        processes.stop(p for p in found if p.name == "kubelet")
        kernel.end_group()
        # The mark is on containerd's shims too, which no longer hold anything.
        processes.stop(processes.of_state(self.state.root))
        kernel.unmount_below([self.state.root, self.state.run])
