"""What this machine lacks, each with the command that brings it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.cluster.steps import step

MIN_PYTHON = (3, 11)
# What is looked for → the Debian package that brings it.
PROGRAMS = {
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "gcc": "gcc",
    "pkg-config": "pkg-config",
    "openssl": "openssl",
    "ip": "iproute2",
    "iptables": "iptables",
    "mount": "mount",
}
FILES = {
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/include/seccomp.h": "libseccomp-dev",
    "/usr/include/stdlib.h": "libc6-dev",
    "/etc/ssl/certs/ca-certificates.crt": "ca-certificates",
}


def missing_packages() -> list[str]:
    """Debian packages that are needed and not there."""
    lacking = [pkg for name, pkg in PROGRAMS.items() if not shutil.which(name)]
    lacking += [pkg for name, pkg in FILES.items() if not Path(name).exists()]
    return sorted(lacking)


def install_command(packages: list[str]) -> str:
    """The command that installs them on Debian."""
    return f"apt-get install -y --no-install-recommends {' '.join(packages)}"


def install_packages() -> None:
    """Install what is missing, as root on Debian; otherwise say how."""
    packages = missing_packages()
    if not packages:
        return
    command = install_command(packages)
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterError(f"missing {', '.join(packages)}: run `{command}` as root")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with step(f"install {', '.join(packages)}"):
        for line in ("apt-get update -q", command):
            done = subprocess.run(line.split(), env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ClusterError(f"`{line}` failed:\n{(done.stdout + done.stderr)[-3000:]}")


def _works(*command: str) -> bool:
    """Whether a command is there and succeeds."""
    found = shutil.which(command[0])
    return bool(found) and subprocess.run(command, capture_output=True).returncode == 0


def _bridge_works() -> bool:
    """Whether the kernel makes a bridge and a pair of virtual cables."""
    made = _works("ip", "link", "add", "octavo-probe", "type", "bridge")
    cable = _works("ip", "link", "add", "octavo-pr1", "type", "veth", "peer", "name", "octavo-pr2")
    for name in ("octavo-probe", "octavo-pr1"):
        _works("ip", "link", "delete", name)
    return made and cable


def _bridge_rules_work() -> bool:
    """Whether packets across a bridge pass the firewall, on which Service addresses depend."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    return switch.exists() or (_works("modprobe", "br_netfilter") and switch.exists())


def _overlay_works() -> bool:
    _works("modprobe", "overlay")
    return "overlay" in Path("/proc/filesystems").read_text()


def kernel_refusals() -> list[str]:
    """Sentences about a kernel that cannot serve; empty when it can. Needs root and iproute2."""
    checks = [
        (_bridge_works, "the kernel makes no bridge or veth here (`ip link add x type bridge`): "
         "a machine or a privileged container with its own network is needed"),
        (lambda: _works("unshare", "--net", "true"), "no network namespace can be made here "
         "(`unshare --net true`): CAP_SYS_ADMIN is needed"),
        (_bridge_rules_work, "net.bridge.bridge-nf-call-iptables is missing: run `modprobe "
         "br_netfilter` on the machine (the package kmod has modprobe)"),
        (_overlay_works, "the kernel has no overlay filesystem: run `modprobe overlay`"),
        (lambda: _works("iptables", "-w", "-t", "nat", "-S"), "iptables has no nat table here: "
         "CAP_NET_ADMIN and a kernel with nf_tables are needed"),
    ]  # fmt: skip
    return [sentence for works, sentence in checks if not works()]


def refusals() -> list[str]:
    """Everything that is in the way of `up`, one sentence each."""
    sentences: list[str] = []
    if sys.version_info < MIN_PYTHON:
        sentences.append(f"Python {sys.version.split()[0]} is too old: `apt-get install python3`")
    if sys.platform != "linux":
        return [
            f"the node needs Linux, this is {sys.platform}: use CLUSTER=kind or CLUSTER=current"
        ]
    go = binaries.missing_go()
    if go:
        sentences.append(go)
    packages = missing_packages()
    if packages:
        sentences.append(f"missing {', '.join(packages)}: `{install_command(packages)}`")
    if os.geteuid():
        sentences.append("root is needed for the bridge, the mounts and the containers: use sudo")
    elif not packages:
        sentences += kernel_refusals()
    return sentences
