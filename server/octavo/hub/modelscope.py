"""ModelScope's protocol, as far as reading models needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from octavo.errors import ConfigError, FetchError
from octavo.hub.client import Client
from octavo.hub.repository import MAX_FILES, Listing, Reference, RemoteFile

DEFAULT_REVISION = "master"


def listing(client: Client, endpoint: str, cache: Path, reference: Reference) -> Listing:
    """The files of the revision; each download is checked against the digest listed here."""
    revision = reference.revision or DEFAULT_REVISION
    base = f"{endpoint}/api/v1/models/{reference.repository}/repo"
    query = urlencode({"Revision": revision, "Recursive": "True"})
    document = client.json(f"{base}/files?{query}")
    data = document.get("Data") if isinstance(document, dict) else None
    entries = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_FILES:
        why = document.get("Message") if isinstance(document, dict) else None
        raise FetchError(f"{endpoint} lists no files for {reference.repository}: {str(why)[:200]}")
    files = [
        _file(endpoint, base, revision, entry)
        for entry in entries
        if isinstance(entry, dict) and entry.get("Type") != "tree"
    ]
    return Listing(folder(cache, reference), files)


def folder(cache: Path, reference: Reference) -> Path:
    """Where the revision's files are kept."""
    if "/" not in reference.repository:
        raise ConfigError(f"ModelScope needs org/name, not {reference.repository!r}")
    revision = quote(reference.revision or DEFAULT_REVISION, safe="")
    return cache / "octavo" / reference.repository.replace("/", "--") / revision


def _file(endpoint: str, base: str, revision: str, entry: dict[str, Any]) -> RemoteFile:
    name, size, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
    if not isinstance(name, str) or not isinstance(size, int) or isinstance(size, bool):
        raise FetchError(f"{endpoint} lists a file without path or size: {str(name)[:100]!r}")
    url = f"{base}?{urlencode({'Revision': revision, 'FilePath': name})}"
    digest = ("sha256", sha256) if isinstance(sha256, str) and sha256 else None
    return RemoteFile(name, size, url, digest)
