"""Steps as a GPU runs them, here on a CPU by the reference operations: tokens, log-probabilities
and ends are those of the plain runner, at both depths of the loop, whatever is asked for."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import llama_checkpoints
import pytest
import tiny_models
import torch
from requests_of_all_kinds import BLOCK, BUDGET, MAX_SEQS, requests, run

from octavo import wire
from octavo.core.step import ScheduledSequence, StepPlan
from octavo.engine.device import DeviceSteps
from octavo.engine.graphs import CudaGraphs, Part, chunk_sizes, graph_sizes
from octavo.engine.lane import HostLane
from octavo.engine.rows import StateLayout, padding
from octavo.engine.runner import Runner
from octavo.engine.workspace import Workspace
from octavo.params import SamplingParams
from octavo_kernels import ops


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.forced("reference"):  # which takes padding, as kernels on a GPU do
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return llama_checkpoints.write(tmp_path_factory.mktemp("model"))


class PaddedGraphs:
    """Runs parts of steps as graphs would: padded to a few sizes, each rehearsed when it is new."""

    def __init__(self, part, sizes) -> None:
        self.part, self.sizes = part, sizes
        self.known, self.runs = set(), []
        self.largest = sizes[-1]

    def ready(self, count: int) -> int:
        size = next(size for size in self.sizes if size >= count)
        if size not in self.known:
            self.known.add(size)
            self.part.rehearse(size)
        self.runs.append((count, size))
        return size

    def run(self, size: int) -> None:
        assert size in self.known
        self.part.run(size)

    def prepare_one(self) -> bool:
        return False


def device_runner(
    checkpoint, num_blocks: int, rows: int = MAX_SEQS + 1, *, deterministic: bool = False
) -> tuple[Runner, PaddedGraphs, PaddedGraphs]:
    """The CPU's runner, but with a device's steps, and what runs decodes and steps with chunks of
    those; steps of more than 21 tokens have no graph.
    """
    runner = Runner(str(checkpoint), device="cpu", block_size=BLOCK, seed=3)
    runner.allocate_kv(num_blocks + 1)
    cache = runner._steps._kv_cache
    groups = len(runner.kv_windows)
    layout = StateLayout(rows, groups * (runner.max_model_len // BLOCK), BUDGET, groups)
    space = Workspace(runner._decoder, layout, BLOCK, torch.device("cpu"))
    made = []

    def make(decodes, chunks):
        made.extend((PaddedGraphs(decodes, [2, 4, 5]), PaddedGraphs(chunks, [4, 7, 16, 21])))
        return made

    runner._steps = DeviceSteps(
        runner._decoder, cache, space, HostLane(), make,
        eos_token_ids=runner.eos_token_ids, seed=3, deterministic=deterministic,
    )  # fmt: skip
    return runner, *made


def plain_runner(checkpoint, num_blocks: int) -> Runner:
    runner = Runner(str(checkpoint), device="cpu", block_size=BLOCK, seed=3)
    runner.allocate_kv(num_blocks + 1)
    return runner


def same(left, right) -> None:
    assert left.keys() == right.keys()
    for key, (tokens, logprobs, ends) in left.items():
        assert tokens == right[key][0], key
        assert ends == right[key][2], key
        assert len(ends) == 1, key
        assert [p.token_id for p in logprobs] == [p.token_id for p in right[key][1]], key
        for mine, theirs in zip(logprobs, right[key][1], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [1, 2])
def test_outputs_are_those_of_the_plain_runner(checkpoint, seed, depth) -> None:
    num_blocks = 40 if seed else 24  # the smaller one preempts
    asked = requests(seed, 28)
    expected, preemptions = run(plain_runner(checkpoint, num_blocks), asked, num_blocks, 1)
    runner, decodes, chunks = device_runner(checkpoint, num_blocks, deterministic=seed % 2 == 1)
    got, _ = run(runner, asked, num_blocks, depth)
    same(expected, got)
    same(expected, run(plain_runner(checkpoint, num_blocks), asked, num_blocks, depth)[0])
    for graphs in (decodes, chunks):
        assert any(size > count for count, size in graphs.runs)
    assert preemptions or seed


@pytest.mark.parametrize("rows", [MAX_SEQS, MAX_SEQS + 1])
def test_a_full_batch_without_a_row_for_padding_runs_as_it_is(checkpoint, rows) -> None:
    greedy = SamplingParams(temperature=0)
    plan = StepPlan(
        tuple(
            ScheduledSequence(i, [5 + i, 9], 0, [1 + i], True, greedy, 0, [5 + i, 9], 2)
            for i in range(MAX_SEQS)
        )
    )
    runner, _, chunks = device_runner(checkpoint, 10, rows)
    assert runner.execute(plan).tokens == plain_runner(checkpoint, 10).execute(plan).tokens
    assert chunks.runs == ([(12, 16)] if rows > MAX_SEQS else [])


def test_what_pads_a_step_leaves_no_query_start_as_it_was() -> None:
    layout = StateLayout(max_rows=5, table_width=4, max_tokens=32)
    begin, words = padding(layout, 2, 16)
    assert (begin, words) == (layout.query_start + 3, [16, 16, 16])
    assert begin + len(words) == layout.chunk
    assert padding(layout, 4, 7) == (layout.query_start + 5, [7])


@pytest.fixture(scope="module")
def windowed(tmp_path_factory) -> Path:
    """Two groups of layers; sequences outgrow the window of 24 tokens of one of them."""
    tiny = tiny_models.TINY["gemma2"]
    model = tiny_models.model_of(tiny)
    return tiny_models.write(tiny, model, tmp_path_factory.mktemp("windowed"))


@pytest.mark.parametrize("host_blocks", [0, 60])
def test_windows_and_swaps_are_those_of_the_plain_runner(windowed, host_blocks) -> None:
    asked = requests(2, 20)
    expected, _ = run(plain_runner(windowed, 400), asked, 400, 1)
    runner, _, chunks = device_runner(windowed, 44)
    assert len(runner.kv_windows) == 2
    got, preemptions = run(runner, asked, 44, 2, host_blocks)
    same(expected, got)
    assert preemptions > 0
    assert chunks.runs


@pytest.mark.parametrize("where", ["send", "fetch"])
def test_who_is_interrupted_can_go_on_with_other_requests(checkpoint, monkeypatch, where) -> None:
    runner, *_ = device_runner(checkpoint, 40)
    calls = []
    real = getattr(HostLane, where)

    def interrupted(lane, what):
        calls.append(what)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(lane, what)

    monkeypatch.setattr(HostLane, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(runner, requests(1, 14), 40, 2)
    asked = requests(2, 14)
    got, _ = run(runner, asked, 40, 2)
    same(run(plain_runner(checkpoint, 40), asked, 40, 1)[0], got)


def test_a_scheduler_does_not_get_what_another_left_behind(checkpoint) -> None:
    """Both number their sequences from 0, as a warm-up's does and that of the first request."""
    runner, *_ = device_runner(checkpoint, 40)
    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    run(runner, [wire.AddRequest("a", [5, 6, 7], plain)], 40, 2)
    asked = SamplingParams(max_tokens=6, ignore_eos=True, allowed_token_ids=(3, 4, 5))
    got, _ = run(runner, [wire.AddRequest("b", [5, 6, 7], asked)], 40, 2)
    tokens, _, ends = got["b", 0]
    assert (len(tokens), ends) == (6, ["length"])
    assert set(tokens) <= {3, 4, 5}


