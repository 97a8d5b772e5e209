"""The runner: greedy output of transformers however the work is cut, and honest refusals."""

import json
from pathlib import Path

import llama_checkpoints
import pytest
import torch

from octavo.core.step import ScheduledSequence, StepPlan
from octavo.engine import runner as runner_module
from octavo.engine.memory import available_host_bytes
from octavo.engine.runner import Runner
from octavo.errors import ConfigError, DoesNotFitError, ModelError
from octavo.params import SamplingParams
from octavo_kernels import ops

TINY_MODEL = Path(__file__).resolve().parents[2] / "e2e/tinymodel/model"
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Sequence:
    """A sequence on its own blocks: what it knows, and how much of it the cache holds."""

    def __init__(self, seq_id: int, prompt: list[int], table: list[int], params=GREEDY) -> None:
        self.seq_id, self.tokens, self.table = seq_id, list(prompt), table
        self.prompt_len, self.computed, self.params = len(prompt), 0, params

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    def share(self, budget: int) -> ScheduledSequence:
        """Up to `budget` of the tokens that are still to be computed."""
        start, end = self.computed, min(len(self.tokens), self.computed + budget)
        self.computed = end
        return ScheduledSequence(
            self.seq_id, self.tokens[start:end], start, self.table,
            end == len(self.tokens), self.params, len(self.generated),
        )  # fmt: skip


def step(runner: Runner, shares: list[tuple[Sequence, int]]) -> None:
    """One step over (sequence, token budget) pairs; sampled tokens are appended."""
    plan = StepPlan(tuple(sequence.share(budget) for sequence, budget in shares))
    sampled = iter(runner.execute(plan).tokens)
    for planned, (sequence, _) in zip(plan.sequences, shares, strict=True):
        if planned.samples:
            sequence.tokens.append(next(sampled))
    assert next(sampled, None) is None


def generate(runner: Runner, prompts: list[list[int]], count: int, chunk: int, params=GREEDY):
    """Tokens of all prompts run in one batch; prompts longer than `chunk` come in pieces."""
    size = runner.block_size
    each = (max(map(len, prompts)) + count) // size + 1
    order = torch.randperm(
        each * len(prompts) + 1, generator=torch.Generator().manual_seed(4)
    ).tolist()
    runner.allocate_kv(len(order))
    sequences = [
        Sequence(i, p, order[i * each : (i + 1) * each], params) for i, p in enumerate(prompts)
    ]
    while working := [s for s in sequences if len(s.generated) < count]:
        step(runner, [(s, chunk) for s in working])
    return [s.generated for s in sequences]


def prompts(vocab: int, *lengths: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocab, (n,), generator=random).tolist() for n in lengths]


