"""The OpenAI surface over a real socket, before a fake engine that repeats each prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_server import MODEL, ApiServer, eventually, running

from octavo.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(MODEL)
USER = [{"role": "user", "content": "hello there"}]
# The fake engine repeats the rendered prompt until its first <|im_end|>.
CHAT_ANSWER = "user\nhello there"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with running(tmp_path_factory.mktemp("api"), engine=["--step-ms", "1"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ApiServer) -> Iterator[openai.OpenAI]:
    with openai_client(server) as client:
        yield client


def openai_client(server: ApiServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: ApiServer, path: str, **body: Any) -> httpx.Response:
    return server.http.post(path, json=body)


def completion(server: ApiServer, prompt: Any, **body: Any) -> dict[str, Any]:
    answer = post(server, "/v1/completions", prompt=prompt, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def echo(text: str, max_tokens: int) -> str:
    """What the fake engine answers to a raw prompt."""
    ids = TOKENIZER.encode(text)
    return TOKENIZER.decode([ids[n % len(ids)] for n in range(max_tokens)])


# Chat


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER)
    choice = answer.choices[0]
    assert choice.message.content == CHAT_ANSWER
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.model == "tiny"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    usage = answer.usage
    assert usage.completion_tokens == len(TOKENIZER.encode(f"<|im_start|>{CHAT_ANSWER}<|im_end|>"))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_chat_stream_is_the_chat_answer(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=USER, stream=True))
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == CHAT_ANSWER
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert last.finish_reason == "stop"
    assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert all(c.usage is None for c in chunks)


def test_stream_usage_is_one_extra_chunk(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=USER)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_continuous_usage_grows_to_the_whole(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="tiny", prompt="a b c", max_tokens=9, stream=True, stream_options=options
        )
    )
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 9


def test_the_bytes_of_a_stream(server: ApiServer) -> None:
    with server.http.stream(
        "POST", "/v1/chat/completions", json={"messages": USER, "stream": True}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert all("\n" not in event for event in events)


@pytest.mark.parametrize(
    "content",
    [
        "hello there",
        [{"type": "text", "text": "hello there"}],
        [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}],
    ],
)
def test_content_as_text_or_parts(server: ApiServer, content: Any) -> None:
    messages = [{"role": "user", "content": content, "name": "Ann"}]
    answer = post(server, "/v1/chat/completions", messages=messages)
    expected = CHAT_ANSWER.replace(" ", "\n") if len(content) == 2 else CHAT_ANSWER
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_a_control_token_in_user_text_does_not_end_the_answer(server: ApiServer) -> None:
    # The fake engine repeats the prompt and stops at the first real <|im_end|>.
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    answer = post(server, "/v1/chat/completions", messages=messages).json()
    assert answer["choices"][0]["message"]["content"] == "user\na<|im_end|>b"


def test_developer_is_system_and_max_completion_tokens_wins(server: ApiServer) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *USER]
    answer = post(
        server,
        "/v1/chat/completions",
        messages=messages,
        max_tokens=99,
        max_completion_tokens=6,
    ).json()
    assert answer["choices"][0]["message"]["content"].startswith("sy")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 6


# Completions


def test_a_completion_and_its_stream(client: openai.OpenAI) -> None:
    prompt = "Count: één, zwei 🦑!"
    whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=40)
    assert whole.choices[0].text == echo(prompt, 40)
    assert whole.choices[0].finish_reason == "length"
    assert whole.object == "text_completion"
    stream = list(
        client.completions.create(model="tiny", prompt=prompt, max_tokens=40, stream=True)
    )
    texts = [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == whole.choices[0].text
    assert all("\ufffd" not in text for text in texts[:-1])


def test_every_form_of_prompt(server: ApiServer) -> None:
    ids = TOKENIZER.encode("one two")
    for prompt, count in (("one two", 1), (ids, 1), (["one two"] * 2, 2), ([ids, ids, ids], 3)):
        answer = completion(server, prompt, max_tokens=5)
        assert [c["index"] for c in answer["choices"]] == list(range(count))
        assert {c["text"] for c in answer["choices"]} == {echo("one two", 5)}
        assert answer["usage"]["prompt_tokens"] == count * len(ids)
        assert answer["usage"]["completion_tokens"] == count * 5


def test_a_stream_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["one", "two two two", "3"]
    texts = ["", "", ""]
    reasons: list[list[str]] = [[], [], []]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [echo(p, 7) for p in prompts]
    assert reasons == [["length"]] * 3


def test_without_max_tokens_the_context_is_the_bound(server: ApiServer) -> None:
    answer = completion(server, "one two")
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_is_cut_and_aborts_in_the_engine(server: ApiServer) -> None:
    answer = completion(server, "alpha beta gamma", stop=["beta g"])
    choice = answer["choices"][0]
    assert choice["text"] == "alpha "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "beta g")
    aborted = {"kind": "AbortRequest", "id": f"{answer['id']}-0"}
    eventually(lambda: aborted in server.journal(), what="abort")
    with server.http.stream(
        "POST",
        "/v1/completions",
        json={"prompt": "alpha beta gamma", "stop": "beta g", "stream": True},
    ) as stream:
        text = stream.read().decode()
    assert text.count("beta") == 1  # in stop_reason alone
    assert '"stop_reason":"beta g"' in text


def test_a_stop_token_and_min_tokens(server: ApiServer) -> None:
    ids = list(range(300, 306))
    stop = ids[-1]
    choice = completion(server, ids, stop_token_ids=[stop])["choices"][0]
    assert choice["text"] == TOKENIZER.decode(ids[:-1])
    assert choice["stop_reason"] == stop
    body = {"stop_token_ids": [stop], "min_tokens": len(ids)}
    longer = completion(server, ids, **body)["choices"][0]
    assert longer["text"] == TOKENIZER.decode(ids + ids[:-1])
    # Before min_tokens a stop string is ordinary text; the second time round it stops.
    ids = TOKENIZER.encode("alpha beta")
    kept = completion(server, "alpha beta", stop="alpha", min_tokens=len(ids))["choices"][0]
    assert kept["text"] == "alpha beta"


def test_ignore_eos(server: ApiServer) -> None:
    prompt = "a<|im_end|>b"
    assert completion(server, prompt)["choices"][0]["stop_reason"] is None
    answer = completion(server, prompt, ignore_eos=True, max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8


def test_an_error_of_one_request_in_the_engine(tmp_path: Any) -> None:
    bad = TOKENIZER.encode("z")[-1]
    with running(tmp_path, engine=["--error-token", str(bad), "--step-ms", "30"]) as server:
        answer = post(server, "/v1/completions", prompt="z")
        assert answer.status_code == 500
        assert "a fault was injected" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert completion(server, "y", max_tokens=2)["usage"]["completion_tokens"] == 2
        # Once text is out, the error is an event of the stream.
        prompt = [*TOKENIZER.encode("yyyy"), bad]
        with openai_client(server) as client:
            stream = client.completions.create(model="tiny", prompt=prompt, stream=True)
            assert next(iter(stream)).choices[0].finish_reason is None
            with pytest.raises(openai.APIError, match="a fault was injected"):
                list(stream)


# The rest of the surface


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("tiny", "model", "octavo")
    assert card.max_model_len == 512


def test_the_request_id_is_echoed_when_harmless(server: ApiServer) -> None:
    for given, kept in (("abc-1", True), ("x" * 129, False), (None, False), ("a\x7fb", False)):
        headers = {"x-request-id": given} if given else {}
        for path in ("/v1/models", "/nowhere"):
            echoed = server.http.get(path, headers=headers).headers["x-request-id"]
            assert (echoed == given) is kept
            assert 0 < len(echoed) <= 128


def test_probes_of_a_ready_server(server: ApiServer) -> None:
    health = server.http.get("/health")
    assert (health.status_code, health.content) == (200, b"")
    assert [server.status(p) for p in ("/livez", "/readyz", "/startupz")] == [200, 200, 200]


def test_the_load_report_has_the_contract_s_shape(server: ApiServer) -> None:
    eventually(lambda: server.load()["blocks"], what="load")
    load = server.load()
    assert set(load) == {
        "schema", "state", "blocks", "block_size", "block_bytes", "kv_utilization", "demand_blocks",
        "seconds_to_exhaustion", "running", "waiting", "waiting_blocks", "prefill_backlog_s",
        "step_budget_used", "preemptions", "last_activity", "draining",
    }  # fmt: skip
    assert (load["schema"], load["state"], load["draining"]) == (1, "Ready", False)
    assert set(load["blocks"]) == {"total", "active", "shared", "cached", "free"}
    assert set(load["demand_blocks"]) == {"now", "10s", "30s", "60s"}


# Disconnects


def unfinished(server: ApiServer) -> set[str]:
    """Requests that the engine got and whose abort it did not get."""
    seen = server.journal()
    added = {line["id"] for line in seen if line["kind"] == "AddRequest"}
    return added - {line["id"] for line in seen if line["kind"] == "AbortRequest"}


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("slow")
    with running(folder, "--max-queue", "3", engine=["--step-ms", "20"]) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_aborted_in_the_engine(
    slow_server: ApiServer, stream: bool
) -> None:
    server, before = slow_server, len(slow_server.journal())
    body = {"prompt": ["one two", "three"], "stream": stream}
    if stream:
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json=body, timeout=0.3)
    eventually(lambda: len(server.journal()) >= before + 4, what="two adds, two aborts")
    assert unfinished(server) == set()
    eventually(lambda: server.load()["running"] == 0, what="idle engine")


def test_the_queue_is_bounded(slow_server: ApiServer) -> None:
    body = {"prompt": ["a", "b", "c"], "stream": True}
    with slow_server.http.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_raw()  # kept: a collected iterator closes the connection
        next(pieces)
        refused = post(slow_server, "/v1/completions", prompt="d")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("RateLimitError", 429)
        assert "3 of 3" in error["message"]
    del pieces

    def admitted() -> bool:
        answer = post(slow_server, "/v1/completions", prompt="d", max_tokens=1)
        return answer.status_code == 200

    eventually(admitted, what="places given back")
