"""Windowed models through the whole engine: blocks given up, tokens unchanged.

Against transformers, and against the same engine keeping every block.
"""

import itertools
import random

import pytest
import tiny_models
import torch
from gpu import ENGINE

from octavo import wire
from octavo.config import EngineConfig
from octavo.engine.startup import Reporter, start
from octavo.kv_layout import KvGroups, kv_layout
from octavo.models.spec import DecoderSpec
from octavo.params import SamplingParams

# Windows of 24 and 20 tokens in half of the layers, in two of three, in all, in every other.
MODELS = ("gemma2", "gemma3", "mistral", "gpt_oss")
COUNT = 40


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The folder, its groups' windows, prompts, and what transformers makes of them greedily."""
    tiny = tiny_models.TINY[request.param]
    oracle = tiny_models.model_of(tiny)
    folder = tiny_models.write(tiny, oracle, tmp_path_factory.mktemp("model"))
    rng = random.Random(3)
    common = [rng.randrange(3, tiny_models.VOCAB) for _ in range(50)]
    prompts = [
        common[:at] + [rng.randrange(3, tiny_models.VOCAB) for _ in range(more)]
        for at, more in ((50, 9), (0, 5), (33, 1), (50, 60), (48, 0))
    ]
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = oracle.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            expected.append(out[0, len(prompt) :].tolist())
    return str(folder), make(folder).scheduler.kv.windows, prompts, expected


def make(folder, **settings):
    defaults = {"block_size": 4, "num_kv_blocks": 400, "max_num_seqs": 8, "max_model_len": 200}
    config = EngineConfig(model=str(folder), num_threads=1, **(ENGINE | defaults | settings))
    loop, _ = start(config, Reporter(lambda _: None))
    loop.scheduler.output_lengths.mean = 0
    loop.scheduler.output_lengths.observe = lambda _: None  # go on admitting by hope
    return loop


def finish(loop):
    results = {}
    while loop.has_work:
        for output in loop.step():
            assert output.error is None
            results.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    loop.scheduler.check_integrity()
    return results


def run(loop, prompts, **asked):
    asked = SamplingParams(**{"max_tokens": COUNT, "ignore_eos": True, **asked})
    for i, prompt in enumerate(prompts):
        loop.add(wire.AddRequest(str(i), list(prompt), asked))
    return finish(loop)


# Block size, times the blocks that the longest alone needs, tokens a step, prefix cache.
SETTINGS = [(16, 8, 512, False), (4, 8, 7, True), (4, 1, 64, False), (1, 1, 5, True)]


@pytest.mark.parametrize(("block_size", "room", "budget", "caching"), SETTINGS)
def test_greedy_tokens_are_those_of_transformers(model, block_size, room, budget, caching):
    folder, windows, prompts, expected = model
    kv = KvGroups(block_size, windows)
    assert kv.sliding
    loop = make(
        folder, block_size=block_size, max_num_batched_tokens=budget,
        num_kv_blocks=int(room * kv.blocks([150], chunk=budget)), enable_prefix_caching=caching,
    )  # fmt: skip
    found = run(loop, prompts, temperature=0)
    assert [found[str(i), 0] for i in range(len(prompts))] == expected
    if room == 1 and len(kv.sliding) < kv.count:
        assert loop.scheduler.counters.preemptions > 0


def test_samples_are_those_of_an_engine_that_keeps_everything(model, monkeypatch):
    folder, _, prompts, _ = model
    runs = [
        run(make(folder, **settings), prompts, n=3, seed=5, temperature=2.0)
        for settings in ({}, {"num_kv_blocks": 360, "max_num_batched_tokens": 17})
    ]
    monkeypatch.setattr(
        DecoderSpec, "kv_layout", lambda self, most: kv_layout([None] * self.num_layers, most)
    )
    kept = make(folder)
    assert kept.scheduler.kv.windows == (None,)
    runs.append(run(kept, prompts, n=3, seed=5, temperature=2.0))
    assert runs[0] == runs[1] == runs[2]
    assert len({tuple(tokens) for tokens in runs[0].values()}) > 10


def test_beams_fork_in_every_group(model, monkeypatch):
    folder, _, prompts, _ = model
    asked = {"use_beam_search": True, "temperature": 0, "n": 3, "best_of": 3}
    found = run(make(folder), prompts[:3], **asked)
    monkeypatch.setattr(
        DecoderSpec, "kv_layout", lambda self, most: kv_layout([None] * self.num_layers, most)
    )
    assert run(make(folder), prompts[:3], **asked) == found


def test_blocks_held_do_not_grow_beyond_the_window(model):
    folder, _, prompts, _ = model
    loop = make(folder, max_model_len=250, max_num_batched_tokens=16)
    kv = loop.scheduler.kv
    asked = SamplingParams(temperature=0, max_tokens=190, ignore_eos=True)
    loop.add(wire.AddRequest("a", list(prompts[0]), asked))
    most = 0
    for step in itertools.count():
        if not loop.has_work:
            break
        loop.step()
        if step > 8:
            most = max(most, loop.scheduler.pool.counts.active)
    windows = sum(window // 4 + 2 for _, window in kv.sliding)
    assert most <= windows + (kv.count - len(kv.sliding)) * -(-250 // 4)
