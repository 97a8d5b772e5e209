"""What a hub says a repository holds, and which of it is wanted; decisions only, no sockets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint import INDEX_NAME, SINGLE_NAME
from octavo.errors import ConfigError, FetchRefusedError, ModelError

MAX_FILES = 100_000
MAX_NAME_CHARS = 255
# Without a byte for this long a connection counts as cut.
DEFAULT_TIMEOUT_S = 30.0

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_REFERENCE = re.compile(rf"(?P<repository>(?:{_PART}/)?{_PART})(?:@(?P<revision>[^@]+))?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# Beside the weights: configuration, tokenizer, chat template.
_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")


@dataclass(frozen=True, slots=True)
class Reference:
    """A repository of a hub; `revision` is a branch, tag or commit, None the hub's default."""

    repository: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `digest` is an algorithm (sha256, git) and its hex value."""

    name: str
    size: int
    url: str
    digest: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What is there at one revision, and the folder that it belongs in."""

    folder: Path
    files: Sequence[RemoteFile]


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Which hub (`hub` or `modelscope`), where it is, where files go, the secret to show it."""

    kind: str
    endpoint: str
    cache: Path
    token: str | None = None
    offline: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S


def parse_reference(text: str, revision: str | None = None) -> Reference:
    """`org/name` or `org/name@revision`; an explicit `revision` must not contradict it."""
    found = _REFERENCE.fullmatch(text)
    if found is None or ".." in text:
        raise ConfigError(f"{text[:200]!r} is no model of a hub; write org/name[@revision]")
    inside = found["revision"]
    if inside and revision and inside != revision:
        raise ConfigError(f"MODEL names revision {inside[:100]!r}, --revision {revision[:100]!r}")
    revision = inside or revision
    if revision is not None and (_REVISION.fullmatch(revision) is None or ".." in revision):
        raise ConfigError(f"{revision[:100]!r} is no revision: a branch, tag or commit is")
    return Reference(found["repository"], revision)


def looks_like_reference(text: str) -> bool:
    """Whether a MODEL that is no folder can only be meant for a hub: `org/name[@revision]`."""
    found = _REFERENCE.fullmatch(text)
    return found is not None and ".." not in text and "/" in found["repository"]


def choose(
    reference: Reference, files: Sequence[RemoteFile], *, code: bool = False
) -> list[RemoteFile]:
    """The files to fetch, small ones first: texts and safetensors at the repository's top, and the
    model's own `code` only where it is asked for.

    Raises for a name that could leave the folder, and for a repository without safetensors.
    """
    for file in files:
        check_name(reference, file.name)
    top = [file for file in files if "/" not in file.name]
    weights = [file for file in top if file.name.endswith(".safetensors")]
    if not weights:
        raise ModelError(_no_weights(reference, top))
    names = {file.name for file in weights}
    if SINGLE_NAME in names and INDEX_NAME not in {file.name for file in top}:
        weights = [file for file in weights if file.name == SINGLE_NAME]
    endings = (*_TEXTS, ".py") if code else _TEXTS
    texts = [file for file in top if file.name.endswith(endings)]
    return sorted(texts, key=lambda f: f.size) + sorted(weights, key=lambda f: f.name)


def check_name(reference: Reference, name: str) -> None:
    """Raise unless `name` is a path inside the repository's folder."""
    parts = name.split("/")
    odd = any(part in ("", ".", "..") for part in parts) or len(name) > MAX_NAME_CHARS
    if odd or "\\" in name or not name.isprintable():
        raise FetchRefusedError(
            f"the hub lists a file {name[:100]!r} in {reference.repository}, "
            "which is no name inside a folder; nothing of it is used"
        )


def _no_weights(reference: Reference, top: Sequence[RemoteFile]) -> str:
    wanted = f"{reference.repository} holds no safetensors files"
    pickles = sorted(file.name for file in top if file.name.endswith(_PICKLES))
    if not pickles:
        return f"{wanted}; Octavo loads no other format"
    return (
        f"{wanted}; {pickles[0]} is a format that can run code when it is loaded, which Octavo "
        "never does: look for a revision or a copy of the model with safetensors"
    )
