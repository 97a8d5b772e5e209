"""The pause image, which holds a pod's namespaces: a static C program and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import TEMPLATES, cache_dir

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
SOURCE = TEMPLATES / "pause.c"


def reference() -> str:
    """The image's name; its tag is the hash of its source."""
    return f"localhost/octavo-pause:{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"


def _compile() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "pause")
        command = ["gcc", "-Os", "-static", "-s", "-o", str(program), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"`{' '.join(command)}` failed:\n{done.stderr}")
        return program.read_bytes()


def _tar(files: dict[str, bytes], mode: int) -> bytes:
    """An archive whose bytes depend on its contents only."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def archive() -> Path:
    """The image as an archive that containerd imports, made on first use."""
    path = cache_dir() / "pause" / f"{reference().rpartition(':')[2]}.tar"
    if path.exists():
        return path
    layer = _tar({"pause": _compile()}, 0o755)
    digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [reference()], "Layers": ["layer.tar"]}]
    files = {
        "layer.tar": layer,
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(_tar(files, 0o644))
    partial.rename(path)
    return path
