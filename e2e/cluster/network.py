"""The node's bridge, the kernel's switches, and the firewall rules that must go when it goes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from e2e.cluster.controlplane import BRIDGE_ADDRESS
from e2e.cluster.errors import ClusterError

BRIDGE, NODE_CIDR, FIRST_ADDRESS = "octavo0", "10.244.0.0/24", "10.244.0.10"
PREFIX_LENGTH = 24
FAMILIES = ("iptables", "ip6tables")
COMMENT = "octavo-e2e"
# What we and kube-proxy set, so that `down` can put it back.
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/ipv4/conf/all/route_localnet": None,
}
PROC_SYS = Path("/proc/sys")


def run(*command: str, stdin: str | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(command)}`: exit code {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout


def up(remember: Path) -> None:
    """Bridge, address, forwarding. Former values of the switches go to the file `remember`."""
    if not (PROC_SYS / "net/bridge").exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True)
    if not Path("/sys/class/net", BRIDGE).exists():
        run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "replace", f"{BRIDGE_ADDRESS}/{PREFIX_LENGTH}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    found = {name: PROC_SYS / name for name in SYSCTLS if (PROC_SYS / name).exists()}
    if not remember.exists():
        former = {name: path.read_text().strip() for name, path in found.items()}
        remember.write_text(json.dumps(former))
    for name, path in found.items():
        value = SYSCTLS[name]
        if value is not None and path.read_text().strip() != value:
            path.write_text(value)
    for direction in ("-i", "-o"):
        rule = ["FORWARD", direction, BRIDGE, "-m", "comment", "--comment", COMMENT]
        rule += ["-j", "ACCEPT"]
        if subprocess.run(["iptables", "-w", "-C", *rule], capture_output=True).returncode:
            run("iptables", "-w", "-I", *rule)


def cleanup_script(saved: str) -> str:
    """Turn the output of iptables-save into an iptables-restore script that removes what is ours.

    Ours are the chains of kube-proxy and kubelet (KUBE-…), the CNI bridge's chains for our network
    (found by their comment) with all rules that jump to them, and our own rules, by their comment.
    """
    script: list[str] = []
    for table, body in re.findall(r"^\*(\w+)\n(.*?)^COMMIT$", saved, re.MULTILINE | re.DOTALL):
        lines = body.splitlines()
        chains = {line[1:].split()[0] for line in lines if line.startswith(":")}
        cni = {
            name
            for line in lines
            if 'name: \\"octavo\\"' in line
            for name in re.findall(r"-j (CNI-[0-9a-f]+)|^-A (CNI-[0-9a-f]+)", line)
            for name in name
            if name
        }
        ours = {chain for chain in chains if chain.startswith("KUBE-")} | (cni & chains)
        rules = [line for line in lines if line.startswith("-A ") and _is_ours(line, ours)]
        if ours or rules:
            script += [f"*{table}"]
            script += [f"-D {line[3:]}" for line in rules]
            script += [f"-F {chain}" for chain in sorted(ours)]
            script += [f"-X {chain}" for chain in sorted(ours)]
            script += ["COMMIT"]
    return "\n".join(script) + "\n" if script else ""


def _is_ours(rule: str, chains: set[str]) -> bool:
    """A rule in somebody else's chain that is there because of us."""
    if rule.split()[1] in chains:
        return False  # flushed with its chain
    target = re.search(r" -[jg] (\S+)", rule)
    return f"--comment {COMMENT} " in rule or bool(target and target.group(1) in chains)


def down(remember: Path, run_folder: Path) -> None:
    """Remove rules, bridge and leases; put the kernel's switches back."""
    for family in FAMILIES:
        if not shutil.which(f"{family}-save"):
            continue
        script = cleanup_script(run(f"{family}-save"))
        if script:
            run(f"{family}-restore", "-w", "--noflush", stdin=script)
    if Path("/sys/class/net", BRIDGE).exists():
        run("ip", "link", "delete", BRIDGE)
    if remember.exists():
        for name, value in json.loads(remember.read_text()).items():
            path = PROC_SYS / name
            if path.exists() and path.read_text().strip() != value:
                path.write_text(value)
        remember.unlink()
    for record in Path("/var/lib/cni/results").glob("*"):
        if str(run_folder) in record.read_text(errors="replace"):  # the path of a pod's namespace
            record.unlink()
