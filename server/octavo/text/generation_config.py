"""generation_config.json: sampling that a model's makers recommend, for what requests omit."""

from __future__ import annotations

from pathlib import Path

import msgspec

from octavo.errors import ModelError
from octavo.params import ParameterError, SamplingParams

FILE = "generation_config.json"


class _Recommended(msgspec.Struct, frozen=True):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_sampling_defaults(folder: Path) -> dict[str, float]:
    """The recommended parameters by name; none where there is no such file."""
    try:
        raw = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"{FILE} cannot be read: {error.strerror}") from error
    advice = "correct it, or start with --generation-config vllm to leave it unread"
    try:
        recommended = msgspec.json.decode(raw, type=_Recommended)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{FILE}: {error}; {advice}") from error
    found = {name: v for name, v in msgspec.structs.asdict(recommended).items() if v is not None}
    if found.get("top_k") == 0:  # transformers' way to say "off"
        found["top_k"] = -1
    try:
        SamplingParams(**found).validate(vocab_size=1)
    except ParameterError as error:
        raise ModelError(f"{FILE}: {error}; {advice}") from error
    return found
