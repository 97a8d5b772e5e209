"""An image registry on loopback: blobs and manifests as files, in constant memory.

    python3 registry_server.py PORT FOLDER

The part of the OCI distribution protocol that buildah and containerd use. (The registry in
go-containerregistry holds every upload in memory, 8 GB for a server image, and forgets its tags.)
Blobs lie once for all repositories, under the hash that was checked while they came in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

CHUNK = 1 << 20
NAME = r"(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ROUTES = [
    ("GET|HEAD", re.compile(r"/v2/"), "hello"),
    ("GET|HEAD", re.compile(rf"/v2/{NAME}/blobs/(?P<digest>{DIGEST.pattern})"), "blob"),
    ("POST", re.compile(rf"/v2/{NAME}/blobs/uploads/?"), "begin"),
    ("PATCH", re.compile(rf"/v2/{NAME}/blobs/uploads/(?P<upload>[0-9a-f]+)"), "append"),
    ("PUT", re.compile(rf"/v2/{NAME}/blobs/uploads/(?P<upload>[0-9a-f]+)"), "complete"),
    ("GET|HEAD", re.compile(rf"/v2/{NAME}/manifests/(?P<tag>[\w.:-]+)"), "manifest"),
    ("PUT", re.compile(rf"/v2/{NAME}/manifests/(?P<tag>[\w.:-]+)"), "put_manifest"),
]


@dataclass
class Upload:
    """A blob that is coming in."""

    path: Path
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class Registry(ThreadingHTTPServer):
    """The server and its folders."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, folder: Path) -> None:
        self.folder = folder
        self.uploads: dict[str, Upload] = {}
        shutil.rmtree(folder / "uploads", ignore_errors=True)
        for name in ("sha256", "tags", "uploads"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        super().__init__(("127.0.0.1", port), Handler)

    def blob(self, digest: str) -> Path:
        return self.folder / "sha256" / digest.removeprefix("sha256:")

    def tag(self, name: str, tag: str) -> Path:
        return self.folder / "tags" / f"{name.replace('/', '%')}@{tag}.json"


class Handler(BaseHTTPRequestHandler):
    """One connection; requests are routed by ROUTES to the methods below."""

    protocol_version = "HTTP/1.1"
    server: Registry

    def _route(self) -> None:
        address = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        for methods, pattern, action in ROUTES:
            found = pattern.fullmatch(address.path)
            if found and self.command in methods.split("|"):
                getattr(self, action)(**found.groupdict())
                return
        self._fail(404, "UNSUPPORTED", f"{self.command} {address.path}")

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = _route  # noqa: N815 - named by http.server

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(body))))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str, message: str) -> None:
        # The rest of a body that nobody reads would be taken for the next request.
        self.close_connection = True
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self._answer(status, body, Content_Type="application/json", Connection="close")

    def _body(self) -> Iterator[bytes]:
        """The request's body, piece by piece, in either of HTTP's two framings."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._exactly(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                continue
        else:
            yield from self._exactly(int(self.headers.get("Content-Length") or 0))

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read(min(size, CHUNK))
            if not piece:
                raise ConnectionError("the client went away within a body")
            size -= len(piece)
            yield piece

    def hello(self) -> None:
        self._answer(200, b"{}", Content_Type="application/json")

    def blob(self, name: str, digest: str) -> None:
        path = self.server.blob(digest)
        if not path.exists():
            self._fail(404, "BLOB_UNKNOWN", digest)
            return
        with path.open("rb") as file:
            self._answer(
                200,
                Content_Length=str(path.stat().st_size),
                Content_Type="application/octet-stream",
                Docker_Content_Digest=digest,
            )
            if self.command == "GET":
                self.wfile.flush()
                self.connection.sendfile(file)

    def begin(self, name: str) -> None:
        mount = self.query.get("mount", "")
        if DIGEST.fullmatch(mount) and self.server.blob(mount).exists():
            self._created(name, mount)
            return
        upload = uuid.uuid4().hex
        self.server.uploads[upload] = Upload(self.server.folder / "uploads" / upload)
        self.server.uploads[upload].path.touch()
        self._accepted(name, upload)

    def append(self, name: str, upload: str) -> None:
        found = self.server.uploads.get(upload)
        if found is None:
            self._fail(404, "BLOB_UPLOAD_UNKNOWN", upload)
            return
        self._receive(found)
        self._accepted(name, upload)

    def _receive(self, upload: Upload) -> None:
        with upload.path.open("ab") as file:
            for piece in self._body():
                file.write(piece)
                upload.digest.update(piece)
                upload.size += len(piece)

    def complete(self, name: str, upload: str) -> None:
        found = self.server.uploads.get(upload)
        digest = self.query.get("digest", "")
        if found is None or not DIGEST.fullmatch(digest):
            self._fail(404, "BLOB_UPLOAD_UNKNOWN", f"{upload} {digest}")
            return
        self._receive(found)
        del self.server.uploads[upload]
        if f"sha256:{found.digest.hexdigest()}" != digest:
            found.path.unlink()
            self._fail(400, "DIGEST_INVALID", f"{digest} is not the hash of what came")
            return
        os.replace(found.path, self.server.blob(digest))
        self._created(name, digest)

    def _accepted(self, name: str, upload: str) -> None:
        last = max(self.server.uploads[upload].size - 1, 0)
        location = f"/v2/{name}/blobs/uploads/{upload}"
        self._answer(202, Location=location, Range=f"0-{last}", Docker_Upload_UUID=upload)

    def _created(self, name: str, digest: str) -> None:
        location = f"/v2/{name}/blobs/{digest}"
        self._answer(201, Location=location, Docker_Content_Digest=digest)

    def put_manifest(self, name: str, tag: str) -> None:
        body = b"".join(self._body())
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        kind = self.headers.get("Content-Type", "")
        for path in (self.server.tag(name, tag), self.server.tag(name, digest)):
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            partial.write_text(json.dumps({"kind": kind, "body": body.decode()}))
            os.replace(partial, path)
        self._answer(201, Location=f"/v2/{name}/manifests/{digest}", Docker_Content_Digest=digest)

    def manifest(self, name: str, tag: str) -> None:
        try:
            kept = json.loads(self.server.tag(name, tag).read_text())
        except FileNotFoundError:
            self._fail(404, "MANIFEST_UNKNOWN", f"{name}:{tag}")
            return
        body = kept["body"].encode()
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        self._answer(200, body, Content_Type=kept["kind"], Docker_Content_Digest=digest)


if __name__ == "__main__":
    Registry(int(sys.argv[1]), Path(sys.argv[2])).serve_forever()
