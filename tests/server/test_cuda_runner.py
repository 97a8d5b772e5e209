"""The runner on a GPU: graphs and the device's own state against the plain runner on a CPU.

Where two tokens are as good as equal, half precision may choose the other: then the CPU's float32
logits must say that they were.
"""

import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import llama_checkpoints
import pytest
import tiny_models
import torch
from gpu import needs_gpu
from requests_of_all_kinds import MAX_SEQS, requests, run

from octavo.core.step import PENDING, Rows, ScheduledSequence, StepPlan
from octavo.engine import lane
from octavo.engine.graphs import CudaGraphs
from octavo.engine.lane import CudaLane
from octavo.engine.runner import Runner
from octavo.errors import DeviceError
from octavo.params import SamplingParams
from octavo_kernels import ops

pytestmark = needs_gpu

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
# In spreads of the logits, which reach two or three: what bfloat16's 8 bits, rounded a few dozen
# times on the way, may move the difference of two by. Seen on an H100: 0.062.
AS_GOOD_AS_EQUAL = 0.1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    values = llama_checkpoints.config(**SHAPE)
    return llama_checkpoints.write(tmp_path_factory.mktemp("model"), values)


def gpu_runner(checkpoint, num_blocks: int, *, dtype="bfloat16", max_num_seqs=MAX_SEQS, **options):
    runner = Runner(
        str(checkpoint), device="cuda", dtype=dtype, block_size=8, seed=3,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=128, **options,
    )  # fmt: skip
    runner.allocate_kv(num_blocks + 1)
    return runner


class Sequence:
    """A greedy sequence on blocks of its own, as the scheduler would plan it."""

    def __init__(self, seq_id: int, prompt: list[int], blocks: int) -> None:
        self.seq_id, self.prompt, self.count = seq_id, prompt, 0
        self.table = [1 + seq_id * blocks + i for i in range(blocks)]

    def share(self) -> ScheduledSequence:
        if not self.count:
            return ScheduledSequence(
                self.seq_id, self.prompt, 0, self.table, True, GREEDY, 0, self.prompt,
                len(self.prompt),
            )  # fmt: skip
        start = len(self.prompt) + self.count - 1
        return ScheduledSequence(
            self.seq_id, [PENDING], start, self.table, True, GREEDY, self.count, self.prompt,
            len(self.prompt),
        )  # fmt: skip


def decode(runner, num_seqs: int, steps: int, *, blocks=8, longest=5) -> list[list[int]]:
    """Greedy tokens of prompts that start together, two steps in flight."""
    sequences = [
        Sequence(i, [3 + (7 * i + j) % 90 for j in range(1 + i % longest)], blocks)
        for i in range(num_seqs)
    ]
    flying, drawn = [], [[] for _ in sequences]
    for step in range(steps):
        if step == 0:
            plan = StepPlan(tuple(s.share() for s in sequences))
        elif step == 1:
            plan = StepPlan(rows=Rows(num_seqs, joined=tuple(s.share() for s in sequences)))
        else:
            plan = StepPlan(rows=Rows(num_seqs))
        for sequence in sequences:
            sequence.count += 1
        flying.append(runner.submit(plan))
        if len(flying) == 2:
            collect(runner, flying, drawn)
    collect(runner, flying, drawn)
    return drawn


def collect(runner, flying, drawn) -> None:
    for own, token in zip(drawn, runner.collect(flying.pop(0)).tokens, strict=True):
        own.append(token)


def graphs(runner) -> CudaGraphs:
    found = runner._steps._graphs
    assert isinstance(found, CudaGraphs)
    return found


def chunk_graphs(runner) -> CudaGraphs:
    found = runner._steps._chunk_graphs
    assert isinstance(found, CudaGraphs)
    return found


@pytest.fixture
def deterministic() -> Iterator[dict]:
    """Results that depend on no padding, so that what is padded can be compared bit for bit."""
    yield {"deterministic": True}
    ops.deterministic(False)


