"""etcd and kube-apiserver, alone on free ports (for tests) or as the head of the whole cluster.

Alone it needs neither root nor a network of its own: any number of them run side by side, each in
the state folder that it was given.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import binaries, pki, processes
from e2e.cluster.api import Api
from e2e.cluster.errors import ClusterError, DaemonEndedError
from e2e.cluster.paths import State
from e2e.cluster.processes import Daemon
from e2e.cluster.steps import say, step, wait_until

SERVICE_CIDR, POD_CIDR = "10.96.0.0/16", "10.244.0.0/16"
BRIDGE_ADDRESS = "10.244.0.1"
# Who wrote what, without the contents: a test can assert that nothing was written.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]}
    ],
}


def free_port(preferred: int = 0) -> int:
    """The preferred port when nobody listens on it, else one the kernel picks."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ClusterError("no free TCP port on 127.0.0.1")


@dataclass(frozen=True)
class Ports:
    """The ports of one control plane, kept in its state folder so that a restart has the same."""

    api: int
    etcd: int
    etcd_peer: int

    @staticmethod
    def load(path: Path) -> Ports | None:
        """What was written last, or None when it cannot be read."""
        try:
            return Ports(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, path: Path) -> None:
        pki.write_private(path, json.dumps(self.__dict__) + "\n")


@dataclass(frozen=True)
class ControlPlane:
    """One API server and its store. `whole`: the head of a cluster with nodes."""

    state: State
    whole: bool = False

    @property
    def ports_file(self) -> Path:
        return self.state.root / "ports.json"

    def api(self) -> Api | None:
        """The API server that this state folder's ports name."""
        ports = Ports.load(self.ports_file)
        return Api(ports.api, self.state.pki) if ports else None

    def up(self) -> Api:
        """Start what does not run; returns when the API server is ready."""
        self.state.prepare()
        adopted = bool(processes.daemons(self.state.root))
        pki.create(self.state.pki)
        policy = self.state.config / "audit-policy.json"
        pki.write_private(policy, json.dumps(AUDIT_POLICY))
        ports = self._ports()
        api = Api(ports.api, self.state.pki)
        server = f"https://127.0.0.1:{ports.api}"
        for client in pki.CLIENTS:
            path = self.state.config / f"{client}.kubeconfig"
            pki.write_private(path, pki.kubeconfig(self.state.pki, client, server))
        pki.write_private(self.state.kubeconfig, pki.kubeconfig(self.state.pki, "admin", server))
        with step("etcd and kube-apiserver ready"):
            try:
                self._start(ports, api)
            except DaemonEndedError as error:
                # What we found running was about to end, or etcd cannot read what it finds.
                say(f"  {error.name} ended; starting once more")
                self._end()
                if error.name == "etcd" and not adopted:
                    self._set_data_aside()
                self._start(ports, api)
        return api

    def _set_data_aside(self) -> None:
        """A store that a crash of the machine has torn must not stop the next cluster."""
        data, aside = self.state.root / "etcd", self.state.root / "etcd.damaged"
        if data.exists():
            shutil.rmtree(aside, ignore_errors=True)
            data.rename(aside)
            say(f"  the cluster's objects could not be read: beginning without any, see {aside}")

    def _ports(self) -> Ports:
        """The ports of what runs; else the former ones where free, else new ones."""
        former = Ports.load(self.ports_file)
        if former and any(p.name == "etcd" for p in processes.of_state(self.state.root)):
            return former
        preferred = former or (Ports(6443, 0, 0) if self.whole else Ports(0, 0, 0))
        ports = Ports(*(free_port(p) for p in (preferred.api, preferred.etcd, preferred.etcd_peer)))
        ports.save(self.ports_file)
        return ports

    def _start(self, ports: Ports, api: Api) -> None:
        root, logs = self.state.root, self.state.logs
        both = (self._etcd(ports), self._apiserver(ports))
        for daemon in both:
            processes.ensure(daemon, root, logs)
        check = processes.all_run(both, root, logs)
        wait_until(api.ready, "the API server's /readyz", timeout=90, check=check)

    def _etcd(self, ports: Ports) -> Daemon:
        client, peer = (f"http://127.0.0.1:{port}" for port in (ports.etcd, ports.etcd_peer))
        return Daemon(
            "etcd",
            (
                str(binaries.path("etcd")),
                f"--data-dir={self.state.root / 'etcd'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                # The data survives the end of the process, not the machine's: good for tests,
                # and many times faster on a busy disk.
                "--unsafe-no-fsync",
                "--log-level=warn",
            ),
        )

    def _apiserver(self, ports: Ports) -> Daemon:
        keys = self.state.pki
        # Pods reach the API by the bridge's address, so the whole cluster's listens everywhere.
        network = (
            ("--bind-address=0.0.0.0", f"--advertise-address={BRIDGE_ADDRESS}")
            if self.whole
            else ("--bind-address=127.0.0.1", "--endpoint-reconciler-type=none")
        )
        return Daemon(
            "kube-apiserver",
            (
                str(binaries.path("kube-apiserver")),
                f"--etcd-servers=http://127.0.0.1:{ports.etcd}",
                f"--secure-port={ports.api}",
                *network,
                f"--tls-cert-file={keys / 'apiserver.crt'}",
                f"--tls-private-key-file={keys / 'apiserver.key'}",
                f"--client-ca-file={keys / 'ca.crt'}",
                f"--service-account-key-file={keys / 'service-accounts.pub'}",
                f"--service-account-signing-key-file={keys / 'service-accounts.key'}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-cluster-ip-range={SERVICE_CIDR}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                f"--kubelet-client-certificate={keys / 'kubelet-client.crt'}",
                f"--kubelet-client-key={keys / 'kubelet-client.key'}",
                f"--kubelet-certificate-authority={keys / 'ca.crt'}",
                # Else exec and logs try to resolve the node's name.
                "--kubelet-preferred-address-types=InternalIP",
                f"--audit-policy-file={self.state.config / 'audit-policy.json'}",
                f"--audit-log-path={self.state.logs / 'audit.log'}",
                "--audit-log-maxsize=100",
                "--audit-log-maxbackup=1",
                "--profiling=false",
            ),
        )

    def _end(self) -> None:
        wanted = ("kube-apiserver", "etcd")
        processes.stop(p for p in processes.of_state(self.state.root) if p.name in wanted)

    def down(self, *, purge: bool) -> None:
        """End both; with `purge` forget everything they knew."""
        self._end()
        if purge and self.state.root.exists():
            shutil.rmtree(self.state.root)
        say(f"control plane in {self.state.root}: down" + (", state removed" if purge else ""))


