"""Sampling on the tiny model: what a request gets does not depend on how the engine ran it."""

from functools import cache
from pathlib import Path

import pytest
import torch
from gpu import ENGINE
from transformers import AutoModelForCausalLM

from octavo import wire
from octavo.config import EngineConfig
from octavo.engine.startup import Reporter, start
from octavo.params import SamplingParams
from octavo.text.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "e2e/tinymodel/model"
TOKENIZER = Tokenizer.load(MODEL)
TEXTS = (
    "Count from 5 to 30.", "Spell the word house.", "What is 12 + 7? What is 85 + 14?",
    "the river is long and the night is short", "Who are you?", "a b c d e f g",
)  # fmt: skip
KINDS = (
    {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.2},
    {"temperature": 0.8, "top_k": 30, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"temperature": 1.5, "min_p": 0.02, "logit_bias": {5: 2.0}, "bad_words_ids": ((7,), (9, 10))},
    {"temperature": 1.0, "typical_p": 0.9, "min_tokens": 20},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 2.0, "allowed_token_ids": tuple(range(100, 400))},
)
# Block size, blocks, tokens a step, sequences, and whether the pool is so small that it preempts.
SETTINGS = [(16, 256, 512, 8, False), (4, 30, 64, 8, True), (1, 100, 7, 6, True),
            (128, 8, 3, 2, False)]  # fmt: skip


def requests(seeded: bool) -> list[wire.AddRequest]:
    return [
        wire.AddRequest(
            str(i),
            TOKENIZER.encode(text),
            SamplingParams(
                max_tokens=24, ignore_eos=True, logprobs=3, prompt_logprobs=2,
                seed=i if seeded else None, **KINDS[i],
            ),
        )
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip


def engine(block_size=16, blocks=256, budget=512, seqs=8):
    config = EngineConfig(
        model=str(MODEL), block_size=block_size, num_kv_blocks=blocks,
        max_num_batched_tokens=budget, max_num_seqs=seqs, max_model_len=96, num_threads=1,
        **ENGINE,
    )  # fmt: skip
    loop, _ = start(config, Reporter(lambda _: None))
    loop.scheduler.output_lengths.mean = 1  # admit by hope, so that a small pool runs out
    return loop


def generate(loop, added):
    """By request: tokens, their log-probabilities, the prompt's."""
    for request in added:
        loop.add(request)
    results = {request.request_id: ([], [], []) for request in added}
    while loop.has_work:
        for output in loop.step():
            assert output.error is None
            tokens, logprobs, of_prompt = results[output.request_id]
            tokens += output.token_ids
            logprobs += output.logprobs or []
            of_prompt += output.prompt_logprobs or []
    loop.scheduler.check_integrity()
    assert loop.load().blocks.active == 0
    return results


@cache
def expected():
    return generate(engine(), requests(seeded=False))


def close(ours, theirs):
    assert [f.token_id for f in ours] == [f.token_id for f in theirs]
    assert [f.top_ids for f in ours] == [f.top_ids for f in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert mine.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


@pytest.mark.parametrize(("block_size", "blocks", "budget", "seqs", "preempts"), SETTINGS)
def test_neither_blocks_nor_chunks_nor_preemption_matter(
    block_size, blocks, budget, seqs, preempts
):
    loop = engine(block_size, blocks, budget, seqs)
    results = generate(loop, requests(seeded=False))
    assert (loop.scheduler.counters.preemptions > 0) == preempts
    for name, (tokens, logprobs, of_prompt) in results.items():
        assert tokens == expected()[name][0]
        close(logprobs, expected()[name][1])
        close(of_prompt, expected()[name][2])


def test_with_a_seed_a_request_gets_the_same_alone():
    loop = engine()
    together = generate(loop, requests(seeded=True))
    for request in reversed(requests(seeded=True)):
        alone = generate(loop, [request])[request.request_id]
        assert alone[0] == together[request.request_id][0]
        close(alone[1], together[request.request_id][1])


def test_what_was_asked_for_holds():
    tokens = [expected()[str(i)][0] for i in range(len(KINDS))]
    assert 7 not in tokens[2]
    assert (9, 10) not in zip(tokens[2], tokens[2][1:], strict=False)
    assert all(100 <= t < 400 for t in tokens[5])
    assert all(len(t) == 24 for t in tokens)


def test_logprobs_are_those_of_transformers():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for request in requests(seeded=False):
        prompt = request.prompt_token_ids
        tokens, logprobs, of_prompt = expected()[request.request_id]
        ids = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            table = torch.log_softmax(model(ids).logits[0], -1)
        found = of_prompt + logprobs
        assert len(found) == ids.shape[1] - 1
        for position, entry in enumerate(found):
            row = table[position]
            assert entry.token_id == int(ids[0, position + 1])
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
            top = row.topk(len(entry.top_ids))
            assert entry.top_ids == top.indices.tolist()
            assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-3)


def test_a_request_that_forbids_everything_ends_alone():
    loop = engine()
    nothing = SamplingParams(allowed_token_ids=(5,), bad_words_ids=((5,),), temperature=0)
    loop.add(wire.AddRequest("x", TOKENIZER.encode("hello"), nothing))
    loop.add(requests(seeded=True)[0])
    ended = {}
    while loop.has_work:
        ended |= {o.request_id: o for o in loop.step() if o.finish_reason}
    assert ended["x"].finish_reason == "error"
    assert "allow no token" in ended["x"].error
    assert ended["0"].finish_reason == "length"
    assert loop.load().blocks.active == 0
