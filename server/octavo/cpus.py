"""How many CPUs this process may use: its affinity and its control group's quota."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


def cpu_limit(root: Path = CGROUP_ROOT, membership: Path = PROC_CGROUP) -> int:
    """CPUs this process may really use: the smaller of affinity and cgroup quota, at least 1."""
    cpus = float(len(os.sched_getaffinity(0)))
    return max(1, int(min([cpus, *_quotas(root, membership)])))


def _quotas(root: Path, membership: Path) -> list[float]:
    """Every CPU quota above this process, in CPUs, under cgroup v2 and v1."""
    quotas = []
    for folder in _cgroup_folders(root, membership):
        v2 = _numbers(folder / "cpu.max")
        v1 = [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
        # Without a limit v2 says "max" (no number but the period) and v1 says -1.
        quotas += [q[0] / q[1] for q in (v2, v1) if len(q) == 2 and q[0] > 0 and q[1] > 0]
    return quotas


def _cgroup_folders(root: Path, membership: Path) -> list[Path]:
    """The folders of this process's CPU cgroup and of all its ancestors.

    In a container the membership often names a path of the host that is not mounted here; then
    the mount's top folder is the container's own group.
    """
    folders = []
    for line in text_of(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu" if (root / "cpu").is_dir() else root / controllers
        else:
            continue
        folder = base / path.lstrip("/")
        folders += [folder, *(p for p in folder.parents if p.is_relative_to(base))]
    return folders


def text_of(path: Path) -> str:
    """A file's text; nothing where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(path: Path) -> list[float]:
    words = text_of(path).split()
    return [float(w) for w in words if w.lstrip("-").isdigit()]
