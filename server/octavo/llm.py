"""`LLM`: the server's engine in this process, without sockets, for scripts.

Names and result objects are vLLM's. A call is checked as a whole before anything runs: a prompt
that cannot be served raises `PromptError` with its index, and no other prompt has been started.
What fails later, fails alone: its output has the finish reason "error".
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import msgspec
from tqdm import tqdm

from octavo import wire
from octavo.collector import Collector
from octavo.engine.locate import locate
from octavo.engine.startup import Reporter, start
from octavo.errors import ConfigError
from octavo.kv_stats import KvMeter, KvStats
from octavo.llm_inputs import (
    DEFAULT_PARAMS,
    BeamSearchParams,
    Limits,
    LLMOptions,
    Prompt,
    PromptError,
    as_prompts,
    check,
    engine_config,
    max_logprobs,
    one_for_each,
)
from octavo.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from octavo.params import ParameterError, SamplingParams
from octavo.text.loader import TextSide, load_text_side
from octavo.text.template import ChatTemplate, TemplateRefusedError
from octavo.text.tokenizer import Tokenizer

# Looking at every step would cost a large batch a twentieth of its time.
STEPS_BETWEEN_LOOKS = 8

Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model, loaded once; `generate` and `chat` run many prompts at a time.

    `model` is a folder; the keywords are those of `LLMOptions`. Not for several threads at once.
    """

    def __init__(self, model: str, **options: Unpack[LLMOptions]) -> None:
        report, most = Reporter(lambda _: None), max_logprobs(options)
        config = locate(engine_config(model, options), report, report.located)
        self._folder = options.get("tokenizer") or config.model
        self._text: TextSide | None = None
        if not options.get("skip_tokenizer_init", False):
            self._text = load_text_side(self._folder, options.get("chat_template"))
        self._loop, self._ready = start(config, report, offline=True)
        self._limits = Limits(self._ready.max_model_len, self._ready.vocab_size, most)
        self._ids = itertools.count()
        self._meter = KvMeter(self._loop.scheduler.kv, self._ready.kv_bytes_per_block)
        self._templates: dict[str, ChatTemplate | None] = {}

    @property
    def vocab_size(self) -> int:
        """Token ids are 0..vocab_size-1."""
        return self._limits.vocab_size

    def prepare(self) -> None:
        """Prepare for every size of step now, instead of when it first comes: on a GPU seconds."""
        while self._loop.prepare_one():
            pass

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

    def beam_search(
        self, prompts: object, params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of every prompt; prompts are as for `generate`."""
        results = self.generate(prompts, params.as_sampling(), use_tqdm=use_tqdm)
        return [
            BeamSearchOutput(
                [
                    BeamSearchSequence(
                        result.prompt_token_ids + choice.token_ids,
                        choice.text,
                        choice.cumulative_logprob or 0.0,
                        choice.finish_reason,
                    )
                    for choice in result.outputs
                ]
            )
            for result in results
        ]

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
            if self._text is None and (params[index].stop or params[index].bad_words):
                raise PromptError(
                    index, "stop strings and bad words need the tokenizer; token ids do not"
                )
        params = [self._with_bad_words(index, own) for index, own in enumerate(params)]
        requests = [
            self._request(text, ids, own, place)
            for text, ids, own, place in zip(texts, encoded, params, priorities, strict=True)
        ]
        self._drive({r.result.request_id: r for r in requests}, use_tqdm=use_tqdm)
        return [request.result for request in requests]

    def _request(
        self, text: str | None, ids: list[int], params: SamplingParams, priority: int
    ) -> Collector:
        tokenizer = self._text.tokenizer if self._text else None
        return Collector(str(next(self._ids)), text, ids, params, priority, tokenizer)

    def _with_bad_words(self, index: int, params: SamplingParams) -> SamplingParams:
        """The parameters with the bad words as token ids, which is what the engine knows."""
        if not params.bad_words or self._text is None:
            return params
        try:
            found = self._text.tokenizer.bad_word_ids(params.bad_words)
            params = msgspec.structs.replace(params, bad_words_ids=found)
            params.validate(self._limits.vocab_size)
        except ParameterError as error:
            raise PromptError(index, str(error)) from error
        return params

    # Out

    def _drive(self, requests: dict[str, Collector], *, use_tqdm: bool) -> None:
        """Step until every request is over; leave nothing behind, however it ends."""
        for request_id, request in requests.items():
            ids = request.result.prompt_token_ids
            self._loop.add(wire.AddRequest(request_id, ids, request.asked, request.priority))
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

    def _step_until_done(self, requests: dict[str, Collector], bar: tqdm[Any]) -> None:
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
                ended = request.take(output, now)
                if ended is not None:
                    self._loop.abort(output.request_id, ended)
                if request.result.finished:
                    rate = tokens / max(1e-9, now - begin)
                    bar.set_postfix_str(f"output: {rate:.1f} tokens/s", refresh=False)
                    bar.update()

    def _note_scheduled(
        self,
        requests: dict[str, Collector],
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
