"""How much memory this process may still take: the container's limit, else the host's."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def available_host_bytes(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int:
    """Bytes that can still be used: the smaller of the cgroup's headroom and MemAvailable."""
    bounds = [_headroom(cgroup, "memory.max", "memory.current", "inactive_file")]
    v1 = cgroup / "memory"
    bounds.append(
        _headroom(v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    bounds.append(_meminfo_field(meminfo, "MemAvailable"))
    known = [bound for bound in bounds if bound is not None]
    return max(0, min(known)) if known else 0


def _headroom(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
    """Limit less usage; page cache that the kernel drops when asked does not count as usage."""
    limit, usage = _number(folder / limit_file), _number(folder / usage_file)
    if limit is None or usage is None:
        return None
    return limit - max(0, usage - _stat_field(folder / "memory.stat", reclaimable))


def _number(path: Path) -> int | None:
    """The file's integer; None when it is absent or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat_field(path: Path, field: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == field and value.isdigit():
            return int(value)
    return 0


def _meminfo_field(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
