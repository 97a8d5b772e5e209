"""HTTP for hubs: JSON and files, redirects, ranges, resume, digests; errors in sentences."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from octavo.errors import FetchError, FetchRefusedError
from octavo.hub.repository import RemoteFile

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
# Attempts in a row that bring no byte before the fetch is given up.
MAX_ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 20.0
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_CUT = (http.client.HTTPException, OSError)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes secrets only to the same host and never from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The next request."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise FetchRefusedError(f"{old.netloc} redirects to {newurl[:200]}, which is not https")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and old.netloc == new.netloc:
            for key, value in req.unredirected_hdrs.items():
                request.add_unredirected_header(key, value)
        return request


class Client:
    """Speaks to one hub. `secrets` are headers that go to that hub's host alone."""

    def __init__(
        self,
        secrets: Mapping[str, str],
        timeout_s: float,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._secrets = dict(secrets)
        self._timeout_s = timeout_s
        self._pause = pause
        self._closed = False
        self._opener = urllib.request.build_opener(_Redirects())

    def close(self) -> None:
        """Make running downloads give up at their next chunk."""
        self._closed = True

    def json(self, url: str) -> Any:
        """A JSON document."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self._open(url, {}) as response:
                    data = response.read(MAX_JSON_BYTES + 1)
                break
            except FetchError:
                raise
            except _CUT as error:
                self._wait(url, attempt, error)
        if len(data) > MAX_JSON_BYTES:
            raise FetchRefusedError(f"{_host(url)} answers with more than {MAX_JSON_BYTES} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FetchError(f"{_host(url)} answers with broken JSON: {error}") from error

    def download(self, file: RemoteFile, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Fetch `file` to `path`, going on with what an earlier attempt left.

        `on_bytes` gets the number of bytes that are there.
        """
        partial = path.with_name(f".{path.name}.incomplete")
        try:
            self._fill(file, partial, on_bytes)
            self._verify(file, partial)
            os.replace(partial, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FetchError(
                    f"no space for {file.name} ({file.size} bytes) in {path.parent}; "
                    "give the volume more, or set HF_HOME to one that has"
                ) from error
            raise FetchError(f"{partial} cannot be written: {error.strerror or error}") from error

    def _fill(self, file: RemoteFile, partial: Path, on_bytes: Callable[[int], None]) -> None:
        attempt = 0
        with partial.open("ab", buffering=0) as out:
            if out.tell() > file.size:
                out.truncate(0)
            at = out.seek(0, os.SEEK_END)
            on_bytes(at)
            while at < file.size:
                before = at
                try:
                    at = self._append(file, out, at, on_bytes)
                    cause: Exception | None = None
                except FetchError:
                    raise
                except _CUT as error:
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    cause = error
                    at = out.seek(0, os.SEEK_END)
                if at < file.size:
                    attempt = 0 if at > before else attempt
                    self._wait(file.url, attempt, cause or EOFError("the connection was cut"))
                    attempt += 1

    def _append(self, file: RemoteFile, out: Any, at: int, on_bytes: Callable[[int], None]) -> int:
        """Add what one response brings; the size then."""
        with self._open(file.url, {"Range": f"bytes={at}-"} if at else {}) as response:
            if at and (response.status != 206 or not _begins_at(response, at)):
                at = 0  # the server does not know ranges: from the start
                out.truncate(0)
            # What has come, not a full chunk: nothing is lost when the rest never comes.
            while chunk := response.read1(CHUNK_BYTES):
                if self._closed:
                    raise FetchError(f"{file.name} was given up")
                at += len(chunk)
                if at > file.size:
                    out.truncate(0)
                    raise FetchError(f"{file.name} is longer than the {file.size} bytes listed")
                out.write(chunk)
                on_bytes(at)
        return at

    def _verify(self, file: RemoteFile, partial: Path) -> None:
        if file.digest is None:
            return
        algorithm, expected = file.digest
        found = _digest(algorithm, partial, file.size)
        if found != expected:
            partial.unlink()
            raise FetchError(
                f"{file.name} came with {algorithm} {found[:12]}…, the hub lists {expected[:12]}…: "
                "it changed or was damaged on the way; it has been removed, start again"
            )

    def _open(self, url: str, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "octavo", **headers})
        request.add_header("Accept-Encoding", "identity")
        for key, value in self._secrets.items():
            request.add_unredirected_header(key, value)
        try:
            return self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _RETRIED:
                    raise ConnectionError(f"status {error.code}") from error
                raise _refusal(url, error, has_token=bool(self._secrets)) from error

    def _wait(self, url: str, attempt: int, error: Exception) -> None:
        if attempt + 1 >= MAX_ATTEMPTS or self._closed:
            why = getattr(error, "reason", None) or error
            raise FetchError(
                f"{_host(url)} cannot be reached ({why}), after {MAX_ATTEMPTS} attempts; "
                "check the network and HF_ENDPOINT or MODELSCOPE_DOMAIN"
            ) from error
        self._pause(min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**attempt))


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _begins_at(response: Any, at: int) -> bool:
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {at}-")


def _digest(algorithm: str, path: Path, size: int) -> str:
    """sha256 of the content, or git's name for it."""
    if algorithm == "git":
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refusal(url: str, error: urllib.error.HTTPError, *, has_token: bool) -> FetchRefusedError:
    """One sentence for a status that trying again will not change."""
    host = _host(url)
    token = "the token given" if has_token else "no token given (HF_TOKEN, MODELSCOPE_API_TOKEN)"
    texts = {
        401: f"{host} does not let us in with {token}, or the model does not exist; "
        "check its name and give a token that may read it",
        403: f"{host} forbids access with {token}; accept the model's conditions on its page, "
        "or use a token that may read it",
        404: f"{host} has no such model, revision or file; check the name and the revision "
        f"({urlsplit(url).path[:200]})",
    }
    return FetchRefusedError(
        texts.get(error.code, f"{host} answers with status {error.code} ({error.reason})")
    )
