"""Swap to host memory with real models: tokens of preempted runs are those of undisturbed ones."""

import math
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
from gpu import ENGINE

from octavo import LLM, SamplingParams, wire
from octavo.config import EngineConfig
from octavo.core.step import StepPlan
from octavo.engine.runner import Runner
from octavo.engine.startup import Reporter, start
from octavo.engine.swap import HostBlocks
from octavo.errors import ConfigError, DoesNotFitError

MODEL = Path(__file__).resolve().parents[2] / "e2e/tinymodel/model"
GIB = 2**30
PROMPTS = [[7 + i, 3, 9 + i, *range(4, 40)] for i in range(5)]


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["tiny", "gemma2"])
def folder(request, tmp_path_factory):
    if request.param == "tiny":
        if not MODEL.is_dir():
            pytest.skip("the tiny model is not there")
        return str(MODEL)
    tiny = tiny_models.TINY[request.param]
    path = tmp_path_factory.mktemp("model")
    return str(tiny_models.write(tiny, tiny_models.model_of(tiny), path))


def run(folder, **settings):
    """All tokens, and the loop they came from; preempts as soon as the pool is full."""
    config = EngineConfig(
        model=folder, num_threads=1, block_size=4, max_model_len=100, seed=3,
        max_num_seqs=16, **ENGINE, **settings,
    )  # fmt: skip
    loop, _ = start(config, Reporter(lambda _: None))
    loop.scheduler.output_lengths.mean = 0
    loop.scheduler.output_lengths.observe = lambda _: None  # go on admitting by hope
    if loop.scheduler.swap is not None:
        loop.scheduler.swap.recompute_seconds = lambda tokens: 1e9
    asked = SamplingParams(n=2, max_tokens=40, temperature=1.5, seed=5, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        loop.add(wire.AddRequest(str(i), list(prompt), asked))
    results = {}
    while loop.has_work:
        for output in loop.step():
            assert output.error is None
            results.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    loop.scheduler.check_integrity()
    return results, loop


@cache
def undisturbed(folder):
    return run(folder, num_kv_blocks=1000)[0]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [False, True])
def test_tokens_are_those_of_undisturbed_runs(folder, depth, caching):
    wanted = undisturbed(folder)
    common = {"num_kv_blocks": 90, "enable_prefix_caching": caching, "pipeline_depth": depth}
    replayed, without = run(folder, **common)
    swapped, loop = run(folder, swap_space=1 / 64, **common)
    assert replayed == swapped == wanted
    assert without.scheduler.counters.preemptions > 0
    load = loop.load()
    assert load.preemptions > 0
    assert load.swapped_out >= load.swapped_in > 0
    assert load.host_blocks_used == 0 < load.host_blocks
    assert loop.scheduler.counters.steps < without.scheduler.counters.steps or caching


def test_blocks_go_out_and_come_back_whole():
    cache = torch.randn(3, 2, 10, 4, 2, 8)
    before = cache.clone()
    host = HostBlocks(cache, 6)
    host.run(StepPlan(swap_out=((1, 5), (7, 2))))
    cache[:, :, [1, 7]] = float("nan")
    # What goes out in one step may be overwritten by what comes in.
    host.run(StepPlan(swap_out=((3, 1),), swap_in=((2, 3), (5, 7))))
    assert torch.equal(cache[:, :, 3], before[:, :, 7])
    assert torch.equal(cache[:, :, 7], before[:, :, 1])
    host.run(StepPlan(swap_in=((1, 9),)))
    assert torch.equal(cache[:, :, 9], before[:, :, 3])
    kept = [0, 2, 4, 5, 6, 8]
    assert torch.equal(cache[:, :, kept], before[:, :, kept])


def test_the_time_of_a_copy_is_measured_and_the_cache_stays():
    cache = torch.randn(3, 2, 10, 4, 2, 8)
    before = cache.clone()
    assert 0 < HostBlocks(cache, 6).seconds_per_block() < 1
    assert torch.equal(cache, before)


@pytest.mark.skipif(not MODEL.is_dir(), reason="the tiny model is not there")
def test_a_swap_space_of_no_use_is_refused():
    with pytest.raises(ConfigError, match=r"--swap-space 1e-06 is 0\.001024 MiB, less than two KV"):
        start(
            EngineConfig(model=str(MODEL), num_kv_blocks=8, swap_space=1e-6, **ENGINE),
            Reporter(lambda _: None),
        )
    with pytest.raises(DoesNotFitError, match=r"takes (60000|65536)\.00 GiB of host memory"):
        start(
            EngineConfig(model=str(MODEL), num_kv_blocks=8, swap_space=60000, **ENGINE),
            Reporter(lambda _: None),
        )


@pytest.mark.skipif(not MODEL.is_dir(), reason="the tiny model is not there")
def test_pinned_memory_is_counted_as_torch_takes_it(monkeypatch):
    """As the next power of two: else a pod within its limit would be killed while it starts."""
    runner = Runner(str(MODEL), device="cpu", block_size=16)
    runner.allocate_kv(9)
    asked = 5 * runner.kv_bytes_per_block
    taken = 2 ** math.ceil(math.log2(asked))
    monkeypatch.setattr("octavo.engine.runner.available_host_bytes", lambda: taken - 1)
    assert taken > asked + 1
    assert runner.allocate_swap(5) > 0
    runner.device = torch.device("cuda")  # which is only asked how memory is taken
    with pytest.raises(DoesNotFitError, match="--swap-space takes"):
        runner.allocate_swap(5)
    monkeypatch.setattr("octavo.engine.runner.available_host_bytes", lambda: taken)
    assert runner.allocate_swap(5) > 0


@pytest.mark.skipif(not MODEL.is_dir(), reason="the tiny model is not there")
def test_a_script_can_ask_for_swap_space():
    llm = LLM(str(MODEL), num_kv_blocks=64, swap_space=1 / 64, num_threads=1, **ENGINE)
    swap = llm._loop.scheduler.swap
    assert swap.pool.num_blocks == GIB // 64 // llm._ready.kv_bytes_per_block - 1
    assert swap.recompute_seconds == llm._loop._step_time.added
    assert LLM(str(MODEL), num_kv_blocks=64, **ENGINE)._loop.scheduler.swap is None
