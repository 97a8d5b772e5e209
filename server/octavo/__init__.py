"""Octavo: an LLM serving engine with a paged KV cache, and the operator that scales it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.llm import LLM as LLM
    from octavo.llm_inputs import BeamSearchParams as BeamSearchParams
    from octavo.outputs import CompletionOutput as CompletionOutput
    from octavo.outputs import RequestOutput as RequestOutput
    from octavo.params import SamplingParams as SamplingParams

__version__ = "0.1.0"

# Loaded when first asked for: the command, the API process and the operator need no torch.
_HOMES = {
    "LLM": "octavo.llm",
    "SamplingParams": "octavo.params",
    "BeamSearchParams": "octavo.llm_inputs",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
