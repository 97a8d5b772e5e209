"""`LLM`: the server's engine in this process, without sockets, for scripts.

Names and result objects are vLLM's. A call is checked as a whole before anything runs: a prompt
that cannot be served raises `PromptError` with its index, and no other prompt has been started.
What fails later, fails alone: its output has the finish reason "error".
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from tqdm import tqdm

from octavo import wire
from octavo.engine.locate import locate
from octavo.engine.startup import Reporter, start
from octavo.errors import ConfigError
from octavo.kv_stats import KvMeter, KvStats
from octavo.llm_inputs import (
    DEFAULT_PARAMS,
    Limits,
    LLMOptions,
    Prompt,
    PromptError,
    as_prompts,
    check,
    engine_config,
    one_for_each,
)
from octavo.logprobs import TokenLogprobs
from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.params import SamplingParams
from octavo.text.assembly import TextAssembly
from octavo.text.loader import TextSide, load_text_side
from octavo.text.template import ChatTemplate, TemplateRefusedError
from octavo.text.tokenizer import Tokenizer

# Looking at every step would cost a large batch a twentieth of its time.
STEPS_BETWEEN_LOOKS = 8

logger = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class _Request:
    """A prompt on its way."""

    result: RequestOutput
    params: SamplingParams
    priority: int
    assembly: TextAssembly | None
    metrics: RequestMetrics


class LLM:
    """A model, loaded once; `generate` and `chat` run many prompts at a time.

    `model` is a folder; the keywords are those of `LLMOptions`. Not for several threads at once.
    """

    def __init__(self, model: str, **options: Unpack[LLMOptions]) -> None:
        report = Reporter(lambda _: None)
        config = locate(engine_config(model, options), report, report.located)
        self._folder = options.get("tokenizer") or config.model
        self._text: TextSide | None = None
        if not options.get("skip_tokenizer_init", False):
            self._text = load_text_side(self._folder, options.get("chat_template"))
        self._loop, self._ready = start(config, report)
        self._limits = Limits(self._ready.max_model_len, self._ready.vocab_size)
        self._ids = itertools.count()
        self._meter = KvMeter(self._ready.block_size)
        self._templates: dict[str, ChatTemplate | None] = {}

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode` and `decode`."""
        return self._side("a tokenizer").tokenizer

    def kv_stats(self) -> KvStats:
        """Blocks by state now; waste and sharing as means over the steps since the start."""
        return self._meter.stats(self._loop.scheduler.pool.counts)

    def generate(
        self,
        prompts: object,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; the results are in the order of the prompts.

        A prompt is a text, a list of token ids, or a dict with `prompt` or `prompt_token_ids`.
        """
        given = as_prompts(prompts)
        encoded = [self._encode(index, prompt) for index, prompt in enumerate(given)]
        texts = [prompt.text for prompt in given]
        return self._run(texts, encoded, sampling_params, priority, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of messages with role and content."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        template = self._template(chat_template)
        tokenizer = self.get_tokenizer()
        extra = {"tools": tools, **(chat_template_kwargs or {})}
        extra["add_generation_prompt"] = add_generation_prompt
        texts, encoded = [], []
        for index, conversation in enumerate(conversations):
            plain = [_message(index, message) for message in conversation]
            try:
                text, quoted = template.render(plain, tokenizer.spelled_control_tokens, extra)
            except TemplateRefusedError as error:
                raise PromptError(index, f"the chat template refuses it: {error}") from error
            encoded.append(tokenizer.encode_chat(text, quoted))
            for mark, spelling in quoted.items():
                text = text.replace(mark, spelling)
            texts.append(text)
        return self._run(texts, encoded, sampling_params, None, use_tqdm=use_tqdm)

    # In

    def _side(self, wanted: str) -> TextSide:
        if self._text is None:
            raise ConfigError(f"{wanted} is needed here; leave skip_tokenizer_init out")
        return self._text

    def _template(self, given: str | None) -> ChatTemplate:
        side = self._side("a chat template")
        if given is not None and given not in self._templates:
            self._templates[given] = load_text_side(self._folder, given).template
        template = side.template if given is None else self._templates[given]
        if template is None:
            raise ConfigError("the model has no chat template; give one with chat_template=")
        return template

    def _encode(self, index: int, prompt: Prompt) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self._text is None:
            raise PromptError(index, "a text needs the tokenizer; leave skip_tokenizer_init out")
        return self._text.tokenizer.encode(prompt.text or "")

    def _run(
        self,
        texts: Sequence[str | None],
        encoded: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        *,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = one_for_each("sampling_params", sampling_params, len(encoded), DEFAULT_PARAMS)
        priorities = one_for_each("priorities", priority, len(encoded), 0)
        for index, ids in enumerate(encoded):
            check(index, ids, params[index], self._limits)
            if params[index].stop and self._text is None:
                raise PromptError(index, "stop strings need the tokenizer; use stop_token_ids")
        requests = [
            self._request(text, ids, own, place)
            for text, ids, own, place in zip(texts, encoded, params, priorities, strict=True)
        ]
        self._drive({r.result.request_id: r for r in requests}, use_tqdm=use_tqdm)
        return [request.result for request in requests]

    def _request(
        self, text: str | None, ids: list[int], params: SamplingParams, priority: int
    ) -> _Request:
        metrics = RequestMetrics(time.time(), time.monotonic())
        assembly = TextAssembly(self._text.tokenizer, ids, params) if self._text else None
        result = RequestOutput(
            str(next(self._ids)), text, ids, [CompletionOutput(0)], metrics=metrics
        )
        return _Request(result, params, priority, assembly, metrics)

    # Out

    def _drive(self, requests: dict[str, _Request], *, use_tqdm: bool) -> None:
        """Step until every request is over; leave nothing behind, however it ends."""
        for request_id, request in requests.items():
            ids = request.result.prompt_token_ids
            self._loop.add(wire.AddRequest(request_id, ids, request.params, request.priority))
        bar = tqdm(
            total=len(requests),
            desc="Processed prompts",
            disable=not use_tqdm,
            dynamic_ncols=True,
        )
        try:
            with bar:
                self._step_until_done(requests, bar)
        except BaseException:
            self._loop.abort_all()
            self._loop.step()
            self._loop.scheduler.check_integrity()
            raise

    def _step_until_done(self, requests: dict[str, _Request], bar: tqdm[Any]) -> None:
        unscheduled = set(requests)
        begin, tokens, steps = time.monotonic(), 0, 0
        while self._loop.has_work:
            outputs = self._loop.step()
            now = time.monotonic()
            self._note_scheduled(requests, unscheduled, outputs, now)
            if steps % STEPS_BETWEEN_LOOKS == 0:
                scheduler = self._loop.scheduler
                self._meter.observe(scheduler.running, scheduler.pool.counts.active)
            steps += 1
            for output in outputs:
                request = requests.get(output.request_id)
                if request is None or request.result.finished:
                    continue
                tokens += len(output.token_ids)
                if self._take(request, output, now):
                    rate = tokens / max(1e-9, now - begin)
                    bar.set_postfix_str(f"output: {rate:.1f} tokens/s", refresh=False)
                    bar.update()

    def _note_scheduled(
        self,
        requests: dict[str, _Request],
        unscheduled: set[str],
        outputs: Iterable[wire.TokenOutput],
        now: float,
    ) -> None:
        if not unscheduled:
            return
        seen = {sequence.request_id for sequence in self._loop.scheduler.running}
        seen.update(output.request_id for output in outputs if output.token_ids)
        for request_id in seen & unscheduled:
            requests[request_id].metrics.scheduled_ts = now
        unscheduled -= seen

    def _take(self, request: _Request, output: wire.TokenOutput, now: float) -> bool:
        """Add an output to its request; true when it was the last."""
        result, metrics = request.result, request.metrics
        result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
        if output.token_ids or output.stop_token_id is not None:
            metrics.first_token_ts = metrics.first_token_ts or now
            metrics.last_token_ts = now
        if output.prompt_logprobs is not None:
            # The first token of a prompt has nothing before it.
            result.prompt_logprobs = [None, *map(self._logprobs, output.prompt_logprobs)]
        result.finished = self._continue(request, result.outputs[0], output)
        metrics.num_generation_tokens = len(result.outputs[0].token_ids)
        return result.finished

    def _continue(
        self, request: _Request, choice: CompletionOutput, output: wire.TokenOutput
    ) -> bool:
        assembly = request.assembly
        for place, token_id in enumerate(output.token_ids):
            choice.token_ids.append(token_id)
            if output.logprobs is not None:
                self._add_logprobs(choice, output.logprobs[place])
            if assembly is None:
                continue
            choice.text += assembly.push(token_id)
            if assembly.matched is not None:
                choice.finish_reason, choice.stop_reason = "stop", assembly.matched
                if output.finish_reason is None:
                    self._loop.abort(request.result.request_id)
                return True
        if output.finish_reason is None:
            return False
        self._finish(request, choice, output)
        return True

    def _finish(
        self, request: _Request, choice: CompletionOutput, output: wire.TokenOutput
    ) -> None:
        """Take in the last output: what ended the request, and the text held back."""
        choice.finish_reason = output.finish_reason
        if request.assembly is not None:
            choice.text += request.assembly.flush()
            if request.assembly.matched is not None:
                choice.finish_reason, choice.stop_reason = "stop", request.assembly.matched
        if output.stop_token_id is not None:
            choice.token_ids.append(output.stop_token_id)
            if output.logprobs is not None and len(output.logprobs) > len(output.token_ids):
                self._add_logprobs(choice, output.logprobs[-1])
            if output.stop_token_id in request.params.stop_token_ids:
                choice.stop_reason = output.stop_token_id
        if output.error is not None:
            choice.stop_reason = output.error
            logger.warning("request %s failed: %s", request.result.request_id, output.error)

    def _add_logprobs(self, choice: CompletionOutput, found: TokenLogprobs) -> None:
        if choice.logprobs is None:
            choice.logprobs, choice.cumulative_logprob = [], 0.0
        choice.logprobs.append(self._logprobs(found))
        choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + found.logprob

    def _logprobs(self, found: TokenLogprobs) -> dict[int, Logprob]:
        """The drawn token first, then the most likely ones."""
        pairs = [(found.token_id, found.logprob, found.rank)]
        pairs += zip(found.top_ids, found.top_logprobs, itertools.count(1), strict=False)
        return {i: Logprob(value, rank, self._spelling(i)) for i, value, rank in reversed(pairs)}

    def _spelling(self, token_id: int) -> str | None:
        return self._text.tokenizer.decode([token_id]) if self._text else None


def _message(index: int, message: Mapping[str, Any]) -> dict[str, str]:
    """A message with plain text; a content of text parts is joined."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(index, "a message is a dict with role and content")
    plain = {key: value for key, value in message.items() if isinstance(value, str)}
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        if not all(isinstance(part, str) for part in parts):
            raise PromptError(index, "only text parts are supported in a message's content")
        plain["content"] = "".join(str(part) for part in parts)
    elif not isinstance(content, str):
        raise PromptError(index, "a message's content must be a text")
    return plain
