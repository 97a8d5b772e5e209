"""Brings a bare Debian 12 to a working `.venv`: compiler, locked packages, Octavo itself.

Standard library only: it runs before anything is installed. Doing it again costs a second:
each part has a stamp made of what it depends on.

    python3 tools/setup.py          # make setup
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
UV_VERSION = "0.13.9"
MIN_PYTHON = (3, 11)


def cache_dir() -> Path:
    """Folder shared by all checkouts of this user; same rule as e2e/cluster."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
    return Path(os.environ.get("OCTAVO_CACHE") or fallback)


def fail(sentence: str) -> None:
    """End with one sentence that says what is missing and how to get it."""
    sys.exit(f"setup: {sentence}")


def run(*command: str | Path, **env: str) -> None:
    """Run a command, quietly unless it fails."""
    done = subprocess.run(
        [str(c) for c in command], cwd=ROOT, env=os.environ | env, text=True, capture_output=True
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-8000:], sep="\n", file=sys.stderr)
        fail(f"`{' '.join(map(str, command))}` failed, exit code {done.returncode} (see above)")


def digest(paths: Iterable[Path], *extra: str) -> str:
    """Hash of file names and contents, and of whatever else the result depends on."""
    h = hashlib.sha256("\0".join(extra).encode())
    for path in sorted(paths):
        h.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


def ensure_system_packages() -> None:
    """A C++ compiler, Python's headers and its venv module; installed by apt where missing."""
    if sys.version_info < MIN_PYTHON:
        fail(
            f"Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is needed, this is "
            f"{sys.version.split()[0]}: `apt-get install python3` on Debian 12"
        )
    missing = []
    if not shutil.which("g++"):
        missing.append("g++")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("python3-dev")
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode:
        missing.append("python3-venv")
    if not missing:
        return
    command = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid() or not shutil.which("apt-get"):
        fail(f"missing {', '.join(missing)}; install with `{command}` as root")
    run("apt-get", "update", "-q")
    run(*command.split(), DEBIAN_FRONTEND="noninteractive")


def ensure_uv() -> Path:
    """The installer: it hard-links packages from a cache, so a second checkout takes seconds."""
    home = cache_dir() / f"uv-{UV_VERSION}"
    uv = home / "bin" / "uv"
    if not uv.exists():
        run(sys.executable, "-m", "venv", "--clear", home)
        run(home / "bin" / "pip", "install", "--quiet", f"uv=={UV_VERSION}")
    return uv


def stamped(name: str, value: str) -> bool:
    """Whether the part was done with exactly this input."""
    stamp = VENV / f".octavo-{name}"
    return stamp.exists() and stamp.read_text() == value


def sync_packages(uv: Path) -> None:
    """The venv, exactly as requirements/dev.lock says."""
    lock = ROOT / "requirements" / "dev.lock"
    value = digest([lock], sys.version, sys.prefix)
    if stamped("packages", value):
        return
    if not stamped("python", sys.version):
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", VENV)
        (VENV / ".octavo-python").write_text(sys.version)
    (VENV / ".octavo-editable").unlink(missing_ok=True)  # syncing takes out what no lock names
    run(
        uv,
        "pip",
        "sync",
        "--quiet",
        "--python",
        VENV / "bin" / "python",
        "--require-hashes",
        lock,
        UV_CONCURRENT_INSTALLS="2",
    )
    (VENV / ".octavo-packages").write_text(value)


def install_octavo(uv: Path) -> None:
    """Octavo itself, editable; built again only when native code or packaging changed."""
    native = [
        p
        for p in (ROOT / "kernels").rglob("*")
        if p.suffix in {".cpp", ".h", ".cuh", ".cu", ".txt", ".cmake"} and p.is_file()
    ]
    modules = [
        str(p.relative_to(ROOT))
        for d in ("operator", "server", "kernels")
        for p in sorted((ROOT / d).rglob("*.py"))
    ]
    once = ROOT / "tools" / "compile_once.py"
    value = digest([*native, once, ROOT / "pyproject.toml"], str(ROOT), *modules)
    if stamped("editable", value):
        return
    run(
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        VENV / "bin" / "python",
        "--no-deps",
        "--no-build-isolation",
        f"--config-settings=cmake.define.CMAKE_CUDA_COMPILER_LAUNCHER={sys.executable};{once}",
        "--editable",
        ".",
        PATH=f"{VENV / 'bin'}:{os.environ['PATH']}",
    )
    (VENV / ".octavo-editable").write_text(value)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """One setup at a time in a checkout; the second one waits, and then has little to do."""
    with (ROOT / "tools" / "setup.py").open() as itself:
        fcntl.flock(itself, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Everything that a test needs, short of a cluster."""
    ensure_system_packages()
    with only_one():
        uv = ensure_uv()
        sync_packages(uv)
        install_octavo(uv)


if __name__ == "__main__":
    main()