def transformers_greedy(folder: Path, inputs: list[list[int]], count: int) -> list[list[int]]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    with torch.inference_mode():
        for tokens in inputs:
            ids = torch.tensor([tokens])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            outputs.append(out[0, len(tokens) :].tolist())
    return outputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return llama_checkpoints.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def oracle(checkpoint) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what transformers makes of them."""
    inputs = prompts(96, 1, 37, 5, 90)
    return inputs, transformers_greedy(checkpoint, inputs, 64)


@pytest.mark.parametrize("implementation", ops.implementations())
def test_greedy_tokens_are_those_of_transformers(checkpoint, oracle, implementation) -> None:
    inputs, expected = oracle
    with ops.forced(implementation):
        for block_size, chunk in ((16, 1000), (4, 13)):
            runner = Runner(str(checkpoint), device="cpu", block_size=block_size)
            assert generate(runner, inputs, 64, chunk) == expected


@pytest.mark.skipif(not TINY_MODEL.exists(), reason="the tiny model has not been trained")
def test_greedy_tokens_of_the_tiny_model_are_those_of_transformers() -> None:
    runner = Runner(str(TINY_MODEL), device="cpu")
    inputs = prompts(runner.vocab_size, 3, 40, 17)
    before = ops.calls["paged_attention", "cpu"]
    got = generate(runner, inputs, 64, 16)
    assert got == transformers_greedy(TINY_MODEL, inputs, 64)
    if "cpu" in ops.implementations():
        assert ops.calls["paged_attention", "cpu"] > before


def test_what_the_engine_needs_to_know(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu", block_size=8)
    assert runner.vocab_size == 96
    assert runner.max_model_len == 256
    assert runner.eos_token_ids == (2,)
    assert runner.dtype_name == "float32"
    # 2 layers x (key + value) x 2 heads x 8 dims x 4 bytes x 8 tokens
    assert runner.kv_bytes_per_block == 2 * 2 * 2 * 8 * 4 * 8
    assert 0 < runner.free_memory_for_kv(0.9) <= 1 << 30
    assert runner.free_memory_for_kv(1.0) <= available_host_bytes() * 1.1


def test_progress_rises_to_one_in_each_phase(checkpoint) -> None:
    seen: dict[str, list[float]] = {}

    def report(phase: str, ratio: float) -> None:
        seen.setdefault(phase, []).append(ratio)

    Runner(str(checkpoint), device="cpu", progress=report).allocate_kv(4)
    assert list(seen) == ["check", "weights", "cache"]
    for ratios in seen.values():
        assert ratios == sorted(ratios)
        assert ratios[0] == 0.0
        assert ratios[-1] == 1.0


def test_seeded_sampling_does_not_depend_on_mates_chunks_or_blocks(checkpoint) -> None:
    inputs = prompts(96, 20, 33)
    seeded = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, seed=11)
    runner = Runner(str(checkpoint), device="cpu", block_size=16)
    together = generate(runner, inputs, 20, 1000, seeded)
    alone = [generate(runner, [tokens], 20, 7, seeded)[0] for tokens in inputs]
    small = Runner(str(checkpoint), device="cpu", block_size=2)
    assert together == alone == generate(small, inputs, 20, 5, seeded)
    other = SamplingParams(temperature=0.8, top_k=30, top_p=0.95, seed=12)
    assert generate(runner, inputs, 20, 1000, other) != together


def test_block_copies_come_before_the_forward(checkpoint) -> None:
    """A sequence moved to copied blocks in the middle goes on as if nothing had happened."""
    runner = Runner(str(checkpoint), device="cpu", block_size=4)
    (tokens,) = prompts(96, 10)
    (expected,) = generate(runner, [tokens], 6, 100)
    runner.allocate_kv(16)
    sequence = Sequence(0, tokens, [1, 2, 3, 4])
    step(runner, [(sequence, 100)])
    sequence.table = [9, 8, 7, 4]
    share = sequence.share(1)
    sequence.tokens += runner.execute(StepPlan((share,), copies=((1, 9), (2, 8), (3, 7)))).tokens
    while len(sequence.generated) < 6:
        step(runner, [(sequence, 1)])
    assert sequence.generated == expected


def test_a_plan_without_samples_gives_no_tokens(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu")
    runner.allocate_kv(4)
    sequence = Sequence(0, prompts(96, 10)[0], [1])
    step(runner, [(sequence, 4)])
    assert sequence.generated == []
    assert runner.execute(StepPlan(())).tokens == []
    assert runner.execute(StepPlan((), copies=((0, 1),))).tokens == []


def test_a_sequence_beyond_its_block_table_is_refused(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu", block_size=4)
    runner.allocate_kv(8)
    long, short = Sequence(0, [5] * 8, [1, 2]), Sequence(1, [5] * 8, [3])
    with pytest.raises(ValueError, match=r"(block_tables\[1\] is -1|slots\[12\] is -4)"):
        step(runner, [(long, 8), (short, 8)])


def test_allocate_comes_first(checkpoint) -> None:
    with pytest.raises(RuntimeError, match="allocate_kv comes before submit"):
        Runner(str(checkpoint), device="cpu").execute(StepPlan(()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, not 'tpu'"),
        ({"device": "cpu", "dtype": "int4"}, "--dtype must be auto or one of float32, bfloat16"),
        ({"device": "cpu", "max_model_len": 257}, r"--max-model-len is 257, .* allow 1\.\.256"),
        ({"device": "cpu", "max_model_len": 0}, "--max-model-len is 0"),
    ],
)
def test_wrong_settings_are_named(arguments, message, checkpoint) -> None:
    with pytest.raises(ConfigError, match=message):
        Runner(str(checkpoint), **arguments)


def test_a_missing_gpu_is_named(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device is cuda, but no .*use --device cpu"):
        Runner(str(checkpoint), device="cuda")
    assert Runner(str(checkpoint)).device.type == "cpu"


def test_weights_that_do_not_fit_are_refused_before_allocation(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(runner_module, "available_host_bytes", lambda: 1000)
    with pytest.raises(DoesNotFitError, match=r"the weights take 0\.00 GiB as float32, but cpu"):
        Runner(str(checkpoint), device="cpu")


def test_a_pool_that_cannot_be_allocated_is_told(checkpoint) -> None:
    runner = Runner(str(checkpoint), device="cpu")
    with pytest.raises(DoesNotFitError, match=r"a KV pool of 1099511627776 blocks .*num-kv"):
        runner.allocate_kv(1 << 40)


def test_checks_come_before_any_weight_is_read(tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 49}))
    seen = []
    with pytest.raises(ModelError, match=r"gate_proj.weight has shape \[48, 32\], but config"):
        Runner(str(folder), device="cpu", progress=lambda phase, ratio: seen.append(phase))
    assert set(seen) == {"check"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max", "memory.current": "5"}, 4096 * 1024),
        ({"memory.max": "1000000", "memory.current": "400000"}, 600_000),
        (
            {
                "memory.max": "1000000",
                "memory.current": "900000",
                "memory.stat": "anon 1\ninactive_file 500000\n",
            },
            600_000,
        ),
        ({"memory/memory.limit_in_bytes": "70", "memory/memory.usage_in_bytes": "90"}, 0),
        ({}, 4096 * 1024),
    ],
)
def test_available_memory_is_the_container_s(files, expected, tmp_path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4096 kB\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_host_bytes(tmp_path / "cgroup", meminfo) == expected
