"""Where the model's files are: a folder as given, or fetched from a hub into one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig, hub_settings, model_source
from octavo.errors import ConfigError
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
    # Late: a start from a folder does without HTTP and TLS.
    from octavo.hub.fetch import fetch

    code = config.trust_remote_code
    folder = fetch(
        parse_reference(config.model, config.revision),
        hub_settings(kind),
        lambda ratio: progress("fetch", ratio),
        functools.partial(check_servable, trust_remote_code=code, hf_overrides=config.hf_overrides),
        code=code,
    )
    located(str(folder))
    return dataclasses.replace(config, model=str(folder), source="path", revision=None)


def check_servable(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Raise for a model that no weights could make servable, by its config.json alone."""
    # Late, since this brings torch, whose threads have to be bounded before it comes.
    from octavo.engine.model import check_config

    check_config(folder, trust_remote_code=trust_remote_code, hf_overrides=hf_overrides)
