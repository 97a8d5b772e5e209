"""Request bodies: decoding, types, what is not supported yet, and the engine's parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from octavo.api.errors import ApiError
from octavo.api.limits import MAX_JSON_DEPTH, MAX_MESSAGES, MAX_PROMPTS
from octavo.params import MAX_LOGPROBS, MAX_N, ParameterError, SamplingParams
from octavo.text.template import Message

# Each field with the values that ask for nothing; any other value is refused by name.
_UNSUPPORTED_BOTH: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
}
_UNSUPPORTED_CHAT: Mapping[str, tuple[object, ...]] = {
    **_UNSUPPORTED_BOTH,
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_UNSUPPORTED_COMPLETION: Mapping[str, tuple[object, ...]] = {
    **_UNSUPPORTED_BOTH,
    "suffix": ("",),
    "prompt_embeds": (),
}
# Fields whose values the engine takes as they are.
_SAMPLING = (
    "n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "min_tokens",
    "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words",
    "seed", "stop", "stop_token_ids", "ignore_eos", "prompt_logprobs",
    "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip
# Names that a template gets from the server itself.
_TEMPLATE_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_INTEGERS = frozenset({int})  # the type itself: True is none
_CONTAINERS = (dict, list)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options` of a streaming request."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingBody(msgspec.Struct, kw_only=True):
    """The fields that chat and completion requests share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        """The client's bound on the output, if any."""
        return self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """How many of the most probable tokens are to be told beside each token."""
        return None

    def samples(self, most: int) -> int:
        """How many outputs of each prompt; all run together, so at most as many as may run.

        Of a beam search the engine gives the best, of samples all: which are best is known here.
        """
        most = min(most, MAX_N)
        n = 1 if self.n is None else self.n
        branches = n if self.best_of is None else self.best_of
        for name, value in (("n", n), ("best_of", branches)):
            if not 1 <= value <= most:
                raise ApiError(400, f"{name} must be in 1..{most}, got {value}", param=name)
        if branches < n:
            raise ApiError(400, f"best_of ({branches}) is below n ({n})", param="best_of")
        return n if self.use_beam_search else branches

    @property
    def ranks(self) -> bool:
        """Whether more samples are drawn than answered with."""
        return not self.use_beam_search and (self.best_of or 1) > (self.n or 1)

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    def sampling_params(
        self, max_tokens: int, vocab_size: int, defaults: Mapping[str, float]
    ) -> SamplingParams:
        """The engine's parameters; raises `ParameterError` when one is out of range.

        `defaults` stand for what the request leaves out.
        """
        searches = bool(self.use_beam_search)
        given: dict[str, Any] = {
            # A search draws nothing, so that how to draw does not concern it.
            **({"temperature": 0.0} if searches else defaults),
            **{name: v for name in _SAMPLING if (v := getattr(self, name)) is not None},
            "max_tokens": max_tokens,
            "logprobs": self.asked_logprobs,
        }
        if self.ranks and self.asked_logprobs is None:
            given["logprobs"] = 0  # they tell which samples are the best
        if given.get("top_k") == 0:  # vLLM's other way to say "off"
            given["top_k"] = -1
        given["top_k"] = min(given.get("top_k", -1), vocab_size)
        if self.echoes and self.asked_logprobs is not None:
            given["prompt_logprobs"] = max(self.prompt_logprobs or 0, self.asked_logprobs)
        params = SamplingParams(**given)
        params.validate(vocab_size)
        return params


class ContentPart(msgspec.Struct):
    """One part of a message whose content is a list."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


class ChatBody(SamplingBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def asked_logprobs(self) -> int | None:
        """`top_logprobs` if `logprobs` is on."""
        count = self.top_logprobs or 0
        if not self.logprobs:
            if count:
                raise ParameterError("top_logprobs", "top_logprobs needs logprobs: true")
            return None
        if not 0 <= count <= MAX_LOGPROBS:
            raise ParameterError(
                "top_logprobs", f"top_logprobs must be in 0..{MAX_LOGPROBS}, got {count}"
            )
        return count

    @property
    def asked_max_tokens(self) -> int | None:
        """`max_completion_tokens` replaced `max_tokens`, which is still in use."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> list[Message]:
        """The messages as the template takes them: text only."""
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise ApiError(
                400,
                f"messages must hold 1..{MAX_MESSAGES} messages, got {len(self.messages)}",
                param="messages",
            )
        return [_message(m, f"messages[{i}]") for i, m in enumerate(self.messages)]

    def template_values(self) -> dict[str, Any]:
        """Plain extra values for the template (`enable_thinking` and the like)."""
        values = self.chat_template_kwargs or {}
        for key, value in values.items():
            plain = value is None or isinstance(value, str | int | float)
            if not key.isidentifier() or key in _TEMPLATE_RESERVED or not plain:
                raise ApiError(
                    400,
                    f"chat_template_kwargs.{key[:64]}: only plain values are allowed, under "
                    "names that the server does not use itself",
                    param="chat_template_kwargs",
                )
        return values


