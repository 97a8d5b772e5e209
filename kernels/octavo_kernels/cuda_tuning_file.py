"""What was found fastest on a kind of GPU, kept for the next start.

One JSON file for each GPU, driver and version of cuBLASLt. A file that cannot be read or written
costs a log line, never a start.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.cuda_lt import Size

# Of what is in the file and of how it was found: another's is not used.
_FORMAT = 2
_ALGORITHM_BYTES = 64

logger = logging.getLogger(__name__)

Found = dict[Size, bytes | None]
# Files read in this process, with what was in them when they were.
_read: dict[Path, Found] = {}
_refused: set[Path] = set()


def read(folder: Path, device: torch.device) -> Found:
    """What is known of that device; read once a process."""
    file = _file(folder, device)
    if file not in _read:
        _read[file] = _parse(file)
    return _read[file]


def add(folder: Path, device: torch.device, found: Mapping[Size, bytes | None]) -> None:
    """Write what is known now, with what other processes may have written meanwhile."""
    file = _file(folder, device)
    if file in _refused:
        return
    rows = [
        {"size": list(size), "algorithm": None if algorithm is None else algorithm.hex()}
        for size, algorithm in sorted((_parse(file) | dict(found)).items())
    ]
    # By no process id: pods that share the folder may have the same.
    part = file.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"format": _FORMAT, "found": rows}), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        _refused.add(file)
        logger.info("%s is not written, the next start searches again: %s", file, error)
        with contextlib.suppress(OSError):  # nor what a full disk left of it
            part.unlink(missing_ok=True)


def _file(folder: Path, device: torch.device) -> Path:
    return folder / f"products-{_machine(device)}.json"


@functools.cache
def _machine(device: torch.device) -> str:
    report = _cuda.device_report(device.index or 0)
    kind = str(report["name"]).replace(" ", "-").replace("/", "-")
    driver, library = report["driver_version"], _cuda.lt_version()
    return f"{kind}-driver-{driver}-cublaslt-{library}"


def _parse(file: Path) -> Found:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, not {_FORMAT}")
        return dict(_entry(row) for row in content["found"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used, sizes are searched again: %s", file, error)
        return {}


def _entry(row: dict[str, Any]) -> tuple[Size, bytes | None]:
    size = Size(*row["size"])
    if not isinstance(size.dtype, str) or not isinstance(size.bias, bool):
        raise ValueError(f"{size} is no size")
    if any(type(number) is not int or number < 1 for number in size[2:]):
        raise ValueError(f"{size} is no size")
    if row["algorithm"] is None:
        return size, None
    algorithm = bytes.fromhex(row["algorithm"])
    if len(algorithm) != _ALGORITHM_BYTES:
        raise ValueError(f"an algorithm of {len(algorithm)} bytes")
    return size, algorithm
