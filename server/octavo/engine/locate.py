"""Where the model's files are: a folder as given, or fetched from a hub into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from octavo.config import EngineConfig, hub_settings, model_source
from octavo.errors import ConfigError
from octavo.hub.fetch import fetch
from octavo.hub.repository import parse_reference


def locate(
    config: EngineConfig,
    progress: Callable[[str, float], None],
    located: Callable[[str], None],
) -> EngineConfig:
    """The configuration with a folder as its model; `located` hears of one that was fetched."""
    kind = model_source(config)
    if kind == "path":
        if config.revision is not None:
            raise ConfigError("--revision is for a hub's model; MODEL is a folder")
        return config
    folder = fetch(
        parse_reference(config.model, config.revision),
        hub_settings(kind),
        lambda ratio: progress("fetch", ratio),
        check_servable,
    )
    located(str(folder))
    return dataclasses.replace(config, model=str(folder), source="path", revision=None)


def check_servable(folder: Path) -> None:
    """Raise for a model that no weights could make servable, by its config.json alone."""
    # Late, since a family may bring torch, whose threads have to be bounded before it comes.
    from octavo.models.hf_config import read_config
    from octavo.models.registry import family_of

    config = read_config(folder)
    family_of(config).translate(config)
