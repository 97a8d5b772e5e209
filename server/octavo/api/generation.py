"""From token outputs to text: one HTTP request's sequences, from admission to the final event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from itertools import zip_longest

import msgspec

from octavo.api.engine_client import Arrival, EngineClient, Mailbox
from octavo.api.errors import ApiError, engine_error
from octavo.api.logprobs import PlacedLogprobs
from octavo.logprobs import TokenLogprobs
from octavo.metrics import Metrics
from octavo.params import SamplingParams
from octavo.text.assembly import TextAssembly
from octavo.text.tokenizer import Tokenizer
from octavo.wire import AddRequest, TokenOutput


# One is made for each token, and it can be part of no cycle.
class Delta(msgspec.Struct, frozen=True, gc=False):
    """New text of one choice; `finish_reason` comes once, with the last.

    `logprobs` are of the tokens since the delta before; some of their text may come later.
    """

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[PlacedLogprobs, ...] = ()


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
    """One validated sequence to generate.

    `echo` is the prompt's text where the answer is to begin with it; with `echo_only` that is all,
    and the token that the engine cannot help drawing is dropped.
    """

    token_ids: list[int]
    params: SamplingParams
    echo: str | None = None
    echo_only: bool = False
    shows_logprobs: bool = True  # not where the engine tells them for the ranking alone
    shows_prompt_logprobs: bool = False
    priority: int = 0
    cache_salt: str = ""


class Choice:
    """The growing output of one sequence."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        params = prompt.params
        self.index = index
        self.usage = Usage(prompt_tokens=len(prompt.token_ids))
        self.finished = False
        self.last_at: float | None = None  # when its newest tokens came (monotonic seconds)
        self._prompt = prompt
        self._params = params
        self._tokenizer = tokenizer
        self._text = TextAssembly(tokenizer, prompt.token_ids, params)
        self.of_prompt: list[TokenLogprobs] = []  # set before the first output is fed
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.cumulative_logprob = 0.0
        self._begun = False
        self._placed: list[PlacedLogprobs] = []  # not yet in a delta

    def feed(self, output: TokenOutput) -> Delta | None:
        """Take an output of the engine; None when no text is certain yet."""
        usage, growing = self.usage, self._text
        if output.num_cached_tokens > usage.cached_tokens:
            usage.cached_tokens = output.num_cached_tokens
        text = "" if self._begun else self._begin()
        if self._prompt.echo_only:
            return self._finish(text, "length", None) if output.finish_reason else None
        for place, token_id in enumerate(output.token_ids):
            usage.completion_tokens += 1
            if output.logprobs is not None:
                offset = len(self._prompt.echo or "") + growing.num_chars
                self._place(token_id, offset, output.logprobs[place])
                self.cumulative_logprob += output.logprobs[place].logprob
            text += growing.push(token_id)
            if growing.matched is not None:
                return self._finish(text, "stop", growing.matched)
        if output.finish_reason is None:
            return self._delta(text) if text else None
        return self._end(text, output)

    def _begin(self) -> str:
        """What comes before the first token: the prompt, where it is to be echoed."""
        self._begun = True
        if self._prompt.shows_prompt_logprobs:
            self.prompt_logprobs = self.of_prompt
        if self._prompt.echo is None:
            return ""
        if self._params.logprobs is not None:
            self._place_prompt(self.of_prompt)
        return self._prompt.echo

    def _place_prompt(self, found: list[TokenLogprobs]) -> None:
        ids = self._prompt.token_ids
        detokenizer = self._tokenizer.detokenizer([])
        offset = 0
        for token_id, of_token in zip_longest(ids, [None, *found]):
            self._place(token_id, offset, of_token)
            offset += len(detokenizer.push(token_id))

    def _end(self, text: str, output: TokenOutput) -> Delta:
        if output.stop_token_id is not None:
            self.usage.completion_tokens += 1
            if output.logprobs is not None and len(output.logprobs) > len(output.token_ids):
                self.cumulative_logprob += output.logprobs[-1].logprob
        text += self._text.flush(output.stop_token_id)
        if self._text.matched is not None:
            return self._finish(text, "stop", self._text.matched)
        asked = output.stop_token_id in self._params.stop_token_ids
        reason = output.finish_reason or "stop"
        return self._finish(text, reason, output.stop_token_id if asked else None)

    def _place(self, token_id: int, offset: int, found: TokenLogprobs | None) -> None:
        self._placed.append(PlacedLogprobs(token_id, offset, found))

    def _delta(
        self, text: str, reason: str | None = None, stop_reason: int | str | None = None
    ) -> Delta:
        if not self._placed:
            return Delta(self.index, text, reason, stop_reason)
        placed, self._placed = tuple(self._placed), []
        shown = placed if self._prompt.shows_logprobs else ()
        return Delta(self.index, text, reason, stop_reason, shown)

    def _finish(self, text: str, reason: str, stop_reason: int | str | None) -> Delta:
        self.finished = True
        return self._delta(text, reason, stop_reason)


