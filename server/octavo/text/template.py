"""The model's chat template, sandboxed, with user text kept apart from control tokens."""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from octavo.errors import ModelError

Message = dict[str, str]

# What templates expect to be there.
DEFAULTS = {"tools": None, "documents": None, "add_generation_prompt": True}


class TemplateRefusedError(ValueError):
    """The template does not accept these messages; the text is its own explanation."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; when serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Give back the body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"{where} is not a valid chat template: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        spelled: Callable[[str], list[str]],
        extra: Mapping[str, Any],
    ) -> tuple[str, dict[str, str]]:
        """Return the text and, for each mark in it, the control token that a user had typed.

        `spelled` finds control tokens in a string. Marks hold a random word, so that no user can
        write one; they keep the user's spelling from meeting the tokenizer as a control token.
        """
        marks = _Marks(spelled)
        quoted = [{key: marks.quote(value) for key, value in m.items()} for m in messages]
        values = {k: marks.quote(v) if isinstance(v, str) else v for k, v in extra.items()}
        try:
            text = self._template.render(
                **{**DEFAULTS, **values, **self._special_tokens},
                messages=quoted,
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise TemplateRefusedError(str(error)) from error
        return text, {mark: word for word, mark in marks.of.items() if mark in text}


class _Marks:
    """Replaces control tokens in user strings by marks."""

    def __init__(self, spelled: Callable[[str], list[str]]) -> None:
        self._spelled = spelled
        self._nonce = secrets.token_hex(8)
        self.of: dict[str, str] = {}

    def quote(self, text: str) -> str:
        # Longest first: one control token may be the beginning of another.
        for word in sorted(self._spelled(text), key=len, reverse=True):
            mark = self.of.setdefault(word, f"\ue000{self._nonce}{len(self.of)}\ue001")
            text = text.replace(word, mark)
        return text


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that published chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    known = {k: v for k, v in options.items() if k in ("ensure_ascii", "separators", "sort_keys")}
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **known})


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
