"""What the routes work with: the state of the server, and the way of a request into the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import msgspec

from octavo.api.admission import Admission
from octavo.api.engine_client import EngineClient
from octavo.api.errors import ApiError
from octavo.api.generation import Choice, Generation, Prompt
from octavo.api.lifecycle import Lifecycle, State
from octavo.api.limits import ENGINE_HUNG_S
from octavo.api.logprobs import LogprobsWriter
from octavo.api.requests import ChatBody, SamplingBody
from octavo.config import ServeConfig
from octavo.metrics import EngineView, Metrics
from octavo.params import ParameterError
from octavo.text.loader import TextSide
from octavo.text.template import TemplateRefusedError
from octavo.wire import Ready

STARTING_RETRY_S = 5
DRAINING_RETRY_S = 1
FAILED_RETRY_S = 30


class Serving:
    """One server's parts, shared by the routes and the supervisor."""

    def __init__(self, config: ServeConfig, engine: EngineClient) -> None:
        self.config = config
        self.engine = engine
        self.lifecycle = Lifecycle(hung_after=ENGINE_HUNG_S)
        self.admission = Admission(config.max_queue)
        self.text: TextSide | None = None
        # One thread: a long prompt delays other new prompts, never a running stream.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        cache_config = {"gpu_memory_utilization": str(config.engine.gpu_memory_utilization)}
        self.metrics = Metrics(config.served_model_names[0], cache_config, self._view)

    def close(self) -> None:
        """Stop the encoding thread."""
        self._encoding.shutdown(wait=False, cancel_futures=True)

    @property
    def logprobs(self) -> LogprobsWriter | None:
        """What lays out log-probabilities, once the tokenizer is there."""
        return LogprobsWriter(self.text.tokenizer) if self.text else None

    def require_serving(self) -> tuple[Ready, TextSide]:
        """The engine's facts and the text side, or a 503 that says why not and when to retry."""
        life = self.lifecycle
        if life.serving and life.engine is not None and self.text is not None:
            return life.engine, self.text
        self.metrics.on_rejected("not_serving")
        if life.state is State.STARTING:
            eta = life.progress.eta_s
            retry = STARTING_RETRY_S if eta is None else max(1, min(30, round(eta)))
            raise ApiError(503, "the model is still loading", retry_after=retry)
        if life.state is State.DRAINING:
            raise ApiError(503, "the server is shutting down", retry_after=DRAINING_RETRY_S)
        why = life.failure.message if life.failure else "the engine does not respond"
        raise ApiError(503, f"the server cannot serve: {why}", retry_after=FAILED_RETRY_S)

    def model_name(self, asked: str | None) -> str:
        """The name to answer with; an unknown one is a 404."""
        names = self.config.served_model_names
        if not asked:
            return names[0]
        if asked not in names:
            raise ApiError(
                404,
                f"the model {asked[:100]!r} is not served here; served: {', '.join(names)}",
                param="model",
            )
        return asked

    async def start_chat(self, body: ChatBody) -> Generation:
        """Admit, render and encode a conversation and send it to the engine."""
        _, text = self.require_serving()
        template = text.template
        if template is None:
            raise ApiError(
                400,
                "the model has no chat template; use /v1/completions, "
                "or start the server with --chat-template",
                param="messages",
            )
        conversation, values = body.conversation(), body.template_values()

        def encode() -> list[list[int]]:
            tokenizer = text.tokenizer
            try:
                rendered, quoted = template.render(
                    conversation, tokenizer.spelled_control_tokens, values
                )
            except TemplateRefusedError as error:
                raise ApiError(
                    400, f"the chat template refuses these messages: {error}", param="messages"
                ) from error
            self._refuse_endless(rendered, "messages")
            return [tokenizer.encode_chat(rendered, quoted)]

        return await self._start(body, "chatcmpl", "messages", 1, encode)

    async def start_completion(
        self, body: SamplingBody, prompts: Sequence[str | list[int]]
    ) -> Generation:
        """Admit and encode prompts and send them to the engine."""
        _, text = self.require_serving()

        def encode() -> list[list[int]]:
            return [self._encode_raw(text, prompt) for prompt in prompts]

        return await self._start(body, "cmpl", "prompt", len(prompts), encode)

    def _encode_raw(self, text: TextSide, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        self._refuse_endless(prompt, "prompt")
        return text.tokenizer.encode(prompt)

    async def _start(
        self,
        body: SamplingBody,
        prefix: str,
        field: str,
        count: int,
        encode: Callable[[], list[list[int]]],
    ) -> Generation:
        engine, text = self.require_serving()
        samples = body.samples(engine.max_num_seqs)
        self._check_priority(body)
        count *= samples
        self._enter(count, engine)
        try:
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(
                self._encoding,
                lambda: [_prompt(ids, body, engine, text, field) for ids in encode()],
            )
            each = [prompt for prompt in prompts for _ in range(samples)]
            choices = [Choice(i, p, text.tokenizer) for i, p in enumerate(each)]
        except BaseException:
            self._leave(count, None)
            raise
        generation = Generation(
            f"{prefix}-{uuid4().hex}",
            choices,
            self.engine,
            self.metrics,
            on_close=lambda seconds: self._leave(count, seconds),
            samples=samples,
            kept=(body.n or 1) if body.ranks else samples,
        )
        generation.submit(prompts)
        self.lifecycle.on_in_flight(self.engine.in_flight)
        return generation

    def _check_priority(self, body: SamplingBody) -> None:
        if body.priority and self.config.engine.scheduling_policy != "priority":
            raise ApiError(
                400, "priority needs a server with --scheduling-policy priority", param="priority"
            )

    def _enter(self, count: int, engine: Ready) -> None:
        if self.admission.enter(count):
            return
        self.metrics.on_rejected("max_num_queued_reqs")
        raise ApiError(
            429,
            f"the queue is full: {self.admission.unfinished} of {self.admission.limit} unfinished "
            f"requests, and this one brings {count}",
            retry_after=self.admission.retry_after(engine.max_num_seqs),
        )

    def _leave(self, count: int, seconds: float | None) -> None:
        self.admission.leave(count, seconds)
        self.lifecycle.on_in_flight(self.engine.in_flight)

    def _refuse_endless(self, text: str, field: str) -> None:
        """Refuse without encoding what must be too long even if every token were the longest."""
        engine, side = self.lifecycle.engine, self.text
        if engine is None or side is None:
            return
        at_least = len(text) // side.tokenizer.longest_token
        if at_least > engine.max_model_len:
            raise ApiError(
                400,
                f"the prompt has more than {at_least} tokens; "
                f"the context is {engine.max_model_len} tokens",
                param=field,
            )

    def _view(self) -> EngineView:
        life = self.lifecycle
        return EngineView(
            load=life.load,
            ready=life.engine,
            progress=life.progress,
            draining=life.state is State.DRAINING,
        )


def _prompt(
    ids: list[int], body: SamplingBody, engine: Ready, text: TextSide, field: str
) -> Prompt:
    """Check a prompt against the model and the context."""
    _check_ids(ids, engine, field)
    room, asked = engine.max_model_len - len(ids), body.asked_max_tokens
    echo_only = body.echoes and asked == 0
    max_tokens = 1 if echo_only else room if asked is None else asked
    try:
        params = body.sampling_params(max_tokens, engine.vocab_size, text.sampling_defaults)
        if asked is None and params.branches > 1:
            # Not the context but the cache bounds what samples that run together can get.
            params = msgspec.structs.replace(params, max_tokens=None)
        if params.bad_words:
            found = text.tokenizer.bad_word_ids(params.bad_words)
            params = msgspec.structs.replace(params, bad_words_ids=found)
            params.validate(engine.vocab_size)
    except ParameterError as error:
        raise ApiError(400, str(error), param=error.param) from error
    if asked is not None and asked > room:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens and max_tokens asks for {asked} more; the context "
            f"is {engine.max_model_len} tokens; ask for at most {room}",
            param="max_tokens",
        )
    return Prompt(
        ids,
        params,
        echo=text.tokenizer.decode(ids) if body.echoes else None,
        echo_only=echo_only,
        shows_logprobs=body.asked_logprobs is not None,
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


def _check_ids(ids: list[int], engine: Ready, field: str) -> None:
    if not ids:
        raise ApiError(400, f"{field} is empty", param=field)
    context = engine.max_model_len
    if len(ids) >= context:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens; the context is {context} tokens, prompt and output "
            f"together; shorten the prompt to at most {context - 1} tokens",
            param=field,
        )
    if min(ids) < 0 or max(ids) >= engine.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < engine.vocab_size)
        raise ApiError(
            400,
            f"{field} holds token id {wrong}; valid ids are 0..{engine.vocab_size - 1}",
            param=field,
        )
