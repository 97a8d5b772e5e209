"""The whole cluster: `up`, `down`, `status`. Each can be interrupted anywhere and run again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e.cluster import binaries, controlplane, doctor, kernel, network, owner, processes, registry
from e2e.cluster.api import Api
from e2e.cluster.controlplane import BRIDGE_ADDRESS, ControlPlane
from e2e.cluster.errors import ClusterError, DaemonEndedError
from e2e.cluster.node import Node
from e2e.cluster.paths import CHECKOUT, CLUSTER, LOCK, OWNER_FILE
from e2e.cluster.processes import Daemon
from e2e.cluster.steps import say, step, wait_until

PLANE = ControlPlane(CLUSTER, whole=True)
NODE = Node(CLUSTER)
# While this file is there, what runs is about to end.
STOPPING = CLUSTER.run / "stopping"
FORMER_SYSCTLS = CLUSTER.root / "former-sysctls.json"


def up(*, take_over: bool) -> None:
    """Everything, from packages to a node that is Ready."""
    if os.geteuid():
        raise ClusterError(
            "`up` needs root for the bridge, the mounts and the containers: use sudo"
        )
    doctor.install_packages()
    sentences = doctor.refusals()
    if sentences:
        raise ClusterError(
            "this machine cannot be a node:\n" + "\n".join(f"- {s}" for s in sentences)
        )
    binaries.build()
    with owner.only_one(LOCK):
        idle = not processes.daemons(CLUSTER.root)  # its processes ended without a `down`
        owner.claim(OWNER_FILE, CHECKOUT, take_over=take_over or idle)
        CLUSTER.prepare()
        if STOPPING.exists():
            with step("finish an interrupted `down`"):
                NODE.end()
            STOPPING.unlink()
        adopted = bool(processes.daemons(CLUSTER.root))
        try:
            _bring_up()
        except DaemonEndedError as error:
            if not adopted:
                raise
            say(f"  {error.name} was about to end: ending the rest, then all of it anew")
            NODE.end()
            _bring_up()
    say(f"cluster up; export KUBECONFIG={CLUSTER.kubeconfig}")


def _bring_up() -> None:
    with step("bridge and control groups"):
        network.up(FORMER_SYSCTLS)
        kernel.create_group()
    NODE.configure()
    with ThreadPoolExecutor() as pool:
        head = pool.submit(PLANE.up)
        parts = [pool.submit(part) for part in (_start_runtime, _start_registry)]
        api = head.result()
        for part in parts:
            part.result()
    _start_rest(api)


def _start(daemon: Daemon) -> bool:
    return processes.ensure(daemon, CLUSTER.root, CLUSTER.logs)


def _all_run(*daemons: Daemon) -> Callable[[], None]:
    return processes.all_run(daemons, CLUSTER.root, CLUSTER.logs)


def _start_runtime() -> None:
    with step("containerd"):
        daemon = NODE.containerd()
        _start(daemon)
        wait_until(NODE.runtime_answers, "containerd", timeout=60, check=_all_run(daemon))
        NODE.import_pause()


def _start_registry() -> None:
    with step("image registry"):
        daemon = registry.daemon()
        if daemon.name not in processes.daemons(CLUSTER.root) and registry.answers():
            raise ClusterError(
                f"something else serves on {registry.ADDRESS}, where the image registry must be: "
                f"find it with `ss -ltnp 'sport = :{registry.PORT}'` and end it"
            )
        _start(daemon)
        wait_until(registry.answers, "the image registry", timeout=20, check=_all_run(daemon))


def _start_rest(api: Api) -> None:
    agents = NODE.agents()
    with step("controllers, kubelet, kube-proxy, DNS"):
        NODE.allow_dns(api)
        for daemon in controlplane.controllers(CLUSTER):
            _start(daemon)
        if not processes.running(agents[0], CLUSTER.root):
            NODE.forget_readiness(api)
        for daemon in agents:
            _start(daemon)
    with step("node Ready"):
        everything = [*controlplane.controllers(CLUSTER), *agents]
        wait_until(
            lambda: NODE.ready(api) and _dns_ready() and _can_run_pods(api),
            "a Ready node, DNS and the default service account",
            timeout=90,
            check=_all_run(*everything),
        )


def _dns_ready() -> bool:
    """CoreDNS says so once it has the cluster's names."""
    return controlplane.http_ok(BRIDGE_ADDRESS, 8181, "/ready")


def _can_run_pods(api: Api) -> bool:
    """The controller manager made the default namespace's service account."""
    return api.get("/api/v1/namespaces/default/serviceaccounts/default") is not None


def down(*, purge: bool) -> None:
    """End every process, container, mount, rule and group that `up` made; keep the state."""
    if os.geteuid():
        raise ClusterError("`down` needs root, as `up` did: use sudo")
    with owner.only_one(LOCK):
        if not CLUSTER.root.exists():
            say("cluster: nothing to bring down")
            return
        owner.require(OWNER_FILE, CHECKOUT)
        CLUSTER.prepare()
        STOPPING.touch()
        with step("pods and daemons"):
            NODE.end()
        with step("network"):
            network.down(FORMER_SYSCTLS, CLUSTER.run)
        shutil.rmtree(CLUSTER.run, ignore_errors=True)
        OWNER_FILE.unlink(missing_ok=True)
        if purge:
            with step("state removed"):
                shutil.rmtree(CLUSTER.root)
    say("cluster down" + ("" if purge else "; its state is kept, `down --purge` removes it"))


def status() -> bool:
    """Print what runs; true when the node can run pods."""
    found = {name: process.pid for name, process in processes.daemons(CLUSTER.root).items()}
    names = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "containerd"]
    names += ["kubelet", "kube-proxy", "coredns", "registry"]
    for name in names:
        print(f"{name:<26}{found.get(name, 'not running')}")
    api = PLANE.api()
    ready = api is not None and api.ready() and NODE.ready(api)
    print(f"{'node':<26}{'Ready' if ready else 'not Ready'}")
    print(f"{'owner':<26}{OWNER_FILE.read_text().strip() if OWNER_FILE.exists() else 'nobody'}")
    print(f"{'kubeconfig':<26}{CLUSTER.kubeconfig if CLUSTER.kubeconfig.exists() else 'none'}")
    return ready and all(name in found for name in names)


def fake_gpus(count: int) -> None:
    """Announce GPUs that are not there."""
    api = PLANE.api()
    if api is None or not api.ready():
        raise ClusterError("no cluster is up: run `python3 e2e/cluster/cli.py up` first")
    NODE.fake_gpus(api, count)
    say(f"the node announces {count} nvidia.com/gpu until kubelet registers it anew")


def kubeconfig() -> Path:
    """The kubeconfig of the cluster; ClusterError when there is none."""
    if not CLUSTER.kubeconfig.exists():
        raise ClusterError("no cluster is up: run `python3 e2e/cluster/cli.py up` first")
    return CLUSTER.kubeconfig