@pytest.mark.parametrize("num_seqs", [1, 2, 4, 8, 16, 24])
def test_graphs_give_the_tokens_of_the_same_operations_one_by_one(checkpoint, num_seqs) -> None:
    blocks = 8 * num_seqs
    captured = gpu_runner(checkpoint, blocks, max_num_seqs=24)
    eager = gpu_runner(checkpoint, blocks, max_num_seqs=24, enforce_eager=True)
    before = ops.calls.copy()
    tokens = decode(captured, num_seqs, 30, longest=1)  # a prompt of one token is a decode
    ran = ops.calls - before
    few = ran["decode_layers", "cuda"] or ran["decode_logits", "cuda"]
    assert few or ran["paged_attention", "cuda"]
    assert list(graphs(captured)._graphs) == [num_seqs]
    assert tokens == decode(eager, num_seqs, 30, longest=1)
    assert decode(captured, num_seqs, 30, longest=1) == tokens
    assert len({tuple(own) for own in tokens}) == num_seqs


def prompt_step(lengths: tuple[int, ...], decodes: int, blocks: int) -> list[StepPlan]:
    """Some prompts of one token, then a step in which those decode beside longer prompts."""
    first = [Sequence(i, [5 + i], blocks) for i in range(decodes)]
    other = [
        Sequence(decodes + i, [3 + (5 * i + j * j) % 90 for j in range(length)], blocks)
        for i, length in enumerate(lengths)
    ]
    plans = [StepPlan(tuple(s.share() for s in first))] if first else []
    for sequence in first:
        sequence.count = 1
    rows = Rows(len(first), joined=tuple(s.share() for s in first))
    return [*plans, StepPlan(tuple(s.share() for s in other), rows=rows)]


@pytest.mark.parametrize(
    ("lengths", "decodes"),
    [
        *(((n,), 0) for n in (2, 15, 16, 17, 31, 32, 33, 64, 65, 96, 97, 128)),
        ((2, 3), 11), ((9, 5), 2), ((2, 60, 40), 5), ((100, 2), 20), ((127,), 1),
    ],
)  # fmt: skip
def test_a_padded_step_leaves_the_bits_of_one_that_is_not(
    checkpoint, deterministic, lengths, decodes
) -> None:
    """At the edges of sizes, alone and beside decodes: logits, and what is in the cache."""
    captured, eager = (
        gpu_runner(checkpoint, 16 * 24, max_num_seqs=24, enforce_eager=plain, **deterministic)
        for plain in (False, True)
    )
    found = []
    for runner in (captured, eager):
        tokens = [runner.execute(plan).tokens for plan in prompt_step(lengths, decodes, blocks=16)]
        count = len(lengths) + decodes
        found.append((tokens, runner._steps._space.logits[:count].clone(), runner._kv_cache))
    (tokens, logits, cache), (right_tokens, right_logits, right_cache) = found
    size = list(chunk_graphs(captured)._graphs)[-1]
    assert sum(lengths) + decodes <= size
    assert tokens == right_tokens
    assert not logits.isnan().any()
    assert torch.equal(logits, right_logits)
    assert torch.equal(cache, right_cache)


@pytest.mark.parametrize("first", [1, 16, 100, 127])
def test_how_a_prompt_is_cut_changes_no_bit(checkpoint, deterministic, first) -> None:
    """Under the deterministic profile, also where one token of it is left for a step of its own."""
    tokens = [3 + (5 * i) % 90 for i in range(first + 1)]
    found = []
    for cuts in ((0, first + 1), (0, first, first + 1)):
        runner = gpu_runner(checkpoint, 16, **deterministic)
        for start, end in pairwise(cuts):
            share = ScheduledSequence(
                0, tokens[start:end], start, list(range(1, 17)), end > first, GREEDY, 0, tokens,
                len(tokens),
            )  # fmt: skip
            result = runner.execute(StepPlan((share,)))
        found.append((result.tokens, runner._steps._space.logits[0].clone(), runner._kv_cache))
    (token, logits, cache), (cut_token, cut_logits, cut_cache) = found
    assert token == cut_token
    assert torch.equal(logits, cut_logits)
    assert torch.equal(cache, cut_cache)


@pytest.mark.parametrize("lengths", [(20,), (2, 60, 40), (100, 7)])
def test_padded_steps_draw_what_the_cpu_does(checkpoint, lengths) -> None:
    """By the kernels that are used where bits may depend on the padding."""
    runner = gpu_runner(checkpoint, 16 * 8)
    [plan] = prompt_step(lengths, 0, blocks=16)
    got = runner.execute(plan).tokens
    assert chunk_graphs(runner)._graphs
    check_against_cpu(checkpoint, [list(s.token_ids) for s in plan.chunks], [[t] for t in got])


