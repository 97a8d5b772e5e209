"""The local image registry, so that a second push sends only the layers that changed."""

from __future__ import annotations

import http.client
import json
import sys

from e2e.cluster.paths import HERE, cache_dir
from e2e.cluster.processes import Daemon

HOST, PORT = "127.0.0.1", 5000
ADDRESS = f"{HOST}:{PORT}"
ACCEPT = (
    "application/vnd.oci.image.manifest.v1+json,"
    "application/vnd.docker.distribution.manifest.v2+json"
)


def daemon() -> Daemon:
    """The registry's process; its files lie in the cache."""
    program = (sys.executable, str(HERE / "registry_server.py"))
    return Daemon("registry", (*program, str(PORT), str(cache_dir() / "registry")))


def _ask(method: str, path: str) -> tuple[int, bytes]:
    """Status and body; status 0 while nobody answers."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=10)
    try:
        connection.request(method, path, headers={"Accept": ACCEPT})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def answers() -> bool:
    """Whether the registry serves."""
    return _ask("GET", "/v2/")[0] == 200


def holds(repository: str, tag: str) -> bool:
    """Whether an image is there with all its layers."""
    status, body = _ask("GET", f"/v2/{repository}/manifests/{tag}")
    if status != 200:
        return False
    manifest = json.loads(body)
    digests = [part["digest"] for part in [manifest["config"], *manifest["layers"]]]
    return all(_ask("HEAD", f"/v2/{repository}/blobs/{d}")[0] == 200 for d in digests)
