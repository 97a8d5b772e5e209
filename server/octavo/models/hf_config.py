"""Read config.json and generation_config.json by hand: typed, bounded, errors that name the key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.errors import ModelError, UnsupportedModelError
from octavo.json_object import read_json_object

_REQUIRED = object()


@dataclass(slots=True, frozen=True)
class HfConfig:
    """A JSON object of a model folder; `where` is the file (and key) it came from.

    `aliases` maps the names that we ask for to a family's own, `defaults` (by our names) are
    what the family leaves out.
    """

    where: str
    values: dict[str, Any]
    aliases: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def of_family(self, aliases: dict[str, str] | None = None, /, **defaults: Any) -> HfConfig:
        """The same object, read with a family's names and defaults."""
        return HfConfig(self.where, self.values, aliases or {}, defaults)

    def without(self, key: str) -> HfConfig:
        """The same object as if it had no such key."""
        return replace(self, values={k: v for k, v in self.values.items() if k != key})

    def get(self, key: str) -> Any:
        """The value as it stands, or the family's default, or None."""
        value = self.values.get(self.aliases.get(key, key))
        return self.defaults.get(key) if value is None else value

    def has(self, key: str) -> bool:
        """Whether there is a value, be it the family's default."""
        return self.get(key) is not None

    def integer(self, key: str, *, low: int, high: int, default: Any = _REQUIRED) -> int:
        """An integer in [low, high]; null counts as absent."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, f"must be an integer, not {show(value)}")
        if not low <= value <= high:
            raise self.wrong(key, f"must be in {low}..{high}, not {show(value)}")
        return value

    def number(self, key: str, *, above: float, default: Any = _REQUIRED) -> float:
        """A finite number greater than `above`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, f"must be a number, not {show(value)}")
        if abs(value) > 1e300 or not math.isfinite(value) or value <= above:
            raise self.wrong(key, f"must be a finite number above {above}, not {show(value)}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"must be true or false, not {show(value)}")
        return value

    def text(self, key: str, *, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, f"must be a string, not {show(value)}")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        value = self._get(key, _REQUIRED)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(key, f"must be a list of {count} numbers, not {show(value)}")
        for item in value:
            real = isinstance(item, int | float) and not isinstance(item, bool)
            if not real or not 0 < item < 1e30:
                raise self.wrong(key, f"must hold numbers above 0, not {show(item)}")
        return tuple(float(item) for item in value)

    def section(self, key: str) -> HfConfig | None:
        """A nested object, or None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, f"must be an object, not {show(value)}")
        return HfConfig(f"{self.where}: {key}", value)

    def wrong(self, key: str, problem: str) -> ModelError:
        """The error for a value that no model could have."""
        return ModelError(f"{self.where}: {self.aliases.get(key, key)} {problem}")

    def unsupported(self, key: str, value: object, supported: str) -> UnsupportedModelError:
        """The error for a value that some models have and Octavo does not serve."""
        return UnsupportedModelError(
            f"{self.where}: {self.aliases.get(key, key)} is {show(value)}, which is not supported; "
            f"supported: {supported}"
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"{self.where}: {self.aliases.get(key, key)} is missing")
        return default


def show(value: object) -> str:
    """A value as JSON, cut short: error texts end up in conditions and logs."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> HfConfig:
    """The folder's config.json, with `overrides` in place of its own values; null takes one away.

    An override that is an object replaces only what it names.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; a model is a folder with config.json in it")
    config = _read_object(folder / "config.json")
    if config is None:
        raise ModelError(f"config.json is missing in {folder}; is this the model's folder?")
    if not overrides:
        return config
    return HfConfig(f"{config.where} with overrides", _merged(config.values, overrides))


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        own = merged.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            value = _merged(own, value)
        merged[key] = value
    return merged


def read_eos_token_ids(folder: Path, config: HfConfig, vocab_size: int) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json's, else config.json's, else none."""
    for source in (_read_object(folder / "generation_config.json"), config):
        value = None if source is None else source.values.get("eos_token_id")
        if source is None or value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            inside = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not inside or not 0 <= token_id < vocab_size:
                raise source.wrong(
                    "eos_token_id",
                    f"must be an id in 0..{vocab_size - 1} or a list of them, not {show(value)}",
                )
        return tuple(dict.fromkeys(ids))
    return ()


def _read_object(path: Path) -> HfConfig | None:
    values = read_json_object(path)
    return None if values is None else HfConfig(str(path), values)