@dataclass(slots=True)
class Generation:
    """The sequences of one HTTP request: of each prompt, one after another, its samples.

    Of the samples of a prompt `kept` are answered with, the most probable.
    `close` must be called, however the request ends.
    """

    request_id: str
    choices: list[Choice]
    engine: EngineClient
    metrics: Metrics
    on_close: Callable[[float], None]
    samples: int = 1
    kept: int = 1
    mailbox: Mailbox = field(default_factory=Mailbox)
    started: float = field(default_factory=time.monotonic)
    _unfinished: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        self._unfinished = len(self.choices)

    def submit(self, prompts: list[Prompt]) -> None:
        """Send every sequence to the engine."""
        for index, prompt in enumerate(prompts):
            request = AddRequest(
                f"{self.request_id}-{index}",
                prompt.token_ids,
                prompt.params,
                prompt.priority,
                prompt.cache_salt,
            )
            self.engine.submit(request, self.mailbox, index * self.samples)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """New text until every choice is finished; raises `ApiError` when the engine fails."""
        while self._unfinished:
            if deltas := self._accept_all(await self.mailbox.take()):
                yield deltas

    async def forward(self, take: Callable[[list[Delta]], bool]) -> None:
        """Call `take` with new text in the very turn that brings it; no task wakes for a step.

        Returns when every choice is finished or `take` returned False: it wants no more for now.
        Raises as `deltas` does.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def read() -> None:
            if ended.done():
                return
            try:
                deltas = self._accept_all(self.mailbox.empty())
                goes_on = take(deltas) if deltas else True
            except BaseException as error:  # such as a panic of the tokenizer's back end
                ended.set_exception(error)  # raised in the task of this stream, not in the loop's
                return
            if not (goes_on and self._unfinished):
                ended.set_result(None)

        with self.mailbox.read_by(read):
            read()  # what came before
            await ended

    def best(self) -> list[int]:
        """Which choices to answer with, prompt by prompt, the most probable first if any are left
        out."""
        indices: list[int] = []
        for first in range(0, len(self.choices), self.samples):
            of_prompt = list(range(first, first + self.samples))
            if self.kept < self.samples:
                of_prompt.sort(key=lambda i: -self.choices[i].cumulative_logprob)
            indices += of_prompt[: self.kept]
        return indices

    def usage(self) -> Usage:
        """Counts over all choices; a prompt counts once, whatever its samples."""
        prompts = self.choices[:: self.samples]
        return Usage(
            sum(c.usage.prompt_tokens for c in prompts),
            sum(c.usage.completion_tokens for c in self.choices),
            sum(c.usage.cached_tokens for c in prompts),
        )

    def close(self) -> None:
        """Abort what is unfinished and give the places back; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            if not choice.finished:
                self._abort(choice)
                self.metrics.on_finished("abort", choice.usage.prompt_tokens, 0, None)
        self.on_close(time.monotonic() - self.started)

    def _abort(self, choice: Choice) -> None:
        prompt, sample = divmod(choice.index, self.samples)
        self.engine.abort(f"{self.request_id}-{prompt}", sample)

    def _accept_all(self, arrivals: list[Arrival]) -> list[Delta]:
        """One delta for each choice with new text: what came together is sent together."""
        deltas = [d for a in arrivals if (d := self._accept(a)) is not None]
        return deltas if len(deltas) < 2 else _merged(deltas)

    def _accept(self, arrival: Arrival) -> Delta | None:
        choice = self.choices[arrival.index]
        if choice.finished:
            return None
        output = arrival.output
        self._measure(choice, arrival)
        if output.finish_reason in ("error", "abort"):
            choice.finished = True
            self._unfinished -= 1
            self.metrics.on_finished(output.finish_reason, choice.usage.prompt_tokens, 0, None)
            if output.refused:
                raise ApiError(400, output.error or "the engine refuses the request")
            raise engine_error(output.error or "the engine gave the request up")
        if output.prompt_logprobs is not None:  # with the first sample, for all of the prompt
            first = choice.index - choice.index % self.samples
            for sibling in self.choices[first : first + self.samples]:
                sibling.of_prompt = output.prompt_logprobs
        delta = choice.feed(output)
        if delta is not None and delta.finish_reason is not None:
            self._unfinished -= 1
            if output.finish_reason is None:  # a stop string: the engine does not know it
                self._abort(choice)
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
        last, choice.last_at = choice.last_at, arrival.at
        if last is None:
            counted = choice.usage.prompt_tokens if choice.index % self.samples == 0 else 0
            self.metrics.on_first_token(counted, arrival.at - self.started)
        else:
            self.metrics.on_gap((arrival.at - last) / count)
        self.metrics.on_tokens(count)


def _merged(deltas: list[Delta]) -> list[Delta]:
    of_choices: dict[int, list[Delta]] = {}
    for delta in deltas:
        of_choices.setdefault(delta.index, []).append(delta)
    return [_joined(of_choice) for of_choice in of_choices.values()]


def _joined(deltas: list[Delta]) -> Delta:
    """One choice's deltas as one: thousands of them, where a client reads slowly."""
    if len(deltas) == 1:
        return deltas[0]
    text = "".join([delta.text for delta in deltas])
    placed = tuple([p for delta in deltas for p in delta.logprobs])
    return msgspec.structs.replace(deltas[-1], text=text, logprobs=placed)
