"""Log-probabilities, echo and the vLLM-named switches over a real socket, before a fake engine.

The fake engine repeats the prompt and gives token t the log-probability -t / 1000.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import MODEL, ApiServer, running

from octavo.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(MODEL)
USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running(tmp_path_factory.mktemp("api"), engine=["--step-ms", "1"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(server: ApiServer, prompt: Any, **body: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"prompt": prompt, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(server: ApiServer, path: str, **body: Any) -> list[dict[str, Any]]:
    choices = []
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choices += json.loads(line[6:])["choices"]
    return choices


def text_of(token_id: int) -> str:
    return TOKENIZER.token_bytes(token_id).decode()


IDS = TOKENIZER.encode("the answer is")


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_a_completion_has_four_parallel_lists(server: ApiServer, count: int) -> None:
    choice = complete(server, IDS[1:], max_tokens=3, logprobs=count)
    ids = IDS[1:4]
    found = choice["logprobs"]
    assert found["tokens"] == [text_of(i) for i in ids]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"] == pytest.approx([-i / 1000 for i in ids])
    assert found["text_offset"] == [sum(len(text_of(i)) for i in ids[:n]) for n in range(3)]
    for top, own in zip(found["top_logprobs"], found["token_logprobs"], strict=True):
        assert len(top) in (max(1, count), max(1, count) + 1)
        assert max(top.values()) == own


def test_without_the_question_there_is_no_answer(server: ApiServer) -> None:
    choice = complete(server, "a b", max_tokens=2)
    assert choice["logprobs"] is None
    assert "prompt_logprobs" not in choice


def test_a_chat_has_entries_with_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, logprobs=True, top_logprobs=2
    ).choices[0]
    content = answer.logprobs.content
    # The template's control tokens have names here, and no text in the answer.
    assert [e.token for e in content[:2]] == ["<|begin_of_text|>", "<|im_start|>"]
    assert "".join(e.token for e in content[2:]) == answer.message.content
    assert bytes(b for e in content[2:] for b in e.bytes).decode() == answer.message.content
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob


def test_top_logprobs_0_gives_empty_lists(client: openai.OpenAI) -> None:
    for more in ({}, {"top_logprobs": 0}):
        answer = client.chat.completions.create(
            model="tiny", messages=USER, logprobs=True, max_tokens=2, **more
        ).choices[0]
        assert [e.top_logprobs for e in answer.logprobs.content] == [[], []]


def test_a_stream_brings_the_same_logprobs(server: ApiServer) -> None:
    body = {"prompt": "grüße 日本 x", "max_tokens": 12, "logprobs": 2}
    whole = complete(server, body["prompt"], max_tokens=12, logprobs=2)
    pieces = streamed(server, "/v1/completions", **body)
    assert "".join(p["text"] for p in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [v for p in pieces if p["logprobs"] for v in p["logprobs"][name]] == values
    chat = {"messages": USER, "logprobs": True, "top_logprobs": 1}
    answer = server.http.post("/v1/chat/completions", json=chat).json()["choices"][0]
    pieces = streamed(server, "/v1/chat/completions", **chat)
    content = [e for p in pieces if p["logprobs"] for e in p["logprobs"]["content"]]
    assert content == answer["logprobs"]["content"]


def test_a_part_of_a_character_is_shown_as_bytes(server: ApiServer) -> None:
    ids = [i for i in TOKENIZER.encode("日") if i not in TOKENIZER.control_ids]
    assert len(ids) == 3, "the tiny model spells it byte by byte"
    choice = complete(server, ids, max_tokens=3, logprobs=1)
    assert choice["text"] == "日"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_puts_the_prompt_and_its_logprobs_first(
    server: ApiServer, max_tokens: int, stream: bool
) -> None:
    prompt = "the answer is"
    body = {"prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    if stream:
        pieces = streamed(server, "/v1/completions", **body)
        text = "".join(p["text"] for p in pieces)
        found = {
            name: [v for p in pieces if p["logprobs"] for v in p["logprobs"][name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        reason = pieces[-1]["finish_reason"]
    else:
        choice = complete(server, **body)
        text, found, reason = choice["text"], choice["logprobs"], choice["finish_reason"]
    ids = (IDS + IDS)[: len(IDS) + max_tokens]
    assert text == TOKENIZER.decode(ids)
    assert text.startswith(prompt)
    assert reason == "length"
    assert found["tokens"] == [text_of(i) for i in ids]
    assert found["token_logprobs"] == [None, *(pytest.approx(-i / 1000) for i in ids[1:])]
    assert found["top_logprobs"][0] is None
    assert found["text_offset"][:3] == [0, 0, len(text_of(IDS[1]))]
    assert found["text_offset"][len(IDS) : len(IDS) + 1] == [len(prompt)] * bool(max_tokens)


def test_echo_alone_costs_no_output(server: ApiServer) -> None:
    body = {"prompt": "a b c", "max_tokens": 0, "echo": True}
    answer = server.http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "a b c"
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_by_id_with_rank_and_text(server: ApiServer) -> None:
    choice = complete(server, IDS, max_tokens=1, prompt_logprobs=2)
    found = choice["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(IDS)
    for token, entries in zip(IDS[1:], found[1:], strict=True):
        assert len(entries) == 2
        own = entries[str(token)]
        assert own["rank"] == 1
        assert own["logprob"] == pytest.approx(-token / 1000)
        assert own["decoded_token"] == text_of(token)
    one = complete(server, [7], max_tokens=1, prompt_logprobs=0)
    assert one["prompt_logprobs"] == [None]


def test_prompt_logprobs_of_a_chat_stand_beside_the_choices(server: ApiServer) -> None:
    body = {"messages": USER, "max_tokens": 1, "prompt_logprobs": 1}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_a_stop_string_is_kept_when_asked(server: ApiServer) -> None:
    body = {"max_tokens": 20, "stop": ["c d"]}
    assert complete(server, "a b c d e", **body)["text"] == "a b "
    kept = complete(server, "a b c d e", include_stop_str_in_output=True, **body)
    assert (kept["text"], kept["stop_reason"]) == ("a b c d", "c d")


def test_a_stop_token_is_kept_when_asked(server: ApiServer) -> None:
    ids = TOKENIZER.encode("a b c")
    body = {"stop_token_ids": [ids[-1]], "max_tokens": 20}
    assert complete(server, ids, **body)["text"] == "a b"
    assert complete(server, ids, include_stop_str_in_output=True, **body)["text"] == "a b c"


def test_control_tokens_are_shown_when_asked(server: ApiServer) -> None:
    ids = [2, *TOKENIZER.encode("a")[1:]]
    assert complete(server, ids, max_tokens=2)["text"] == "a"
    shown = complete(server, ids, max_tokens=2, skip_special_tokens=False)
    assert shown["text"] == "<|im_start|>a"
