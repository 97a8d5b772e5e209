"""Beams and parallel samples on the tiny model: beams token for token those of transformers."""

from functools import cache
from pathlib import Path

import pytest
import torch
from gpu import ENGINE
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo import wire
from octavo.config import EngineConfig
from octavo.engine.startup import Reporter, start
from octavo.params import SamplingParams

MODEL = Path(__file__).resolve().parents[2] / "e2e/tinymodel/model"
QUESTIONS = ("Spell the word house.", "Count from 5 to 12.", "Tell me about rivers and towns.")

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the tiny model is not there")


@cache
def oracle():
    torch.set_num_threads(1)
    return AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32
    )


@cache
def prompt(question):
    tokenizer, _ = oracle()
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


def beams_of_transformers(question, width, count, max_tokens, **settings):
    _, model = oracle()
    ids = torch.tensor([prompt(question)])
    with torch.inference_mode():
        outputs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=count,
            max_new_tokens=max_tokens,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    found = []
    for row in outputs.sequences[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        found.append(row[:end])
    return found, outputs.sequences_scores.tolist()


def make(**settings):
    defaults = {"block_size": 4, "num_kv_blocks": 400, "max_num_seqs": 16, "max_model_len": 128}
    config = EngineConfig(model=str(MODEL), num_threads=1, **(ENGINE | defaults | settings))
    return start(config, Reporter(lambda _: None))[0]


def finish(loop):
    results = {}
    while loop.has_work:
        for output in loop.step():
            assert output.error is None
            tokens, scores = results.setdefault(output.request_id, ({}, {}))
            tokens.setdefault(output.index, []).extend(output.token_ids)
            scores[output.index] = output.score
    loop.scheduler.check_integrity()
    return results


SEARCHES = [
    (width, penalty, early)
    for width in (2, 4, 6)
    for penalty, early in ((1.0, False), (0.0, "never"), (2.0, "never"), (1.0, True), (-0.5, False))
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_beams_are_those_of_transformers(question):
    loop = make()
    expected = {}
    for i, (width, penalty, early) in enumerate(SEARCHES):
        settings = {"length_penalty": penalty, "early_stopping": early}
        asked = SamplingParams(
            use_beam_search=True, temperature=0, n=2, best_of=width, max_tokens=24, **settings
        )
        loop.add(wire.AddRequest(str(i), list(prompt(question)), asked))
        expected[str(i)] = beams_of_transformers(question, width, 2, 24, **settings)
    results = finish(loop)
    for name, (sequences, scores) in expected.items():
        tokens, found = results[name]
        assert [tokens[i] for i in range(2)] == sequences, SEARCHES[int(name)]
        assert [found[i] for i in range(2)] == pytest.approx(scores, abs=1e-3)


def test_seeded_samples_are_the_same_alone_together_and_after_preemption():
    """The first sample is that of a request for one; all come again in any pool."""
    runs = []
    for n, settings in (
        (1, {}),
        (3, {}),
        (3, {"block_size": 16, "enable_prefix_caching": False}),
        (3, {"num_kv_blocks": 40, "max_num_batched_tokens": 9}),
    ):
        loop = make(**settings)
        loop.scheduler.output_lengths.mean = 0
        for i, question in enumerate(QUESTIONS):
            asked = SamplingParams(n=n, seed=7 + i, temperature=1.0, max_tokens=24, ignore_eos=True)
            loop.add(wire.AddRequest(question, list(prompt(question)), asked))
        runs.append({name: tokens for name, (tokens, _) in finish(loop).items()})
    assert loop.scheduler.counters.preemptions > 0
    single, *several = runs
    assert several[0] == several[1] == several[2]
    for question in QUESTIONS:
        samples = several[0][question]
        assert samples[0] == single[question][0]
        assert len({tuple(tokens) for tokens in samples.values()}) > 1
        assert all(len(tokens) == 24 for tokens in samples.values())
