"""The engine on the tiny model, token for token against transformers' greedy output."""

import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import zmq
from gpu import DEVICE, ENGINE
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo import wire
from octavo.config import EngineConfig
from octavo.engine.startup import Reporter, start
from octavo.params import SamplingParams

MODEL = Path(__file__).resolve().parents[2] / "e2e/tinymodel/model"
MAX_TOKENS = 48
QUESTIONS = (
    "What is 12 + 7?",
    "What is 85 + 14?",
    "Count from 5 to 30.",
    "Count from 90 to 110.",
    "Spell the word house.",
    "Spell the word orange.",
    "Who are you?",
    "Repeat after me: the river is long and the night is short.",
)

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the tiny model is not there")


@cache
def oracle():
    torch.set_num_threads(1)
    return AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32
    )


@cache
def prompts():
    tokenizer, _ = oracle()
    return {
        question: tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    }


@cache
def greedy(question):
    """transformers' tokens and why they end; without the end-of-sequence token."""
    _, model = oracle()
    prompt = torch.tensor([prompts()[question]])
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
        )[0, prompt.shape[1] :].tolist()
    stopped = output[-1] in model.generation_config.eos_token_id
    return (output[:-1], "stop") if stopped else (output, "length")


def request(question):
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    return wire.AddRequest(question, list(prompts()[question]), params)


def collect(outputs, results):
    for output in outputs:
        tokens, _ = results.setdefault(output.request_id, ([], None))
        results[output.request_id] = (tokens + output.token_ids, output.finish_reason)


# Block size, blocks, tokens a step, sequences, and whether the pool is so small that it preempts.
SETTINGS = [
    (16, 256, 512, 8, False),
    (1, 150, 64, 8, True),
    (16, 8, 64, 8, True),
    (128, 8, 512, 8, False),
    (16, 256, 5, 3, False),
    (7, 22, 11, 8, True),
]


@pytest.mark.parametrize(("block_size", "blocks", "budget", "seqs", "preempts"), SETTINGS)
def test_greedy_tokens_are_those_of_transformers(block_size, blocks, budget, seqs, preempts):
    config = EngineConfig(
        model=str(MODEL),
        **ENGINE,
        block_size=block_size,
        num_kv_blocks=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        max_model_len=128,
        num_threads=1,
    )
    loop, ready = start(config, Reporter(lambda _: None))
    assert (ready.device, ready.dtype) == (DEVICE, "float32")
    loop.scheduler.output_lengths.mean = 1  # admit by hope, so that the pool runs out
    for question in QUESTIONS:
        loop.add(request(question))
    results = {}
    while loop.has_work:
        collect(loop.step(), results)
    loop.scheduler.check_integrity()
    assert results == {question: greedy(question) for question in QUESTIONS}
    assert (loop.scheduler.counters.preemptions > 0) == preempts
    load = loop.load()
    assert load.blocks.free + load.blocks.cached == blocks


def test_the_real_process_serves_the_real_model(tmp_path):
    context = zmq.Context()
    requests, events = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    requests.bind(f"ipc://{tmp_path}/requests.sock")
    events.bind(f"ipc://{tmp_path}/events.sock")
    config = EngineConfig(model=str(MODEL), num_kv_blocks=64, num_threads=1, **ENGINE)
    words = ["--socket-dir", str(tmp_path), "--config-json", config.to_json()]
    process = subprocess.Popen([sys.executable, "-m", "octavo.engine", *words])
    try:
        results, ended, phases = {}, 0, []
        end = time.monotonic() + 60
        while ended < len(QUESTIONS):
            assert events.poll(max(0, int(1000 * (end - time.monotonic())))), "nothing came"
            message = wire.to_api_decoder.decode(events.recv())
            if isinstance(message, wire.Progress):
                phases.append(message.phase)
            elif isinstance(message, wire.Ready):
                for question in QUESTIONS:
                    requests.send(wire.encoder.encode(request(question)))
            elif isinstance(message, wire.Outputs):
                collect(message.outputs, results)
                ended += sum(o.finish_reason is not None for o in message.outputs)
        assert results == {question: greedy(question) for question in QUESTIONS}
        on_gpu = ["device"] if DEVICE == "cuda" else []
        wanted = ["import", "check", "weights", *on_gpu, "cache", "warmup"]
        assert list(dict.fromkeys(phases)) == wanted
        requests.send(wire.encoder.encode(wire.Stop()))
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        context.destroy(0)
