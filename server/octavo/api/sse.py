"""What clients read: chunks of a stream, and whole answers, in OpenAI's shapes.

A chunk's JSON is constant but for index, text and finish reason, so its head is encoded once for
each stream and only the text is escaped for each chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from octavo.api.generation import Delta, Usage
from octavo.api.logprobs import LogprobsWriter, PlacedLogprobs
from octavo.logprobs import TokenLogprobs

DONE = b"data: [DONE]\n\n"
_json = msgspec.json.Encoder().encode
# Line breaks of Unicode are plain characters in JSON, but many clients cut lines at them.
_LINE_BREAKS = tuple((c.encode(), b"\\u%04x" % ord(c)) for c in "\u0085\u2028\u2029")


def error_event(body: bytes) -> bytes:
    """An error after the stream began; clients raise when they see it."""
    return b"data: " + body + b"\n\n"


def _text(text: str) -> bytes:
    """A JSON string that is one line for every client."""
    return _one_line(_json(text))


def _one_line(raw: bytes) -> bytes:
    if raw.isascii():
        return raw
    for char, escape in _LINE_BREAKS:
        raw = raw.replace(char, escape)
    return raw


class Answer:
    """The accumulated output of one choice."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[PlacedLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.logprobs += delta.logprobs


class Form(Protocol):
    """One endpoint's way of writing chunks and whole answers."""

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        """The events for one delta."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The extra event with the usage and no choices."""
        ...

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""
        ...


class _Form:
    """What both endpoints share."""

    chunk_object: str
    whole_object: str
    _opening: bytes  # of a choice, up to its text
    _closing: bytes  # what the opening left open
    _layout: Callable[[LogprobsWriter, Sequence[PlacedLogprobs]], dict[str, Any] | None]

    def __init__(
        self,
        response_id: str,
        model: str,
        *,
        usage_null: bool = False,
        writer: LogprobsWriter | None = None,
    ) -> None:
        self._writer = writer
        self._common = {"id": response_id, "created": int(time.time()), "model": model}
        head = _json({"object": self.chunk_object, **self._common})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._usage_null = b',"usage":null' if usage_null else b""
        self._openings: dict[int, bytes] = {}
        ending = self._closing + b',"logprobs":null,"finish_reason":null}'
        self._plain_end = ending + b"]" + self._usage_null + b"}\n\n"

    def usage_chunk(self, usage: Usage) -> bytes:
        """The extra event with the usage and no choices."""
        return self._head + b"]" + self._usage(usage) + b"}\n\n"

    def _plain(self, delta: Delta) -> bytes:
        """The event of a delta that is text alone, as nearly all are."""
        opening = self._openings.get(delta.index)
        if opening is None:
            opening = self._head + self._opening % delta.index
            self._openings[delta.index] = opening
        return opening + _text(delta.text) + self._plain_end

    @staticmethod
    def _is_plain(delta: Delta, usage: Usage | None) -> bool:
        return not (delta.finish_reason or delta.logprobs or usage) and bool(delta.text)

    def _event(self, choice: bytes, usage: Usage | None) -> bytes:
        return self._head + choice + b"]" + self._usage(usage) + b"}\n\n"

    def _usage(self, usage: Usage | None) -> bytes:
        return self._usage_null if usage is None else b',"usage":' + _json(usage.as_json())

    def _logprobs(self, placed: Sequence[PlacedLogprobs]) -> dict[str, Any] | None:
        """The choice's logprobs object."""
        if self._writer is None or not placed:
            return None
        return self._layout(self._writer, placed)

    def _logprobs_member(self, delta: Delta) -> bytes:
        return b',"logprobs":' + _one_line(_json(self._logprobs(delta.logprobs)))

    def _prompt_logprobs(self, answer: Answer) -> dict[str, Any]:
        """The extra member with the prompt's log-probabilities, where they were asked for."""
        if self._writer is None or answer.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": self._writer.prompt(answer.prompt_logprobs)}

    @staticmethod
    def _ending(delta: Delta) -> bytes:
        if delta.finish_reason is None:
            return b',"finish_reason":null}'
        return (
            b',"finish_reason":'
            + _json(delta.finish_reason)
            + b',"stop_reason":'
            + (_text(stop) if isinstance(stop := delta.stop_reason, str) else _json(stop))
            + b"}"
        )

    def _body(self, choices: list[dict[str, Any]], usage: Usage, **more: object) -> bytes:
        return _json(
            {
                **self._common,
                "object": self.whole_object,
                "choices": choices,
                "usage": usage.as_json(),
                **more,
            }
        )


class ChatForm(_Form):
    """chat.completion and its chunks; the first chunk of a choice carries the role."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    _opening = b'{"index":%d,"delta":{"content":'
    _closing = b"}"
    _layout = staticmethod(LogprobsWriter.chat)

    def __init__(
        self,
        response_id: str,
        model: str,
        *,
        usage_null: bool = False,
        writer: LogprobsWriter | None = None,
    ) -> None:
        super().__init__(response_id, model, usage_null=usage_null, writer=writer)
        self._begun: set[int] = set()

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        """The events for one delta."""
        if self._is_plain(delta, usage) and delta.index in self._begun:
            return self._plain(delta)
        index = b'{"index":%d' % delta.index
        role = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            opening = b',"delta":{"role":"assistant","content":""},"logprobs":null'
            role = self._event(index + opening + b',"finish_reason":null}', usage)
        content = b'{"content":' + _text(delta.text) + b"}" if delta.text else b"{}"
        choice = index + b',"delta":' + content + self._logprobs_member(delta) + self._ending(delta)
        return role + self._event(choice, usage)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(answers)
        ]
        # A chat has one prompt, so these are not the choices'.
        return self._body(choices, usage, **self._prompt_logprobs(answers[0]))


class CompletionForm(_Form):
    """text_completion, whose chunks have the same shape."""

    chunk_object = "text_completion"
    whole_object = "text_completion"
    _opening = b'{"index":%d,"text":'
    _closing = b""
    _layout = staticmethod(LogprobsWriter.completion)

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        """The event for one delta."""
        if self._is_plain(delta, usage):
            return self._plain(delta)
        choice = self._opening % delta.index + _text(delta.text)
        return self._event(choice + self._logprobs_member(delta) + self._ending(delta), usage)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The body of a response that is not streamed."""
        choices = [
            {
                "index": index,
                "text": answer.text,
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
                **self._prompt_logprobs(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return self._body(choices, usage)
