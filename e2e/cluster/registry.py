"""The local image registry, so that a second push sends only the layers that changed."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_dir
from e2e.cluster.processes import Daemon

HOST, PORT = "127.0.0.1", 5000
ADDRESS = f"{HOST}:{PORT}"
ACCEPT = (
    "application/vnd.oci.image.manifest.v1+json,"
    "application/vnd.docker.distribution.manifest.v2+json"
)


def daemon() -> Daemon:
    """The registry's process; its blobs lie in the cache."""
    disk = cache_dir() / "registry"
    disk.mkdir(parents=True, exist_ok=True)
    argv = ("registry", "serve", f"--address={ADDRESS}", f"--disk={disk}")
    return Daemon("registry", (str(binaries.path("crane")), *argv))


def _ask(
    method: str, path: str, body: bytes | None = None, kind: str = ""
) -> tuple[int, str, bytes]:
    """Status, content type and body; status 0 while nobody answers."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=10)
    headers = {"Accept": ACCEPT} | ({"Content-Type": kind} if kind else {})
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    except (OSError, http.client.HTTPException):
        return 0, "", b""
    finally:
        connection.close()


def answers() -> bool:
    """Whether the registry serves."""
    return _ask("GET", "/v2/")[0] == 200


def holds(repository: str, tag: str) -> bool:
    """Whether an image is there with all its layers."""
    status, _, body = _ask("GET", f"/v2/{repository}/manifests/{tag}")
    if status != 200:
        return False
    manifest = json.loads(body)
    digests = [part["digest"] for part in [manifest["config"], *manifest["layers"]]]
    return all(_ask("HEAD", f"/v2/{repository}/blobs/{d}")[0] == 200 for d in digests)


def _manifests() -> Path:
    return cache_dir() / "registry-manifests"


def remember(repository: str, tag: str) -> None:
    """Keep a manifest beside the blobs: the registry itself forgets its tags when it ends."""
    status, kind, body = _ask("GET", f"/v2/{repository}/manifests/{tag}")
    if status != 200:
        raise ClusterError(f"the registry does not have {repository}:{tag} after its push")
    file = _manifests() / f"{repository}@{tag}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"kind": kind, "body": body.decode()}))


def restore() -> None:
    """Give a registry that was just started the tags that it had."""
    for file in sorted(_manifests().glob("*@*.json")):
        repository, tag = file.stem.split("@")
        kept = json.loads(file.read_text())
        path = f"/v2/{repository}/manifests/{tag}"
        _ask("PUT", path, kept["body"].encode(), kept["kind"])
