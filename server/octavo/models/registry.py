"""Architecture name → family, or an error that says why not and what is nearest.

This is the compatibility check: it reads config.json alone, before anything is allocated.
"""

from __future__ import annotations

import difflib

from octavo.errors import UnsupportedModelError
from octavo.models.families import (
    cohere,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    olmo,
    opt,
    phi3,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from octavo.models.family import Family
from octavo.models.hf_config import HfConfig, show

_ALL = (
    llama.FAMILY,
    mistral.MISTRAL,
    mistral.MIXTRAL,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN2_MOE,
    qwen.QWEN3_MOE,
    gpt2.FAMILY,
    opt.FAMILY,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    phi3.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    olmo.OLMO2,
    olmo.OLMOE,
    stablelm.FAMILY,
    starcoder2.FAMILY,
    gpt_neox.FAMILY,
    gpt_oss.FAMILY,
    glm.GLM,
    glm.GLM4,
    cohere.COHERE,
    cohere.COHERE2,
)
FAMILIES: dict[str, Family] = {name: family for family in _ALL for name in family.architectures}

_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "image_token_id")


def native_family(config: HfConfig) -> Family | None:
    """The family that serves this architecture, None where there is none; raises for a kind of
    model that nothing here serves.
    """
    names = _architectures(config)
    _refuse_multimodal(config, names[0])
    _refuse_quantized(config)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def family_of(config: HfConfig) -> Family:
    """The family that serves this config's architecture."""
    family = native_family(config)
    if family is None:
        raise not_native(config)
    return family


def not_native(config: HfConfig) -> UnsupportedModelError:
    """The error for an architecture without a family, with the nearest that has one."""
    names = _architectures(config)
    supported = ", ".join(sorted(FAMILIES)) + _nearest(names[0])
    return config.unsupported("architectures", names, supported)


def _architectures(config: HfConfig) -> list[str]:
    names = config.values.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise config.wrong(
            "architectures",
            f'must be a list like ["LlamaForCausalLM"], not {show(names)}',
        )
    return names


def _nearest(name: str) -> str:
    kin = name.replace("ForConditionalGeneration", "ForCausalLM")
    nearest = difflib.get_close_matches(kin, FAMILIES, n=1)
    return f" (nearest: {nearest[0]})" if nearest else ""


def _refuse_multimodal(config: HfConfig, name: str) -> None:
    found = next((key for key in _OTHER_INPUTS if config.has(key)), None)
    if found is None and not name.endswith("ForConditionalGeneration"):
        return
    why = f"it has {found}" if found else "it generates from more than text"
    raise UnsupportedModelError(
        f"{config.where}: architectures is {show([name])}, a multimodal or encoder-decoder model "
        f"({why}); Octavo serves text decoders{_nearest(name)}"
    )


def _refuse_quantized(config: HfConfig) -> None:
    value = config.get("quantization_config")
    if value is None:
        return
    method = value.get("quant_method", value) if isinstance(value, dict) else value
    raise UnsupportedModelError(
        f"{config.where}: quantization_config is {show(method)}, which is not supported yet; "
        "supported: unquantized weights in float32, bfloat16 or float16"
    )
