"""What a model family is: a config translator and the places its tensors go to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from octavo.models.hf_config import HfConfig
from octavo.models.spec import DecoderSpec


@dataclass(slots=True, frozen=True)
class Target:
    """Where one checkpoint tensor goes: rows `row`.. of a parameter, which may be a fused one."""

    parameter: str
    shape: tuple[int, ...]
    row: int = 0


@dataclass(slots=True, frozen=True)
class Family:
    """`ignored` are suffixes of checkpoint names that hold nothing that must be loaded."""

    architectures: tuple[str, ...]
    translate: Callable[[HfConfig], DecoderSpec]
    targets: Callable[[DecoderSpec], dict[str, Target]]
    ignored: tuple[str, ...] = ()
