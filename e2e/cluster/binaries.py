"""Builds every binary from pinned Go modules, once per change of the pins.

A module folder under modules/ holds go.mod and go.sum (and for CoreDNS a main.go of our own with
few plugins). Its binaries lie in the cache under a hash of these files and the build flags, so a
fresh checkout finds them built.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import MODULES, cache_dir
from e2e.cluster.steps import step

MIN_GO = (1, 26)
STRIP = "-s -w"


@dataclass(frozen=True)
class Module:
    """One pinned module and the commands built from it. Of several, each has its package's name."""

    name: str
    packages: dict[str, str]
    ldflags: str = STRIP
    tags: str = ""
    cgo: bool = False

    @property
    def folder(self) -> Path:
        return MODULES / self.name


def pinned_version(go_mod: str, module: str) -> str:
    """The version that a go.mod requires of a module."""
    found = re.search(rf"^(?:require)?\s+{re.escape(module)} (v\S+)", go_mod, re.MULTILINE)
    if not found:
        raise ClusterError(f"go.mod requires no {module}: run `go mod tidy` in its folder")
    return found.group(1)


def _kubernetes() -> Module:
    """Without these flags the API server calls itself v0.0.0 and clients take it for ancient."""
    version = pinned_version((MODULES / "kubernetes" / "go.mod").read_text(), "k8s.io/kubernetes")
    major, minor = version.removeprefix("v").split(".")[:2]
    base, client = "k8s.io/component-base/version", "k8s.io/client-go/pkg/version"
    stamps = {
        f"{base}.gitVersion": version,
        f"{base}.gitMajor": major,
        f"{base}.gitMinor": minor,
        f"{client}.gitVersion": version,
    }
    commands = ("apiserver", "controller-manager", "scheduler", "proxy")
    names = [*(f"kube-{command}" for command in commands), "kubelet", "kubectl"]
    return Module(
        "kubernetes",
        {name: f"k8s.io/kubernetes/cmd/{name}" for name in names},
        " ".join([STRIP, *(f"-X {key}={value}" for key, value in stamps.items())]),
    )


def modules() -> list[Module]:
    """All of them, those that tests need first coming first."""
    containerd = "github.com/containerd/containerd/v2/cmd"
    return [
        Module("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}),
        _kubernetes(),
        Module(
            "containerd",
            {n: f"{containerd}/{n}" for n in ("containerd", "containerd-shim-runc-v2", "ctr")},
        ),
        Module("runc", {"runc": "github.com/opencontainers/runc"}, tags="seccomp", cgo=True),
        Module("coredns", {"coredns": "."}),
        Module("helm", {"helm": "helm.sh/helm/v4/cmd/helm"}),
    ]


def key(module: Module) -> str:
    """What the binaries depend on: the pins, our own source, the flags, the machine's kind."""
    digest = hashlib.sha256()
    for path in sorted(module.folder.iterdir()):
        if path.name in {"go.mod", "go.sum"} or path.suffix == ".go":
            digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    parts = [module.ldflags, module.tags, str(module.cgo), platform.machine(), str(module.packages)]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:16]


def folder(module: Module) -> Path:
    """Where the module's binaries lie once built."""
    return cache_dir() / "bin" / f"{module.name}-{key(module)}"


def go_version(text: str) -> tuple[int, int] | None:
    """(1, 26) of `go1.26.8`; None when the text is something else."""
    found = re.match(r"go(\d+)\.(\d+)", text.strip())
    return (int(found.group(1)), int(found.group(2))) if found else None


def missing_go() -> str | None:
    """A sentence when there is no Go that can build these; None when there is."""
    go, advice = (
        shutil.which("go"),
        f"install Go {MIN_GO[0]}.{MIN_GO[1]} or newer from https://go.dev/dl/",
    )
    if not go:
        return f"no `go` on the PATH: {advice}"
    text = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True).stdout
    found = go_version(text)
    if found is None or found < MIN_GO:
        return f"`{go}` is {text.strip() or 'of unknown version'}: {advice}"
    return None


@contextmanager
def _build_lock() -> Iterator[None]:
    """Two checkouts must not build the same thing at once."""
    path = cache_dir() / "bin" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(module: Module) -> None:
    target = folder(module)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    names = list(module.packages)
    out = f"{partial}/" if len(names) > 1 else str(partial / names[0])
    command = ["go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false"]
    command += ["-ldflags", module.ldflags, "-tags", module.tags, "-o", out]
    environment = os.environ | {
        "CGO_ENABLED": "1" if module.cgo else "0",
        "GOFLAGS": "",
        "GOWORK": "off",
    }
    done = subprocess.run(
        [*command, *module.packages.values()],
        cwd=module.folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ClusterError(
            f"go build in {module.folder} failed with exit code {done.returncode}:\n"
            f"{done.stderr[-3000:]}"
        )
    partial.rename(target)


def build(names: Iterable[str] | None = None) -> None:
    """Build the modules that hold the named binaries (all of them by default), where missing."""
    wanted = None if names is None else set(names)
    todo = [m for m in modules() if wanted is None or wanted & set(m.packages)]
    if all(folder(module).exists() for module in todo):
        return
    sentence = missing_go()
    if sentence:
        raise ClusterError(sentence)
    with _build_lock():
        for module in todo:
            if not folder(module).exists():
                with step(f"build {module.name} ({', '.join(module.packages)})"):
                    _build(module)


def forget_old() -> None:
    """Remove the binaries of former pins."""
    current = {folder(module) for module in modules()}
    with _build_lock():
        for found in (cache_dir() / "bin").iterdir():
            if found.is_dir() and found not in current:
                shutil.rmtree(found)


def path(name: str) -> Path:
    """The built binary; ClusterError names the verb that builds it when it is missing."""
    for module in modules():
        if name in module.packages:
            found = folder(module) / name
            if not found.exists():
                raise ClusterError(
                    f"{name} is not built: run `python3 e2e/cluster/cli.py binaries`"
                )
            return found
    known = ", ".join(sorted(name for module in modules() for name in module.packages))
    raise ClusterError(f"no binary is called {name}; there are {known}")


def search_path() -> str:
    """A PATH on which the node's daemons find each other's helpers (shim, runc)."""
    folders = [str(folder(module)) for module in modules()]
    system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    return ":".join([*folders, *system])
