"""Architecture name → family, or an error that says what is supported."""

from __future__ import annotations

import difflib

from octavo.models import llama
from octavo.models.family import Family
from octavo.models.hf_config import HfConfig, show

FAMILIES: dict[str, Family] = {
    name: family for family in (llama.FAMILY,) for name in family.architectures
}


def family_of(config: HfConfig) -> Family:
    """The family that serves this config's architecture."""
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise config.wrong(
            "architectures",
            f'must be a list like ["LlamaForCausalLM"], not {show(names)}',
        )
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    nearest = difflib.get_close_matches(names[0], FAMILIES, n=1)
    hint = f" (nearest: {nearest[0]})" if nearest else ""
    raise config.unsupported("architectures", names, ", ".join(sorted(FAMILIES)) + hint)
