"""Several samples of one request over a real socket; the fake's sample s starts at token s."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import MODEL, ApiServer, eventually, running

from octavo.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(MODEL)
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running(tmp_path_factory.mktemp("api"), engine=["--step-ms", "1"]) as server:
        yield server


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)[1:]


def sample(ids: list[int], number: int, count: int) -> str:
    return TOKENIZER.decode([ids[(number + n) % len(ids)] for n in range(count)])


def test_samples_are_numbered_prompt_by_prompt(server: ApiServer) -> None:
    first, second = ids_of("a b c d"), ids_of("one two three four")
    body = {"prompt": [first, second], "n": 3, "max_tokens": 4}
    answer = server.http.post(TEXT, json=body).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    expected = [sample(ids, s, 4) for ids in (first, second) for s in range(3)]
    assert [c["text"] for c in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == len(first) + len(second)
    assert answer["usage"]["completion_tokens"] == 24


def test_a_chat_stream_interleaves_samples_by_index(server: ApiServer) -> None:
    body = {"messages": [{"role": "user", "content": "hi there"}], "n": 2, "max_tokens": 6}
    whole = server.http.post("/v1/chat/completions", json=body).json()
    texts, ends, roles = ["", ""], [0, 0], [0, 0]
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as got:
        for line in got.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                roles[choice["index"]] += "role" in choice["delta"]
                ends[choice["index"]] += choice["finish_reason"] is not None
    assert texts == [c["message"]["content"] for c in whole["choices"]]
    assert texts[0] != texts[1]
    assert ends == roles == [1, 1]


def test_a_stop_string_ends_one_sample_alone(server: ApiServer) -> None:
    ids = ids_of("a b c d e f g h")
    body = {"prompt": [ids], "n": 2, "max_tokens": 6, "stop": ["f"]}
    choices = server.http.post(TEXT, json=body).json()["choices"]
    # Sample 0 reaches f with its 6th token, sample 1 with its 5th.
    assert [c["finish_reason"] for c in choices] == ["stop", "stop"]
    choices = server.http.post(TEXT, json={**body, "max_tokens": 5}).json()["choices"]
    assert [c["finish_reason"] for c in choices] == ["length", "stop"]
    eventually(lambda: server.load()["running"] == 0, what="idle engine")


def test_a_client_that_leaves_frees_all_samples(server: ApiServer) -> None:
    body: dict[str, Any] = {"prompt": "a b", "n": 4, "max_tokens": 400, "stream": True}
    with server.http.stream("POST", TEXT, json=body) as answer:
        next(answer.iter_lines())
    eventually(lambda: server.load()["running"] == 0, what="idle engine")
    aborted = [m for m in server.journal() if m["kind"] == "AbortRequest"]
    assert len(aborted) >= 4


def test_echo_and_logprobs_come_with_each_sample(server: ApiServer) -> None:
    ids = ids_of("a b c")
    body = {"prompt": [ids], "n": 2, "max_tokens": 2, "echo": True, "logprobs": 1}
    choices = server.http.post(TEXT, json=body).json()["choices"]
    for number, choice in enumerate(choices):
        assert choice["text"] == TOKENIZER.decode(ids) + sample(ids, number, 2)
        known = [None if v is None else v < 0 for v in choice["logprobs"]["token_logprobs"]]
        assert known == [None, *[True] * (len(ids) + 1)]
