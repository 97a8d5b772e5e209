"""A JSON object out of a model's folder: bounded, and every error names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ModelError

MAX_CONFIG_BYTES = 8 << 20


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in the file; None if there is no file, a `ModelError` for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB; that is no config")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