FAMILIES = ["llama", "gemma2", "qwen3", "gpt_oss", "mixtral", "cohere", "gpt_neox"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """Windows, softcaps, sinks, experts, layers with both halves beside each other."""
    tiny = tiny_models.TINY[request.param]
    return tiny_models.write(tiny, tiny_models.model_of(tiny), tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("depth", [1, 2])
def test_every_kind_of_request_ends_as_without_graphs(family, deterministic, depth) -> None:
    blocks = 90
    asked = requests(depth, 24)
    captured, eager = (
        gpu_runner(family, blocks, enforce_eager=plain, **deterministic) for plain in (False, True)
    )
    got, _ = run(captured, asked, blocks, depth)
    expected, _ = run(eager, asked, blocks, depth)
    assert len(chunk_graphs(captured)._graphs) > 1
    assert graphs(captured)._graphs
    assert got.keys() == expected.keys()
    for key, (tokens, _, ends) in expected.items():
        assert got[key][0] == tokens, key
        assert got[key][2] == ends, key


def test_a_step_with_prompts_waits_for_nothing(checkpoint) -> None:
    runner = gpu_runner(checkpoint, 16 * 8)
    [plan] = prompt_step((20, 30), 0, blocks=16)
    runner.execute(plan)
    torch.cuda.synchronize()
    before = dict(chunk_graphs(runner)._graphs)
    with warnings.catch_warnings():  # torch warns that it may miss some
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        step = runner.submit(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert chunk_graphs(runner)._graphs == before
    assert len(runner.collect(step).tokens) == 2


def cpu_logits(checkpoint, tokens: list[int]) -> torch.Tensor:
    runner = Runner(str(checkpoint), device="cpu", block_size=8)
    runner.allocate_kv(-(-len(tokens) // 8) + 1)
    table = list(range(1, -(-len(tokens) // 8) + 1))
    seen = []
    finish = runner._decoder.logits
    runner._decoder.logits = lambda x: seen.append(finish(x)) or seen[-1]
    runner.execute(
        StepPlan((ScheduledSequence(0, tokens, 0, table, True, GREEDY, 0, tokens, len(tokens)),))
    )
    return seen[0][0]


def check_against_cpu(checkpoint, prompts, got) -> None:
    """Each token is the CPU's own choice after what came before, or as good as that."""
    for prompt, tokens in zip(prompts, got, strict=True):
        for i in range(0, len(tokens), 5):
            logits = cpu_logits(checkpoint, prompt + tokens[:i])
            assert logits.max() - logits[tokens[i]] < AS_GOOD_AS_EQUAL * logits.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_greedy_tokens_are_those_of_the_cpu(checkpoint, dtype) -> None:
    runner = gpu_runner(checkpoint, 8 * 5, dtype=dtype)
    got = decode(runner, 5, 40)  # five run in a graph of eight
    prompts = [[3 + (7 * i + j) % 90 for j in range(1 + i % 5)] for i in range(5)]
    check_against_cpu(checkpoint, prompts, got)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_request_ends_as_on_the_cpu(checkpoint, seed, depth) -> None:
    """In float32, where no two tokens are as good as equal."""
    blocks = 30 if seed else 14
    asked = requests(seed, 20)
    plain = Runner(str(checkpoint), device="cpu", block_size=8, seed=3)
    plain.allocate_kv(blocks + 1)
    expected, _ = run(plain, asked, blocks, 1)
    got, _ = run(gpu_runner(checkpoint, blocks, dtype="float32"), asked, blocks, depth)
    assert got.keys() == expected.keys()
    for key, (tokens, _, ends) in expected.items():
        assert got[key][0] == tokens, key
        assert got[key][2] == ends, key


@pytest.mark.parametrize("depth", [1, 2])
def test_every_kind_of_request_runs_in_half_precision(checkpoint, depth) -> None:
    asked = requests(2, 28)
    runner = gpu_runner(checkpoint, 12)
    got, preemptions = run(runner, asked, 12, depth)
    assert preemptions
    for tokens, _, ends in got.values():
        assert len(ends) == 1
        assert all(0 <= token < 96 for token in tokens)
    assert len(graphs(runner)._graphs) > 1


def test_a_quiet_step_waits_for_nothing_and_allocates_nothing(checkpoint) -> None:
    runner = gpu_runner(checkpoint, 8 * 4, max_num_seqs=4)
    decode(runner, 4, 8)
    sequences = [Sequence(i, [5 + i], 8) for i in range(4)]
    runner.execute(StepPlan(tuple(s.share() for s in sequences)))
    for sequence in sequences:
        sequence.count = 1
    runner.execute(StepPlan(rows=Rows(4, joined=tuple(s.share() for s in sequences))))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with warnings.catch_warnings():  # torch warns that it may miss some
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        first = runner.submit(StepPlan(rows=Rows(4)))
        second = runner.submit(StepPlan(rows=Rows(4)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert len(runner.collect(first).tokens) == len(runner.collect(second).tokens) == 4


def test_host_time_of_a_quiet_step(checkpoint) -> None:
    """Submit and read 256 rows; the device's work in between is not counted."""
    runner = gpu_runner(checkpoint, 8 * 256, max_num_seqs=256)
    sequences = [Sequence(i, [5 + i % 80], 8) for i in range(256)]
    for begin in range(0, 256, 64):
        runner.execute(StepPlan(tuple(s.share() for s in sequences[begin : begin + 64])))
    for sequence in sequences:
        sequence.count = 1
    # Their chunks are over: all of them are new rows, with a token that the host knows.
    known = [
        ScheduledSequence(s.seq_id, [7], 1, s.table, True, GREEDY, 1, s.prompt, 1)
        for s in sequences
    ]
    runner.execute(StepPlan(rows=Rows(256, joined=tuple(known))))
    taken = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step = runner.submit(StepPlan(rows=Rows(256)))
        submitted = time.perf_counter()
        torch.cuda.synchronize()
        read = time.perf_counter()
        runner.collect(step)
        taken.append(time.perf_counter() - read + submitted - begin)
    median = sorted(taken)[10]
    print(f"host time of a quiet step of 256: {1e3 * median:.3f} ms")
    assert median < 1.0e-3


def test_all_sizes_can_be_prepared(checkpoint) -> None:
    runner = gpu_runner(checkpoint, 8 * 8, max_num_seqs=8)
    decode(runner, 3, 6)
    while runner.prepare_one():
        pass
    assert sorted(graphs(runner)._graphs) == [1, 2, 4, 8]
    # Of up to four times the tokens of a step that somebody's next token waits for.
    assert sorted(chunk_graphs(runner)._graphs) == [16, 32, 48, 64, *range(96, 513, 32)]
    expected = decode(gpu_runner(checkpoint, 8 * 8, max_num_seqs=8), 8, 12)
    assert decode(runner, 8, 12) == expected


def test_a_step_that_does_not_end_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(lane, "STEP_TIMEOUT_S", 0.05)
    device = torch.device("cuda")
    way = CudaLane(device, 1024, 8)
    numbers = torch.zeros(4, dtype=torch.int32, device=device)
    with way.scope():
        torch.cuda._sleep(2_000_000_000)  # about a second
        first, second = way.fetch(numbers), way.fetch(numbers)
    with pytest.raises(DeviceError, match=r"has not ended within 0 s: the GPU hangs or is lost"):
        first.wait()
    begin = time.monotonic()
    with pytest.raises(DeviceError):
        second.wait()
    assert time.monotonic() - begin < 0.05
    torch.cuda.synchronize()


def test_memory_that_the_cache_gets_was_not_taken(checkpoint) -> None:
    """Neither graphs nor large steps take memory once the cache is there."""
    runner = gpu_runner(checkpoint, 8 * 6)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    run(runner, requests(1, 14), 40, 2)
    assert torch.cuda.memory_reserved() - reserved < 64 << 20


def test_the_largest_step_takes_no_more_than_was_seen_of_it(checkpoint) -> None:
    runner = Runner(
        str(checkpoint), device="cuda", dtype="bfloat16", block_size=8, max_num_seqs=64,
        max_num_batched_tokens=1024, enforce_eager=True,
    )  # fmt: skip
    assert runner.large_step == 4096  # more than a graph has, so that three layers were run
    length = runner.max_model_len
    count, blocks = 4096 // length, length // 8
    runner.allocate_kv(count * blocks + 1)
    prompts = [[3 + (7 * i + j) % 90 for j in range(length)] for i in range(count)]
    plan = StepPlan(tuple(Sequence(i, p, blocks).share() for i, p in enumerate(prompts)))
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    assert len(runner.execute(plan).tokens) == count
    assert torch.cuda.memory_reserved() - reserved < 4 << 20
