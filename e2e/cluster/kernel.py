"""The kernel's side of containers: control groups (both versions), mounts, capabilities."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from e2e.cluster.errors import ClusterError

CGROUPS = Path("/sys/fs/cgroup")
GROUP = "octavo-e2e"
V2_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io")
CAP_SYS_RESOURCE = 24


def is_cgroup_v2() -> bool:
    """Whether the machine has the unified hierarchy only."""
    return (CGROUPS / "cgroup.controllers").exists()


def _hierarchies() -> list[Path]:
    """The mounted hierarchies: one on v2, one for each controller on v1."""
    if is_cgroup_v2():
        return [CGROUPS]
    return sorted(path for path in CGROUPS.iterdir() if (path / "cgroup.procs").exists())


def create_group() -> None:
    """Make our control group in every hierarchy; kubelet wants its root to exist."""
    if is_cgroup_v2():
        available = (CGROUPS / "cgroup.controllers").read_text().split()
        enable = " ".join(f"+{name}" for name in V2_CONTROLLERS if name in available)
        (CGROUPS / "cgroup.subtree_control").write_text(enable)
    for hierarchy in _hierarchies():
        group = hierarchy / GROUP
        group.mkdir(exist_ok=True)
        # A new v1 cpuset is empty, and nothing can run in it.
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not is_cgroup_v2() and (group / name).exists():
                (group / name).write_text((hierarchy / name).read_text())


def _members() -> set[int]:
    """Processes in our groups."""
    pids: set[int] = set()
    for hierarchy in _hierarchies():
        for procs in (hierarchy / GROUP).rglob("cgroup.procs"):
            try:
                pids.update(int(line) for line in procs.read_text().split())
            except OSError:
                continue  # the group went away meanwhile
    return pids - {0}


def end_group(timeout: float = 15.0) -> None:
    """Kill every process in our groups, then remove the groups."""
    deadline = time.monotonic() + timeout
    while members := _members():
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise ClusterError(f"containers still running after SIGKILL: processes {members}")
        time.sleep(0.05)
    for hierarchy in _hierarchies():
        top = hierarchy / GROUP
        groups = [path for path in top.rglob("*") if path.is_dir()] if top.exists() else []
        for group in [*sorted(groups, key=lambda path: -len(path.parts)), top]:
            _remove_group(group, deadline)


def _remove_group(group: Path, deadline: float) -> None:
    """A group is busy for some milliseconds after its last process ended."""
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def mounts_below(folders: list[Path], mountinfo: str) -> list[str]:
    """Mount points below our folders, the deepest first."""
    points = [line.split()[4] for line in mountinfo.splitlines() if len(line.split()) > 4]
    points = [p.replace("\\040", " ") for p in points]
    prefixes = tuple(f"{folder}/" for folder in folders)
    return [point for point in reversed(points) if point.startswith(prefixes)]


def unmount_below(folders: list[Path]) -> None:
    """Unmount all of it; mounts can lie on mounts, so look again until none is left."""
    for _ in range(5):
        points = mounts_below(folders, Path("/proc/self/mountinfo").read_text())
        if not points:
            return
        for point in points:
            subprocess.run(["umount", "--lazy", point], capture_output=True)
    raise ClusterError(f"cannot unmount {points}: look with `fuser -vm PATH`")


def has_capability(status: str, number: int) -> bool:
    """Whether a /proc/PID/status lists a capability as effective."""
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def may_lower_oom_score() -> bool:
    """False in many containers and micro-VMs."""
    return has_capability(Path("/proc/self/status").read_text(), CAP_SYS_RESOURCE)