class CompletionBody(SamplingBody, kw_only=True):
    """POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def asked_logprobs(self) -> int | None:
        """`logprobs` is a number here."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """`echo`."""
        return bool(self.echo)

    def prompts(self) -> list[str | list[int]]:
        """The prompts: a text, token ids, or a list of either."""
        prompt = self.prompt
        single = isinstance(prompt, str) or (_is_ids(prompt) and len(prompt) > 0)
        prompts = [prompt] if single else prompt
        # The number first: it bounds what the rest looks at.
        if isinstance(prompts, list) and not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ApiError(
                400,
                f"prompt must hold 1..{MAX_PROMPTS} prompts, got {len(prompts)}",
                param="prompt",
            )
        if not isinstance(prompts, list) or not all(
            isinstance(p, str) or _is_ids(p) for p in prompts
        ):
            raise ApiError(
                400,
                "prompt must be a text, a list of texts, a list of token ids or a list of these",
                param="prompt",
            )
        return prompts


Body = TypeVar("Body", ChatBody, CompletionBody)


def decode_chat(raw: bytes) -> ChatBody:
    """Read a chat request or raise a 400 that names the field."""
    return _decode(raw, ChatBody, _UNSUPPORTED_CHAT)


def decode_completion(raw: bytes) -> CompletionBody:
    """Read a completion request or raise a 400 that names the field."""
    return _decode(raw, CompletionBody, _UNSUPPORTED_COMPLETION)


def decode_prompts(raw: bytes) -> tuple[CompletionBody, list[str | list[int]]]:
    """Read a completion request and its prompts, in one go: either may be large."""
    body = decode_completion(raw)
    return body, body.prompts()


def _decode(raw: bytes, body: type[Body], unsupported: Mapping[str, tuple[object, ...]]) -> Body:
    fields = _json_object(raw)
    for name, neutral in unsupported.items():
        value = fields.get(name)
        if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
            raise ApiError(400, f"{name} is not supported yet; leave it out", param=name)
    try:
        decoded = msgspec.convert(fields, body, str_keys=True)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from error
    if decoded.stream_options is not None and not decoded.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if decoded.stream and decoded.ranks:
        raise ApiError(
            400,
            "best_of above n cannot be streamed: which samples are best is known at the end; "
            "leave stream out",
            param="best_of",
        )
    if decoded.stream and decoded.prompt_logprobs is not None:
        raise ApiError(
            400, "prompt_logprobs cannot be streamed; leave stream out", param="prompt_logprobs"
        )
    return decoded


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """Level by level, so that the check itself cannot recurse."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, _CONTAINERS)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {MAX_JSON_DEPTH} levels deep")


def _wrong_type(error: msgspec.ValidationError) -> ApiError:
    """Turn "Expected `int`, got `str` - at `$.seed`" into a sentence and a param."""
    text = str(error)
    what, _, where = text.partition(" - at ")
    # A wrong key of a map is "`key` in `$.map`".
    path = where.rpartition(" in ")[2].strip("`").removeprefix("$").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return ApiError(400, f"{path} is required", param=path)
    what = what.replace("`", "")
    return ApiError(400, f"{path or 'body'}: {what[:1].lower()}{what[1:]}", param=path or None)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= _INTEGERS


def _message(message: ChatMessage, where: str) -> Message:
    if message.role in ("tool", "function") or message.tool_calls:
        raise ApiError(400, f"{where}: tool calls are not supported yet", param=where)
    if message.role not in _ROLES:
        raise ApiError(
            400, f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    plain = {"role": _ROLES[message.role], "content": _content(message.content, f"{where}.content")}
    if message.name is not None:
        # Free text here could complete a control token that the template has begun.
        if not _NAME.fullmatch(message.name):
            raise ApiError(
                400, f"{where}.name has 1..64 letters, digits, _ or -", param=f"{where}.name"
            )
        plain["name"] = message.name
    return plain


def _content(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None:
        raise ApiError(400, f"{where} is required", param=where)
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text" or part.text is None:
            raise ApiError(
                400,
                f"{where}: only parts of type text are supported, got {part.type[:32]!r}",
                param=where,
            )
    return "\n".join(part.text or "" for part in content)
