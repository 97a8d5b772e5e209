"""A model of a hub into a folder of this machine: the small files, a check, then the weights."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from octavo.errors import FetchError, FetchRefusedError
from octavo.hub import huggingface, modelscope
from octavo.hub.client import Client
from octavo.hub.repository import HubSettings, Listing, Reference, RemoteFile, choose

# Written when everything is there: the folder may be used while the hub cannot be reached.
COMPLETE = ".octavo-complete"
PARALLEL_FILES = 4
REPORT_S = 0.1

logger = logging.getLogger(__name__)


def fetch(
    reference: Reference,
    settings: HubSettings,
    progress: Callable[[float], None],
    check: Callable[[Path], None],
    *,
    code: bool = False,
) -> Path:
    """The folder with the model's files, fetched as far as they are not there yet.

    `check` sees the folder when all but the weights is in it, and raises for a model that could
    not be served anyway. `progress` gets the share of all bytes that is there. `code` says that
    the model's own code is wanted too.
    """
    progress(0.0)
    client = Client(_secrets(settings), settings.timeout_s)
    try:
        if settings.offline:
            raise FetchError("HF_HUB_OFFLINE is set")
        listing = _listing(client, settings, reference)
    except FetchRefusedError:
        raise
    except FetchError as error:
        return _from_cache(reference, settings, error, check)
    wanted = choose(reference, listing.files, code=code)
    folder = listing.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        weights = [file for file in wanted if file.name.endswith(".safetensors")]
        texts = [file for file in wanted if file not in weights]
        meter = _Meter(wanted, progress)
        _download(client, folder, texts, meter)
        check(folder)
        _require_space(folder, weights)
        _download(client, folder, weights, meter)
        (folder / COMPLETE).touch()
    if settings.kind == "hub":
        huggingface.remember(settings.cache, reference, folder)
    return folder


def _listing(client: Client, settings: HubSettings, reference: Reference) -> Listing:
    of_protocol = modelscope.listing if settings.kind == "modelscope" else huggingface.listing
    return of_protocol(client, settings.endpoint, settings.cache, reference)


def _secrets(settings: HubSettings) -> dict[str, str]:
    if not settings.token:
        return {}
    if settings.kind == "modelscope":
        return {"Cookie": f"m_session_id={settings.token}"}
    return {"Authorization": f"Bearer {settings.token}"}


def _from_cache(
    reference: Reference, settings: HubSettings, error: FetchError, check: Callable[[Path], None]
) -> Path:
    """What an earlier start fetched, while the hub cannot be asked."""
    if settings.kind == "modelscope":
        folder: Path | None = modelscope.folder(settings.cache, reference)
    else:
        folder = huggingface.cached(settings.cache, reference)
    if folder is None or not (folder / COMPLETE).exists():
        raise error
    logger.warning("%s; using the copy of %s in %s", error, reference.repository, folder)
    check(folder)
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time writes to a folder."""
    with (folder / ".octavo-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Meter:
    """The bytes that are there, of files that come in parallel."""

    def __init__(self, files: Sequence[RemoteFile], progress: Callable[[float], None]) -> None:
        self._total = max(1, sum(file.size for file in files))
        self._there = dict.fromkeys((file.name for file in files), 0)
        self._progress = progress

    def set(self, name: str, count: int) -> None:
        """Note that `count` bytes of the file are there; any thread may."""
        self._there[name] = count

    def report(self) -> None:
        """Tell; only the caller of `fetch` does, as what it tells may belong to its thread."""
        self._progress(sum(self._there.values()) / self._total)


def _download(client: Client, folder: Path, files: Sequence[RemoteFile], meter: _Meter) -> None:
    def one(file: RemoteFile) -> None:
        path = folder / file.name
        if path.exists() and path.stat().st_size == file.size:
            meter.set(file.name, file.size)
            return
        client.download(file, path, lambda count: meter.set(file.name, count))

    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="fetch") as pool:
        running = {pool.submit(one, file) for file in files}
        try:
            while running:
                done, running = wait(running, REPORT_S, FIRST_EXCEPTION)
                meter.report()
                for future in done:
                    future.result()
        except BaseException:
            client.close()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _require_space(folder: Path, files: Sequence[RemoteFile]) -> None:
    missing = 0
    for file in files:
        for path in (folder / file.name, folder / f".{file.name}.incomplete"):
            if path.exists():
                missing -= min(file.size, path.stat().st_size)
                break
        missing += file.size
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise FetchRefusedError(
            f"the weights need {missing / 2**30:.2f} GiB more and {folder} has {free / 2**30:.2f} "
            "GiB free; give the volume more, or set HF_HOME or MODELSCOPE_CACHE to one that has"
        )
