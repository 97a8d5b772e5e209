"""Find and load what turns a model folder's text files into a working text side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from octavo.errors import ConfigError, ModelError
from octavo.text.generation_config import read_sampling_defaults
from octavo.text.template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class TextSide:
    """A model's tokenizer, its chat template when it has one, and its recommended sampling."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)


def load_text_side(
    model: str, chat_template: str | None, generation_config: str = "vllm"
) -> TextSide:
    """Load from the folder `model`; `chat_template` (file or text) replaces the model's own.

    `generation_config` says whether the model's recommended sampling is read: auto or vllm.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise ModelError(f"the model folder {model} does not exist; check the path and the volume")
    tokenizer = Tokenizer.load(folder)
    config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
    found = _given(chat_template) if chat_template else _own(folder, config)
    defaults = read_sampling_defaults(folder) if generation_config == "auto" else {}
    if found is None:
        return TextSide(tokenizer, None, defaults)
    where, source = found
    return TextSide(tokenizer, ChatTemplate(source, special, where=where), defaults)


def _given(chat_template: str) -> tuple[str, str]:
    """The template of --chat-template: a file if there is one of that name, else the text."""
    if "{" in chat_template:
        return "--chat-template", chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise ConfigError(
            f"--chat-template: no file {chat_template}, and it is not a template text"
        )
    return path.name, _read_text(path)


def _own(folder: Path, config: dict[str, Any]) -> tuple[str, str] | None:
    """The model's template, from its own file or from tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.name, _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelError("tokenizer_config.json: chat_template must be a text")
    return "chat_template in tokenizer_config.json", template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The tokens that templates may name; written as a text or as {"content": text}."""
    found = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be absent."""
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(_read_text(path), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path.name} is not a JSON object: {error}") from error
