"""The few calls that the tool itself makes to the API server: get, apply, patch."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.errors import ClusterError

Json = dict[str, Any]


@dataclass(frozen=True)
class Api:
    """An API server on loopback, talked to as administrator."""

    port: int
    pki: Path

    def request(
        self, method: str, path: str, body: object = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and body of the answer; OSError or HTTPException while nobody listens."""
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(str(self.pki / "admin.crt"), str(self.pki / "admin.key"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=5)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ready(self) -> bool:
        """Whether the server says that it is ready."""
        try:
            return self.request("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> Json | None:
        """The object at a path, or None when there is none (or no server to ask)."""
        try:
            status, body = self.request("GET", path)
        except (OSError, http.client.HTTPException):
            return None
        return json.loads(body) if status == 200 else None

    def _change(self, method: str, path: str, body: object, kind: str) -> None:
        try:
            status, answer = self.request(method, path, body, kind)
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(
                f"{method} {path}: the API server does not answer: {error}"
            ) from error
        if status not in {200, 201}:
            raise ClusterError(f"{method} {path}: {status} {answer.decode(errors='replace')}")

    def apply(self, path: str, body: Json) -> None:
        """Server-side apply of one object."""
        query = "?fieldManager=octavo-e2e&force=true"
        self._change("PATCH", path + query, body, "application/apply-patch+yaml")

    def patch(self, path: str, operations: list[Json]) -> None:
        """A JSON patch."""
        self._change("PATCH", path, operations, "application/json-patch+json")
