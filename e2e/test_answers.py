"""The text of answers, many at once; and bad requests beside a stream that they may not disturb."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from deployments import Bench, manifest
from load import Load, stream_answer
from tinymodel import tasks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

FAMILIES: dict[str, list[tasks.Task]] = {
    "sum": [
        tasks.sum_task(17, 25),
        tasks.sum_task(46, 38, wording=1),
        tasks.sum_task(120, 305, wording=4),
        tasks.sum_task(8, 91, wording=6),
    ],
    "count": [tasks.count_task(a, a + 20, wording=a) for a in (1, 37, 140, 410)],
    "count_long": [tasks.count_task(200, 330), tasks.count_task(1, 180, wording=2)],
    "spell": [tasks.spell_task(word, n) for n, word in enumerate(("river", "garden", "stone"))],
    "repeat": [
        tasks.repeat_task("the green river", 0),
        tasks.repeat_task("seven small stones", 2),
    ],
    "facts": [
        tasks.fact_task({"name": "Anna"}, "name"),
        tasks.fact_task({"city": "Lisbon", "pet": "cat"}, "pet", wording=1),
        tasks.fact_task({"colour": "green"}, "colour", between=tasks.sum_task(2, 3)),
    ],
}


@pytest.fixture(scope="module")
def tiny(bench: Bench) -> str:
    return bench.serve(manifest("answers", replicas=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_right(bench: Bench, tiny: str, family: str) -> None:
    """Each question twice from each of several clients at once: streamed and not."""
    questions = FAMILIES[family]
    clients = 4
    load = Load(bench.url(tiny), tiny, questions, clients=clients)
    load.max_requests = 2 * max(len(questions), clients)
    tally = load.start().wait()
    assert (tally.right, tally.examples) == (tally.sent, [])
    assert tally.sent >= 2 * len(questions)


def test_the_openai_client_can_talk_to_it(bench: Bench, tiny: str) -> None:
    """The reference client accepts every answer, and the accounting in it adds up."""
    task = tasks.sum_task(17, 25)
    with openai.DefaultHttpxClient(trust_env=False) as http:
        client = openai.OpenAI(base_url=f"{bench.url(tiny)}/v1", api_key="none", http_client=http)
        assert [model.id for model in client.models.list()] == [tiny]
        messages: Any = task.messages
        chat = client.chat.completions.create(model=tiny, messages=messages, temperature=0)
        assert tasks.check(task, chat.choices[0].message.content or "")
        assert chat.choices[0].finish_reason == "stop"
        assert chat.usage is not None
        assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def bad_requests(model: str) -> dict[str, tuple[bytes, int, str]]:
    """Name → body, status, a word that the message must hold."""

    def chat(**changes: Any) -> bytes:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **changes}
        return json.dumps(body).encode()

    return {
        "malformed JSON": (b'{"model": "answers", "messages": [', 400, "JSON"),
        "not an object": (b"[1, 2]", 400, ""),
        "unknown model": (chat(model="no-such-model"), 404, "no-such-model"),
        "too long a prompt": (
            chat(messages=[{"role": "user", "content": "river " * 20_000}]),
            400,
            "token",
        ),
        "negative max_tokens": (chat(max_tokens=-1), 400, "max_tokens"),
        "temperature of the wrong type": (chat(temperature="hot"), 400, "temperature"),
        "no messages": (chat(messages=[]), 400, "messages"),
        "unknown role": (chat(messages=[{"role": "judge", "content": "x"}]), 400, "role"),
    }


def test_bad_requests_cost_one_error_and_disturb_nobody(bench: Bench, tiny: str) -> None:
    """While a long answer streams: each bad request gets its error, the stream its right text."""
    task = tasks.count_task(300, 460)
    parts: list[str] = []
    streaming = threading.Event()

    def stream() -> None:
        for part in stream_answer(bench.url(tiny), tiny, task):
            parts.append(part)
            streaming.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream)
        assert streaming.wait(30)
        met = 0
        for name, (content, status, word) in bad_requests(tiny).items():
            met += not running.done()
            answer = bench.post(tiny, content)
            assert answer.status_code == status, f"{name}: {answer.status_code} {answer.text}"
            error = answer.json()["error"]
            assert {"message", "type", "code", "param"} <= set(error), name
            assert word.lower() in error["message"].lower(), f"{name}: {error['message']}"
        running.result(60)
    assert met, "the stream had ended before the first bad request"
    assert tasks.check(task, "".join(parts))
    assert not sum(
        status["restartCount"]
        for pod in bench.pods(tiny)
        for status in pod["status"]["containerStatuses"]
    )
