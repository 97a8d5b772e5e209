"""The Hugging Face Hub's protocol; its cache's layout too, so that others find the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from octavo.errors import FetchError, FetchRefusedError
from octavo.hub.client import Client
from octavo.hub.repository import MAX_FILES, Listing, Reference, RemoteFile

DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def listing(client: Client, endpoint: str, cache: Path, reference: Reference) -> Listing:
    """The files of the revision, pinned to the commit that it is now."""
    revision = reference.revision or DEFAULT_REVISION
    url = f"{endpoint}/api/models/{reference.repository}/revision/{quote(revision, safe='')}"
    document = client.json(f"{url}?blobs=true")
    commit = document.get("sha") if isinstance(document, dict) else None
    siblings = document.get("siblings") if isinstance(document, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise FetchError(f"{endpoint} names no commit for {reference.repository}")
    if not isinstance(siblings, list) or len(siblings) > MAX_FILES:
        raise FetchError(f"{endpoint} lists no files for {reference.repository}")
    base = f"{endpoint}/{reference.repository}/resolve/{commit}"
    files = [_file(endpoint, base, entry) for entry in siblings]
    return Listing(_repository_folder(cache, reference) / "snapshots" / commit, files)


def remember(cache: Path, reference: Reference, folder: Path) -> None:
    """Note which commit the revision was, as the hub's own client does."""
    revision = reference.revision or DEFAULT_REVISION
    if revision == folder.name:
        return
    note = _repository_folder(cache, reference) / "refs" / revision
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(folder.name)


def cached(cache: Path, reference: Reference) -> Path | None:
    """The folder of the revision as it was last seen, if it ever was."""
    revision = reference.revision or DEFAULT_REVISION
    home = _repository_folder(cache, reference)
    try:
        commit = revision if _COMMIT.fullmatch(revision) else (home / "refs" / revision).read_text()
    except OSError:
        return None
    return home / "snapshots" / commit if _COMMIT.fullmatch(commit) else None


def _repository_folder(cache: Path, reference: Reference) -> Path:
    return cache / ("models--" + reference.repository.replace("/", "--"))


def _file(endpoint: str, base: str, entry: Any) -> RemoteFile:
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise FetchError(f"{endpoint} lists a file without a name")
    lfs = entry.get("lfs") if isinstance(entry.get("lfs"), dict) else {}
    size = lfs.get("size", entry.get("size"))
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise FetchRefusedError(f"{endpoint} lists {name[:100]!r} without a size")
    sha256, oid = lfs.get("sha256"), entry.get("blobId")
    digest = None
    if isinstance(sha256, str):
        digest = ("sha256", sha256)
    elif isinstance(oid, str) and _COMMIT.fullmatch(oid):
        digest = ("git", oid)
    return RemoteFile(name, size, f"{base}/{quote(name)}", digest)
