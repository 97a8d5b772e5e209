"""Bad requests: each costs one clear 4xx and nothing else; other streams go on undisturbed."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import ApiServer, eventually, running

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
CANARY_TOKENS = 2000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    flags = ["--step-ms", "1", "--context", "8192"]
    with running(tmp_path_factory.mktemp("bad"), engine=flags) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def canary(server: ApiServer) -> Iterator[None]:
    """A stream that runs beside every bad request and must not lose a token."""
    texts: list[str] = []

    def read() -> None:
        body = {"prompt": "canary", "max_tokens": CANARY_TOKENS, "stream": True}
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])

    thread = threading.Thread(target=read)
    thread.start()
    eventually(lambda: texts, what="canary started")
    yield
    thread.join(60)
    assert not thread.is_alive()
    alone = server.http.post(TEXT, json={"prompt": "canary", "max_tokens": CANARY_TOKENS}).json()
    assert "".join(texts) == alone["choices"][0]["text"]
    eventually(lambda: server.load()["running"] == 0, what="idle engine")
    assert server.process.poll() is None
    assert "Traceback" not in server.log()


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, after a check of its shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    assert 0 < len(body["error"]["message"]) < 600
    return body["error"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt": "a"', b"null", b"[]", b"3", b'"text"', b"\xef\xbb\xbf{}",
        '{"prompt":"a"}'.encode("utf-16"), b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}",
    ],
    ids=lambda b: repr(b[:30]),
)  # fmt: skip
def test_malformed_json(server: ApiServer, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused(server.http.post(path, content=body, headers=headers))


def test_a_wrong_content_type(server: ApiServer) -> None:
    answer = server.http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert "application/json" in refused(answer)["message"]


def test_a_body_above_the_cap(server: ApiServer) -> None:
    large = b'{"prompt": "' + b"a" * (4 * 1024 * 1024) + b'"}'
    headers = {"content-type": "application/json"}
    error = refused(server.http.post(TEXT, content=large, headers=headers), 413)
    assert "4194304" in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 65536

    # The server may also close the connection in the middle of the body: as good.
    with contextlib.suppress(httpx.WriteError):
        refused(server.http.post(TEXT, content=endless(), headers=headers), 413)


WRONG_FIELDS = [
    ("model", 3), ("stream", "yes"), ("stream", 1), ("max_tokens", "5"), ("max_tokens", 1.5),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", True), ("max_tokens", 2**63),
    ("max_tokens", 10**30), ("min_tokens", -1), ("min_tokens", 10**9), ("temperature", -0.1),
    ("temperature", 2.1), ("temperature", "1"), ("temperature", []), ("top_p", 0), ("top_p", 1.1),
    ("top_k", -2), ("top_k", 1.5), ("seed", 2**63), ("seed", "x"), ("stop", 5), ("stop", ""),
    ("stop", [""]), ("stop", ["a"] * 17), ("stop", "a" * 257), ("stop", [1]),
    ("stop", ["a"] * 10**5),
    ("stop_token_ids", [-1]), ("stop_token_ids", [2**40]), ("stop_token_ids", ["a"]),
    ("stop_token_ids", [5] * 129), ("ignore_eos", "no"), ("stream_options", {"include_usage": 3}),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", "0"), ("typical_p", 0), ("typical_p", 2),
    ("presence_penalty", -2.1), ("frequency_penalty", 2.1), ("frequency_penalty", "x"),
    ("repetition_penalty", 0), ("repetition_penalty", 2.5), ("repetition_penalty", True),
    ("logit_bias", {"5": 101}), ("logit_bias", {"5": "x"}), ("logit_bias", {"x": 1}),
    ("logit_bias", {"4096": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", [5]),
    ("logit_bias", {str(i): 1 for i in range(2000)}), ("allowed_token_ids", []),
    ("allowed_token_ids", [4096]), ("allowed_token_ids", [1] * 2000), ("bad_words", "x"),
    ("bad_words", [""]), ("bad_words", [5]), ("bad_words", ["a"] * 200), ("prompt_logprobs", -1),
    ("prompt_logprobs", 21), ("prompt_logprobs", 10**18), ("prompt_logprobs", True),
    ("n", 0), ("n", -1), ("n", 9), ("n", 10**18), ("n", True), ("n", "2"), ("priority", 1),
    ("priority", 2**31), ("priority", "high"), ("cache_salt", 5), ("cache_salt", "a" * 257),
    ("include_stop_str_in_output", "yes"), ("skip_special_tokens", 0),
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS, ids=lambda v: str(v)[:20])
def test_a_wrong_field_is_named(server: ApiServer, path: str, field: str, value: Any) -> None:
    body = {"messages": USER} if path == CHAT else {"prompt": "a"}
    error = refused(server.http.post(path, json={**body, field: value}))
    assert error["param"].split("[")[0].split(".")[0] == field


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *((CHAT, *pair) for pair in [
            ("echo", True),
            ("tools", [{"type": "function"}]), ("tool_choice", "required"),
            ("response_format", {"type": "json_object"}), ("functions", [{}]),
            ("chat_template", "x"), ("continue_final_message", True), ("guided_json", {}),
            ("modalities", ["audio"]),
        ]),
        *((TEXT, *pair) for pair in [
            ("suffix", "x"),
            ("structured_outputs", {"regex": "a"}),
        ]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    server: ApiServer, path: str, field: str, value: Any
) -> None:
    body = {"messages": USER} if path == CHAT else {"prompt": "a"}
    error = refused(server.http.post(path, json={**body, field: value}))
    assert error["param"] == field
    assert f"{field} is not supported yet" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (TEXT, {"logprobs": 21}, "logprobs"), (TEXT, {"logprobs": -1}, "logprobs"),
        (TEXT, {"logprobs": 10**6}, "logprobs"), (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"echo": "yes"}, "echo"), (TEXT, {"max_tokens": 0}, "max_tokens"),
        (TEXT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"logprobs": 5}, "logprobs"), (CHAT, {"top_logprobs": 5}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ],
)  # fmt: skip
def test_wrong_logprobs(server: ApiServer, path: str, body: dict[str, Any], field: str) -> None:
    prompt = {"messages": USER} if path == CHAT else {"prompt": "a"}
    error = refused(server.http.post(path, json={**prompt, **body}))
    assert error["param"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 129}, "best_of"),
        ({"best_of": 0}, "best_of"), ({"best_of": 2, "stream": True}, "best_of"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "n": 4, "best_of": 2}, "best_of"),
        ({"use_beam_search": True, "early_stopping": "always"}, "early_stopping"),
        ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_wrong_numbers_of_samples(
    server: ApiServer, path: str, body: dict[str, Any], field: str
) -> None:
    prompt = {"messages": USER} if path == CHAT else {"prompt": "a"}
    error = refused(server.http.post(path, json={**prompt, **body}))
    assert error["param"] == field


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_neutral_values_and_unknown_fields_are_ignored(server: ApiServer, path: str) -> None:
    body = {"messages": USER} if path == CHAT else {"prompt": "a"}
    neutral = {
        "n": 1, "best_of": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {},
        "response_format": {"type": "text"}, "echo": False, "logprobs": None, "stop": None,
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "model": None,
        "stream": False, "stream_options": None, "x" * 100: [1], "max_tokens": 1, "top_k": 0,
        "seed": -(2**63), "temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1,
        "bad_words": [], "skip_special_tokens": True, "include_stop_str_in_output": False,
        "prompt_logprobs": None, "top_logprobs": None,
    }  # fmt: skip
    answer = server.http.post(path, json={**body, **neutral})
    assert answer.status_code == 200, answer.text
    huge = server.http.post(path, json={**body, "top_k": 10**18, "max_tokens": 1})
    assert huge.status_code == 200, huge.text


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "messages is required"), ([], "messages must hold"), ("hi", "messages"),
        ([{}], "messages[0].role is required"), ([{"role": "user"}], "messages[0].content"),
        ([{"role": "wizard", "content": "a"}], "messages[0].role must be one of"),
        ([{"role": "tool", "content": "a"}], "tool calls are not supported yet"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "tool calls are not supp"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
         "only parts of type text"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "a", "name": "<|im_end|>"}], "messages[0].name"),
        (USER * 1025, "1..1024"),
    ],
)  # fmt: skip
def test_wrong_messages(server: ApiServer, messages: Any, named: str) -> None:
    body = {} if messages is None else {"messages": messages}
    assert named in refused(server.http.post(CHAT, json=body))["message"]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (None, "prompt must be"), (5, "prompt must be"), ({}, "prompt must be"), ([], "1..64"),
        ([[]], "prompt is empty"), (["a", 5], "prompt must be"), ([["a"]], "prompt must be"),
        ([True], "prompt must be"), ([1.5], "prompt must be"), ([5, "a"], "prompt must be"),
        ([-1], "token id -1"), ([4096], "0..4095"), ([2**40], "valid ids"), (["a"] * 65, "1..64"),
        (list(range(10)) * 10_000, "the prompt has 100000 tokens; the context is 8192"),
        ("word " * 10_000, "tokens; the context is 8192 tokens"),
    ],
    ids=lambda p: str(p)[:20],
)  # fmt: skip
def test_wrong_prompts(server: ApiServer, prompt: Any, named: str) -> None:
    error = refused(server.http.post(TEXT, json={"prompt": prompt}))
    assert named in error["message"]
    assert error["param"] == "prompt"


def test_a_missing_prompt(server: ApiServer) -> None:
    assert refused(server.http.post(TEXT, json={}))["message"] == "prompt is required"


def test_the_context_is_exact(server: ApiServer) -> None:
    def ask(length: int, max_tokens: int) -> httpx.Response:
        return server.http.post(TEXT, json={"prompt": [9] * length, "max_tokens": max_tokens})

    assert ask(8191, 1).status_code == 200
    assert "8192 tokens" in refused(ask(8192, 1))["message"]
    error = refused(ask(8000, 193))
    assert error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("8000", "193", "8192", "192"))


def test_a_text_far_too_long_is_refused_unread(server: ApiServer) -> None:
    error = refused(server.http.post(TEXT, json={"prompt": "a b" * 1_000_000}))
    assert "more than" in error["message"]


@pytest.mark.parametrize("model", ["gpt-9", "../..", "a\nb", "x" * 5000])
def test_an_unknown_model(server: ApiServer, model: str) -> None:
    for path, body in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "a"})):
        error = refused(server.http.post(path, json={**body, "model": model}), 404)
        assert (error["param"], error["type"]) == ("model", "NotFoundError")
        assert "served: tiny" in error["message"]


@pytest.mark.parametrize(
    ("values", "ok"),
    [({"enable_thinking": False, "level": "low"}, True), ({"messages": 1}, False),
     ({"a": {}}, False), ({"a b": 1}, False)],
)  # fmt: skip
def test_template_values(server: ApiServer, values: Any, ok: bool) -> None:
    body = {"messages": USER, "chat_template_kwargs": values, "max_tokens": 1}
    answer = server.http.post(CHAT, json=body)
    if ok:
        assert answer.status_code == 200
    else:
        assert refused(answer)["param"] == "chat_template_kwargs"


def test_routes_that_are_not_there(server: ApiServer) -> None:
    refused(server.http.get("/nowhere"), 404)
    refused(server.http.get("/docs"), 404)
    refused(server.http.get("/openapi.json"), 404)
    refused(server.http.get(CHAT), 405)
    refused(server.http.post("/v1/models/"), 404)
