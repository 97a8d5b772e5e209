"""The whole server, nothing fake: the tiny model on the CPU, against transformers' greedy text."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from api_server import MODEL, ApiServer, eventually, running
from gpu import DEVICE
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT = "/v1/chat/completions"
QUESTIONS = ["What is 12 + 7?", "Count from 5 to 30.", "Spell the word house.", "Who are you?"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    flags = ("--device", DEVICE, "--dtype", "float32", "--num-kv-blocks", "256",
             "--num-threads", "1")  # fmt: skip
    with running(tmp_path_factory.mktemp("real"), *flags, engine=None, ready=False) as server:
        server.until_ready(90)
        yield server


@cache
def oracle() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(MODEL), model


def greedy(messages: list[dict[str, str]], max_tokens: int) -> tuple[str, int]:
    """transformers' answer and the number of its tokens."""
    tokenizer, model = oracle()
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_tokens,
        )[0, prompt.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), len(output)


def ask(server: ApiServer, question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 120, **more}
    answer = server.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("width", [2, 4])
def test_a_beam_search_answers_with_transformers_hypotheses(server: ApiServer, width: int) -> None:
    tokenizer, model = oracle()
    prompt = tokenizer("What is 12 + 7?", return_tensors="pt").input_ids
    with torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=width,
            num_return_sequences=2,
            max_new_tokens=24,
            length_penalty=0.8,
            early_stopping=True,
        )[:, prompt.shape[1] :]
    body = {
        "prompt": prompt[0].tolist(),
        "use_beam_search": True,
        "best_of": width,
        "n": 2,
        "max_tokens": 24,
        "length_penalty": 0.8,
        "early_stopping": True,
    }
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == [tokenizer.decode(row, skip_special_tokens=True) for row in found]
    # Streamed, a hypothesis comes whole.
    streamed = {0: "", 1: ""}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as got:
        for line in got.iter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                streamed[choice["index"]] += choice["text"]
    assert [streamed[0], streamed[1]] == texts


def test_best_of_answers_with_the_most_probable_samples(server: ApiServer) -> None:
    body = {"prompt": "Count from", "temperature": 1.5, "seed": 1, "max_tokens": 12}
    body["ignore_eos"] = True  # whose log-probability is not told
    every = server.http.post("/v1/completions", json={**body, "n": 5, "logprobs": 0}).json()
    score = [(sum(c["logprobs"]["token_logprobs"]), c["text"]) for c in every["choices"]]
    assert len(set(score)) > 2
    best = server.http.post("/v1/completions", json={**body, "n": 2, "best_of": 5}).json()
    expected = [text for _, text in sorted(score, reverse=True)[:2]]
    assert [c["text"] for c in best["choices"]] == expected
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert all(c["logprobs"] is None for c in best["choices"])
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]


def stream_text(server: ApiServer, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 120, "stream": True}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        chunks = client.chat.completions.create(model="tiny", **body)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_sum_is_right(server: ApiServer) -> None:
    answer = ask(server, "What is 12 + 7?")["choices"][0]
    assert re.findall(r"\d+", answer["message"]["content"])[-1] == "19"
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_transformers_greedy_answer(server: ApiServer, question: str) -> None:
    text, count = greedy([{"role": "user", "content": question}], 120)
    answer = ask(server, question)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["completion_tokens"] == count
    assert stream_text(server, question) == text


def test_answers_do_not_depend_on_company(server: ApiServer) -> None:
    alone = [ask(server, q)["choices"][0]["message"]["content"] for q in QUESTIONS]
    together: dict[str, str] = {}

    def one(question: str) -> None:
        together[question] = ask(server, question)["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(q,)) for q in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[q] for q in QUESTIONS] == alone


def test_a_stop_string_frees_the_blocks(server: ApiServer) -> None:
    answer = ask(server, "Count from 5 to 30.", stop=" 9")["choices"][0]
    assert answer["message"]["content"].endswith("8,")
    assert answer["stop_reason"] == " 9"

    def idle() -> bool:
        load = server.load()
        return load["running"] == 0 and load["blocks"]["active"] == 0

    eventually(idle, what="blocks free")


def test_a_broken_model_is_told_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[:100_000])
    flags = ("--device", DEVICE)
    with running(tmp_path, *flags, engine=None, model=folder, ready=False) as server:
        eventually(lambda: server.load()["state"] == "Failed", 60, "Failed")
        failure = server.load()["failure"]
        assert failure["retryable"] is False
        assert "model.safetensors" in failure["message"]


def test_seeded_samples_come_again_and_differ_from_each_other(server: ApiServer) -> None:
    body = {"prompt": "the river is", "n": 3, "seed": 5, "max_tokens": 12, "logprobs": 2}
    first, second = (server.http.post("/v1/completions", json=body).json() for _ in range(2))
    texts = [c["text"] for c in first["choices"]]
    assert len(set(texts)) == 3
    assert first["choices"] == second["choices"]
    for choice in first["choices"]:
        found = choice["logprobs"]
        assert "".join(found["tokens"]) == choice["text"]
        tops = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
        assert all(own <= max(top.values()) <= 0 for own, top in tops)


def test_samples_that_cannot_run_together_are_refused_and_cost_nothing(server: ApiServer) -> None:
    total = server.load()["blocks"]["total"]  # whatever of the test before is still to be told
    body = {"prompt": "a b c", "n": 8, "max_tokens": 1900}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert "8 samples" in answer.json()["error"]["message"]
    nothing = {"prompt": "a", "allowed_token_ids": [5], "logit_bias": {"5": -100}, "max_tokens": 1}
    assert server.http.post("/v1/completions", json=nothing).status_code == 200
    answer = server.http.post("/v1/completions", json={**body, "max_tokens": 4})
    assert len(answer.json()["choices"]) == 8

    def idle() -> bool:
        blocks = server.load()["blocks"]
        return blocks["active"] == 0 and blocks["free"] + blocks["cached"] == total

    eventually(idle, what="all blocks back")


def test_without_max_tokens_samples_get_what_fits(server: ApiServer) -> None:
    choices = ask(server, "Who are you?", n=4, max_tokens=None)["choices"]
    assert [c["message"]["content"] for c in choices] == [choices[0]["message"]["content"]] * 4
    assert {c["finish_reason"] for c in choices} == {"stop"}


def test_the_engine_does_not_outlive_the_api(server: ApiServer) -> None:
    """The last test of this file: it kills the server."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    (engine,) = [int(pid) for pid in children.read_text().split()]
    os.kill(server.process.pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{engine}/cmdline").exists(), 5, "engine gone")