def test_prompts_of_one_token_have_log_probabilities(checkpoint) -> None:
    """A chunk of one token whose prompt goes on is not a decode for that."""
    want = SamplingParams(prompt_logprobs=1, temperature=0)

    def chunk(tokens, start, samples):
        return ScheduledSequence(
            0, tokens[start : start + 1], start, [1], samples, want, 0, tokens, len(tokens)
        )

    runner, *_ = device_runner(checkpoint, 4)
    plain = plain_runner(checkpoint, 4)
    tokens = [5, 9]
    for start, samples in ((0, False), (1, True)):
        plan = StepPlan((chunk(tokens, start, samples),))
        got, expected = runner.execute(plan), plain.execute(plan)
        assert got.tokens == expected.tokens
        assert got.prompt_logprobs.keys() == expected.prompt_logprobs.keys()
        for own, theirs in zip(
            got.prompt_logprobs.get(0, []), expected.prompt_logprobs.get(0, []), strict=True
        ):
            assert own.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert runner.execute(StepPlan(copies=((1, 2),))).tokens == []


def test_sizes_of_graphs() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    sizes = graph_sizes(256)
    assert sizes[-1] == 256
    assert len(sizes) == 35
    assert graph_sizes(300)[-3:] == [272, 288, 300]
    assert graph_sizes(10_000)[-1] == 512
    assert sizes == sorted(set(sizes))


def note(done: list[tuple[str, int]], what: str, size: int) -> None:
    done.append((what, size))


class Captures:
    """In the place of the memory that graphs share: counts what is captured, and runs nothing."""

    def __init__(self) -> None:
        self.count = 0

    def capture(self, run):
        self.count += 1
        return SimpleNamespace(replay=run)


def test_what_is_needed_now_is_captured_at_once_and_again_when_there_is_time() -> None:
    done = []
    part = Part(*(partial(note, done, what) for what in ("run", "try", "tune")))
    memory = Captures()
    graphs = CudaGraphs(part, [4, 8, 9], memory, "sequences")
    assert graphs.largest == 9
    assert graphs.ready(5) == graphs.ready(8) == 8
    assert (done, memory.count) == ([("try", 8)], 1)
    graphs.run(8)
    assert done.pop() == ("run", 8)
    for size in (4, 8, 9):
        done.clear()
        assert graphs.prepare_one()
        assert done == [("tune", size), ("try", size)]
    assert memory.count == 4
    assert not graphs.prepare_one()
    assert [graphs.ready(count) for count in (0, 1, 4, 9)] == [4, 4, 4, 9]
    assert memory.count == 4


def test_sizes_of_graphs_of_steps_with_chunks() -> None:
    assert chunk_sizes(10) == [10]
    assert chunk_sizes(16) == [16]
    assert chunk_sizes(100) == [16, 32, 48, 64, 96, 100]
    sizes = chunk_sizes(8192)
    assert (len(sizes), sizes[-1]) == (34, 2048)
    assert sizes == sorted(set(sizes))
    assert all(large - small - 1 < large / 8 for small, large in pairwise(sizes) if small >= 256)
