"""Builds the images, pushes them to the local registry, and has the node pull them.

Every image gets a tag made of all its inputs, so that a chart can name exactly this one, and `dev`,
which moves. When the registry still has the tag, nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import registry
from e2e.cluster.errors import ClusterError
from e2e.cluster.node import Node
from e2e.cluster.owner import only_one, require
from e2e.cluster.paths import CHECKOUT, CLUSTER, IMAGES_FILE, IMAGES_LOCK, OWNER_FILE, cache_dir
from e2e.cluster.pki import write_private
from e2e.cluster.steps import say, step

BASE_PACKAGES = "python3,python3-venv,ca-certificates"
MMDEBSTRAP = ("mmdebstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm")
CERTIFICATES = Path("/etc/ssl/certs")
BUNDLE = CERTIFICATES / "ca-certificates.crt"
COMMON_INPUTS = ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE",
                 "requirements/build.lock", "operator", "server")  # fmt: skip
INPUTS = {
    "server": (
        *COMMON_INPUTS,
        "requirements/server.lock",
        "requirements/cuda.lock",
        "kernels",
        "e2e/tinymodel/model",
    ),
    "operator": (*COMMON_INPUTS, "requirements/operator.lock", "kernels/octavo_kernels"),
}
# Time and mode of every file in a build's context: equal content gives equal layers, whatever
# checkout it comes from and whenever that was cloned.
MOMENT = 1_577_836_800
IGNORED = {"__pycache__"}
IGNORED_SUFFIXES = {".pyc", ".so"}


@dataclass(frozen=True)
class Image:
    """One target of the Dockerfile at one state of its inputs."""

    target: str
    tag: str

    @property
    def repository(self) -> str:
        return f"octavo-{self.target}"

    def reference(self, registry_address: str) -> str:
        """The immutable name."""
        return f"{registry_address}/{self.repository}:{self.tag}"


def files(checkout: Path, inputs: Iterable[str]) -> list[Path]:
    """All files below the inputs that a build sees."""
    found: list[Path] = []
    for name in inputs:
        path = checkout / name
        if not path.exists():
            raise ClusterError(f"{path} is missing, and the image cannot be built without it")
        found += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sorted(
        p for p in found if p.suffix not in IGNORED_SUFFIXES and not IGNORED & set(p.parts)
    )


def content_tag(checkout: Path, inputs: Iterable[str], *extra: str) -> str:
    """A hash of the names and contents of all inputs, and of what else the image depends on."""
    digest = hashlib.sha256("\0".join(extra).encode())
    for path in files(checkout, inputs):
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(f"{path.relative_to(checkout)}\0".encode() + content)
    return digest.hexdigest()[:12]


def snapshot(checkout: Path, inputs: Iterable[str], target: Path) -> None:
    """Copy the inputs: what is hashed is what is built, also when somebody edits meanwhile."""
    shutil.rmtree(target, ignore_errors=True)
    for path in files(checkout, inputs):
        copy = target / path.relative_to(checkout)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        os.utime(copy, (MOMENT, MOMENT))
    for folder in [target, *(p for p in target.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
        os.utime(folder, (MOMENT, MOMENT))


def base_image() -> str:
    """$OCTAVO_BASE_IMAGE, or the Debian base that is made here."""
    key = hashlib.sha256(" ".join(MMDEBSTRAP).encode()).hexdigest()[:12]
    return os.environ.get("OCTAVO_BASE_IMAGE") or f"localhost/octavo-base:{key}"


def _buildah(*args: str) -> str:
    """Run buildah over storage of our own in the cache; the machine's own is not touched."""
    storage = cache_dir() / "buildah"
    scratch = storage / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    place = ["--root", str(storage / "root"), "--runroot", "/run/octavo-buildah"]
    done = subprocess.run(
        ["buildah", *place, "--storage-driver", "overlay", *args],
        cwd=CHECKOUT, env=os.environ | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ClusterError(
            f"`buildah {' '.join(args)}`: exit code {done.returncode}:\n{done.stdout[-4000:]}"
        )
    return done.stdout


def _ensure_base(name: str) -> None:
    """Make the Debian base unless it is there, or the user named another."""
    if not name.startswith("localhost/octavo-base:"):
        return
    if name in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return
    folder = cache_dir() / "base" / name.rpartition(":")[2]
    archive = folder / "base.tar"
    if not archive.exists():
        with step("Debian base (mmdebstrap)"):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / "partial.tar"
            done = subprocess.run([*MMDEBSTRAP, str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise ClusterError(f"mmdebstrap failed:\n{done.stderr[-3000:]}")
            partial.rename(archive)
    with step("Debian base as an image"):
        (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        _buildah("bud", "--isolation", "chroot", "--tag", name, str(folder))


def _build(image: Image, context: Path, base: str, name: str) -> None:
    """One target, with the machine's certificates and package index for the build only."""
    options = ["--isolation", "chroot", "--layers", "--target", image.target, "--tag", name]
    # The cluster has no GPU, and its kernels take minutes to compile.
    options += ["--build-arg", f"BASE_IMAGE={base}", "--build-arg", "OCTAVO_CUDA=OFF"]
    if BUNDLE.exists():
        # A proxy that inspects TLS signs with an authority only this machine knows.
        options += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        options += ["--build-arg", f"PIP_CERT={BUNDLE}"]
    if index := os.environ.get("PIP_INDEX_URL"):
        options += ["--build-arg", f"PIP_INDEX_URL={index}"]
    _buildah("bud", *options, str(context))


def _push(name: str, reference: str) -> None:
    """Fast compression: the layers are gigabytes, and the default takes minutes over them."""
    fast = ["--compression-format", "zstd", "--compression-level", "1"]
    _buildah("push", "--tls-verify=false", *fast, name, f"docker://{reference}")


def _pull(node: Node, reference: str) -> None:
    """Have the image on the node before the first pod asks for it."""
    have = node.ctr("images", "list", "-q").stdout.split()
    if reference in have:
        return
    done = node.ctr("images", "pull", "--plain-http", reference)
    if done.returncode:
        raise ClusterError(f"the node cannot pull {reference}: {done.stderr.strip()[-2000:]}")


def build_and_push(targets: list[str]) -> dict[str, str]:
    """References by target, recorded in images.json of the cluster's state."""
    if os.geteuid():
        raise ClusterError("images are built by root (buildah, overlay mounts): use sudo")
    require(OWNER_FILE, CHECKOUT)
    if not shutil.which("buildah"):
        raise ClusterError("no buildah: `apt-get install -y --no-install-recommends buildah`")
    if not registry.answers():
        raise ClusterError("the registry is not up: run `python3 e2e/cluster/cli.py up` first")
    with only_one(IMAGES_LOCK):
        return _all(targets)


def _all(targets: list[str]) -> dict[str, str]:
    base, references = base_image(), recorded()
    for target in targets:
        context = cache_dir() / "buildah" / "context" / target
        snapshot(CHECKOUT, INPUTS[target], context)
        image = Image(target, content_tag(context, INPUTS[target], base))
        reference = image.reference(registry.ADDRESS)
        if registry.holds(image.repository, image.tag):
            say(f"  {reference} is there, unchanged")
        else:
            _make(image, context, base, reference)
        node = Node(CLUSTER)
        if node.runtime_answers():
            with step(f"{target}: on the node"):
                _pull(node, reference)
        references[target] = reference
        write_private(IMAGES_FILE, json.dumps(references, indent=1) + "\n")
    return references


def _make(image: Image, context: Path, base: str, reference: str) -> None:
    _buildah("rm", "--all")  # what an interrupted build left
    name = f"localhost/{image.repository}:{image.tag}"
    _ensure_base(base)
    with step(f"{image.target}: build"):
        _build(image, context, base, name)
    with step(f"{image.target}: push"):
        _push(name, reference)
        _push(name, f"{registry.ADDRESS}/{image.repository}:dev")


def forget_builds() -> None:
    """Give back the disk of all builds; the next one is cold."""
    with only_one(IMAGES_LOCK), step("build storage and registry emptied"):
        if (cache_dir() / "buildah").exists() and shutil.which("buildah"):
            _buildah("rm", "--all")
            _buildah("rmi", "--all", "--force")
            shutil.rmtree(cache_dir() / "buildah")
        for name in ("sha256", "tags"):
            for path in (cache_dir() / "registry" / name).glob("*"):
                path.unlink()


def recorded() -> dict[str, str]:
    """The references of the last `images`, by target."""
    return read_references(IMAGES_FILE)


def read_references(file: Path) -> dict[str, str]:
    """References by target; none when there is no such file or it is torn."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {target: reference for target, reference in found.items() if target in INPUTS}


def checked_targets(names: list[str]) -> list[str]:
    """The named images, or all."""
    for name in names:
        if name not in INPUTS:
            raise ClusterError(f"no image is called {name}; there are {', '.join(INPUTS)}")
    return names or sorted(INPUTS)
