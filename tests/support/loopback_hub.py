"""A hub on the loopback that speaks both protocols, and can be told to misbehave.

Files of a repository are served through a redirect to a second server, as hubs do with their
stores; both note every request with its headers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Repository:
    """One repository: the files of each commit, and what branches and tags point to."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Hub:
    """The hub's state. Lists named after faults are consumed, one entry a response."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str | None = None
    forbidden: bool = False
    cuts: list[int] = field(default_factory=list)  # bytes after which a file's response ends
    statuses: list[int] = field(default_factory=list)  # answers in place of a file
    ranges: bool = True
    damage: bool = False  # flips a bit of each file's last byte
    sizes: dict[str, int] = field(default_factory=dict)  # what the listing claims
    gate: threading.Event | None = None  # files wait for it after their first half
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    store_url: str = ""

    def add(self, name: str, files: dict[str, bytes], **refs: str) -> str:
        """Add a commit; refs point to it. Returns the commit."""
        text = repr(sorted((n, hashlib.sha256(d).hexdigest()) for n, d in files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}))
        repository.commits[commit] = files
        repository.refs |= {"main": commit, "master": commit} if not refs else {}
        repository.refs |= dict.fromkeys(refs, commit)
        return commit

    def fetched(self) -> list[tuple[str, str | None]]:
        """The files that the store gave out, each with the range asked for."""
        return [(p.rsplit("/", 1)[1], h.get("Range")) for m, p, h in self.requests if m == "STORE"]


def _pointer(data: bytes, size: int) -> dict[str, object]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self) -> bool:
        hub = self.hub
        given = self.headers.get("Authorization", "") + self.headers.get("Cookie", "")
        if hub.forbidden:
            self.reply(403, X_Error_Code="GatedRepo")
        elif hub.token is not None and hub.token not in given:
            self.reply(401, X_Error_Code="RepoNotFound")
        else:
            return False
        return True


class _Front(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        if self.refused():
            return
        parts = urlsplit(self.path)
        words = [unquote(w) for w in parts.path.strip("/").split("/")]
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        if words[:2] == ["api", "models"] and "revision" in words:
            self.hf_listing("/".join(words[2 : words.index("revision")]), words[-1])
        elif words[:2] == ["api", "models"] and "tree" in words:
            at = words.index("tree")
            self.hf_tree("/".join(words[2:at]), words[at + 1])
        elif words[:3] == ["api", "v1", "models"] and words[-1] == "files":
            self.modelscope_listing("/".join(words[3:5]), query["Revision"])
        elif words[:3] == ["api", "v1", "models"]:
            self.file("/".join(words[3:5]), query["Revision"], query["FilePath"])
        elif "resolve" in words:
            at = words.index("resolve")
            self.file("/".join(words[:at]), words[at + 1], "/".join(words[at + 2 :]))
        else:
            self.reply(404)

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        found = repository.files(revision) if repository else None
        if found is None:
            self.reply(404, X_Error_Code="RevisionNotFound" if repository else "RepoNotFound")
        return found

    def hf_listing(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            commit, files = found
            siblings = []
            for path, data in files.items():
                size = self.hub.sizes.get(path, len(data))
                entry = {"rfilename": path, "size": size, "blobId": git_oid(data)}
                if path.endswith(".safetensors"):
                    entry["lfs"] = {
                        "sha256": hashlib.sha256(data).hexdigest(),
                        "size": size,
                        "pointerSize": 134,
                    }
                siblings.append(entry)
            body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
            self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def hf_tree(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            entries = []
            for path, data in found[1].items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
                if path.endswith(".safetensors"):
                    pointer = _pointer(data, len(data))
                    entry["lfs"] = {**pointer, "oid": pointer["sha256"]}
                entries.append(entry)
            self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")

    def modelscope_listing(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            entries = [{"Path": "folder", "Type": "tree", "Size": 0}]
            entries += [
                {
                    "Path": path,
                    "Type": "blob",
                    "Size": self.hub.sizes.get(path, len(data)),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for path, data in found[1].items()
            ]
            body = {"Code": 200, "Success": True, "Data": {"Files": entries}}
            self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def file(self, name: str, revision: str, path: str) -> None:
        if found := self.find(name, revision):
            commit, files = found
            if path not in files:
                self.reply(404, X_Error_Code="EntryNotFound")
                return
            data = files[path]
            lfs = path.endswith(".safetensors")
            etag = hashlib.sha256(data).hexdigest() if lfs else git_oid(data)
            where = f"{self.hub.store_url}/{name}/{commit}/{path}"
            self.reply(
                302,
                Location=where,
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{etag}"',
                X_Linked_Size=str(len(data)),
                ETag=f'"{etag}"',
            )


class _Store(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append(("STORE", self.path, dict(self.headers)))
        words = unquote(self.path).strip("/").split("/")
        data = hub.repositories["/".join(words[:2])].commits[words[2]]["/".join(words[3:])]
        if hub.statuses:
            self.reply(hub.statuses.pop(0))
            return
        begin, status, headers = 0, 200, {}
        asked = self.headers.get("Range")
        if asked and hub.ranges:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content_Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if hub.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        rest = data[begin:]
        headers["Content_Length"] = str(len(rest))
        if hub.cuts:
            rest = rest[: hub.cuts.pop(0)]
            self.close_connection = True
        if hub.gate is not None:
            half = len(rest) // 2
            self.reply(status, rest[:half], **headers)
            hub.gate.wait(30)
            self.wfile.write(rest[half:])
            return
        self.reply(status, rest, **headers)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub and its store on free ports of the loopback."""
    hub = Hub()
    servers = []
    for handler in (_Front, _Store):
        bound = type(handler.__name__, (handler,), {"hub": hub})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), bound))
    hub.url, hub.store_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