def controllers(state: State) -> list[Daemon]:
    """What makes objects happen: controller manager and scheduler."""
    keys, config = state.pki, state.config
    loopback = "--bind-address=127.0.0.1"
    return [
        Daemon(
            "kube-controller-manager",
            (
                str(binaries.path("kube-controller-manager")),
                f"--kubeconfig={config / 'controller-manager.kubeconfig'}",
                f"--service-account-private-key-file={keys / 'service-accounts.key'}",
                f"--root-ca-file={keys / 'ca.crt'}",
                f"--cluster-signing-cert-file={keys / 'ca.crt'}",
                f"--cluster-signing-key-file={keys / 'ca.key'}",
                f"--cluster-cidr={POD_CIDR}",
                "--allocate-node-cidrs=true",
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                loopback,
            ),
        ),
        Daemon(
            "kube-scheduler",
            (
                str(binaries.path("kube-scheduler")),
                f"--kubeconfig={config / 'scheduler.kubeconfig'}",
                "--leader-elect=false",
                loopback,
            ),
        ),
    ]


def http_ok(host: str, port: int, path: str) -> bool:
    """Whether a daemon's own health page says 200."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def standalone(folder: Path) -> ControlPlane:
    """A control plane of its own in a folder."""
    root = folder.resolve()
    return ControlPlane(State(root, root / "run"))
