"""From token outputs to text: one HTTP request's sequences, from admission to the final event."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from octavo.api.engine_client import Arrival, EngineClient, Mailbox
from octavo.api.errors import engine_error
from octavo.metrics import Metrics
from octavo.params import SamplingParams
from octavo.text.stop import StopMatcher
from octavo.text.tokenizer import Tokenizer
from octavo.wire import AddRequest, TokenOutput


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one choice; `finish_reason` comes once, with the last."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Usage:
    """Token counts of one choice, or of several added up."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Prompt:
    """One validated sequence to generate."""

    token_ids: list[int]
    params: SamplingParams


class Choice:
    """The growing output of one sequence."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.index = index
        self.usage = Usage(prompt_tokens=len(prompt.token_ids))
        self.finished = False
        self._params = prompt.params
        self._detokenizer = tokenizer.detokenizer(prompt.token_ids)
        self._stop = StopMatcher(prompt.params.stop)

    def feed(self, output: TokenOutput) -> Delta | None:
        """Take an output of the engine; None when no text is certain yet."""
        self.usage.cached_tokens = max(self.usage.cached_tokens, output.num_cached_tokens)
        text = ""
        for token_id in output.token_ids:
            self.usage.completion_tokens += 1
            text += self._push(self._detokenizer.push(token_id))
            if self._stop.matched is not None:
                return self._finish(text, "stop", self._stop.matched)
        if output.finish_reason is None:
            return Delta(self.index, text) if text else None
        if output.stop_token_id is not None:
            self.usage.completion_tokens += 1
        text += self._push(self._detokenizer.flush())
        if self._stop.matched is not None:
            return self._finish(text, "stop", self._stop.matched)
        asked = output.stop_token_id in self._params.stop_token_ids
        return self._finish(
            text + self._stop.flush(), output.finish_reason, output.stop_token_id if asked else None
        )

    def _push(self, text: str) -> str:
        # Before min_tokens a stop string is ordinary text.
        if self.usage.completion_tokens < self._params.min_tokens:
            return text
        return self._stop.push(text)

    def _finish(self, text: str, reason: str, stop_reason: int | str | None) -> Delta:
        self.finished = True
        return Delta(self.index, text, reason, stop_reason)


@dataclass(slots=True)
class Generation:
    """The sequences of one HTTP request. `close` must be called, however the request ends."""

    request_id: str
    choices: list[Choice]
    engine: EngineClient
    metrics: Metrics
    on_close: Callable[[float], None]
    mailbox: Mailbox = field(default_factory=Mailbox)
    started: float = field(default_factory=time.monotonic)
    _last: dict[int, float] = field(default_factory=dict)
    _closed: bool = False

    def submit(self, prompts: list[Prompt]) -> None:
        """Send every sequence to the engine."""
        for index, prompt in enumerate(prompts):
            request = AddRequest(self._engine_id(index), prompt.token_ids, prompt.params)
            self.engine.submit(request, self.mailbox, index)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """New text until every choice is finished; raises `ApiError` when the engine fails."""
        while not all(choice.finished for choice in self.choices):
            deltas = [d for a in await self.mailbox.take() if (d := self._accept(a)) is not None]
            if deltas:
                yield _merged(deltas)

    def usage(self) -> Usage:
        """Counts over all choices."""
        return Usage(
            sum(c.usage.prompt_tokens for c in self.choices),
            sum(c.usage.completion_tokens for c in self.choices),
            sum(c.usage.cached_tokens for c in self.choices),
        )

    def close(self) -> None:
        """Abort what is unfinished and give the places back; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            if not choice.finished:
                self.engine.abort(self._engine_id(choice.index))
                self.metrics.on_finished("abort", choice.usage.prompt_tokens, 0, None)
        self.on_close(time.monotonic() - self.started)

    def _engine_id(self, index: int) -> str:
        return f"{self.request_id}-{index}"

    def _accept(self, arrival: Arrival) -> Delta | None:
        choice = self.choices[arrival.index]
        if choice.finished:
            return None
        output = arrival.output
        self._measure(choice, arrival)
        if output.finish_reason in ("error", "abort"):
            choice.finished = True
            self.metrics.on_finished(output.finish_reason, choice.usage.prompt_tokens, 0, None)
            raise engine_error(output.error or "the engine gave the request up")
        delta = choice.feed(output)
        if delta is not None and delta.finish_reason is not None:
            if output.finish_reason is None:  # a stop string: the engine does not know it
                self.engine.abort(self._engine_id(choice.index))
            usage = choice.usage
            self.metrics.on_finished(
                delta.finish_reason,
                usage.prompt_tokens,
                usage.completion_tokens,
                arrival.at - self.started,
            )
        return delta

    def _measure(self, choice: Choice, arrival: Arrival) -> None:
        output = arrival.output
        count = len(output.token_ids) + (output.stop_token_id is not None)
        if not count:
            return
        last = self._last.get(choice.index)
        if last is None:
            self.metrics.on_first_token(choice.usage.prompt_tokens, arrival.at - self.started)
        else:
            self.metrics.on_gap((arrival.at - last) / count)
        self.metrics.on_tokens(count)
        self._last[choice.index] = arrival.at


def _merged(deltas: list[Delta]) -> list[Delta]:
    """One delta for each choice: what came together is sent together."""
    if len(deltas) == 1:
        return deltas
    merged: dict[int, Delta] = {}
    for delta in deltas:
        before = merged.get(delta.index)
        merged[delta.index] = (
            delta
            if before is None
            else Delta(
                delta.index, before.text + delta.text, delta.finish_reason, delta.stop_reason
            )
        )
    return list(merged.values())
