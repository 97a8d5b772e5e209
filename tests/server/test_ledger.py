"""`octavo plan`: figures from headers alone, remedies that work, and the engine's truth."""

import json
import os
import shlex
import struct
from dataclasses import replace
from pathlib import Path

import llama_checkpoints
import pytest
import tiny_models
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo import cli, ledger, plan
from octavo.engine.runner import Runner
from octavo.errors import ExitCode, ModelError
from octavo.ledger import GPU_MIB, Request, make_ledger
from octavo.model_shape import ModelShape, read_shape
from octavo.plan import GIB, MIB

TINY = Path(__file__).resolve().parents[2] / "e2e/tinymodel/model"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def write_headers(folder: Path, values: dict, dtype: str = "BF16") -> Path:
    """A checkpoint of which only the header is written: the rest is a hole in the file."""
    header, at = {}, 0
    for name, shape in llama_checkpoints.shapes(values).items():
        end = at + torch.Size(shape).numel() * 2
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def llama(tmp_path):
    return write_headers(tmp_path, LLAMA_8B)


def planned(capsys, *words: str) -> tuple[int, dict]:
    code = cli.main(["plan", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_llama_3_1_8b_on_an_h100(llama, capsys):
    assert (llama / "model.safetensors").stat().st_size > 16e9
    used = os.stat(llama / "model.safetensors").st_blocks * 512
    assert used < MIB, "a hole in the file, so that nothing but the header can have been read"
    code, found = planned(capsys, str(llama), "--gpu", "h100")
    assert code == ExitCode.OK
    assert found["weights_bytes"] == 2 * 8_030_261_248  # the published number of parameters
    assert found["bytes_per_block"] == 2 * MIB
    assert found["total_bytes"] == 81559 * MIB
    rest = found["usable_bytes"] - found["weights_bytes"]
    rest -= found["activation_bytes"] + found["workspace_bytes"] + found["graph_bytes"]
    assert 0 <= rest - 2 * MIB - found["kv_bytes"] < 2 * MIB
    assert found["full_length_sequences"] == found["num_blocks"] // (131072 // 16) == 3
    assert (found["fits"], found["would_fit_with"]) == (True, [])


def test_what_does_not_fit_says_which_setting_would(llama, capsys):
    code, found = planned(capsys, str(llama), "--gpu", "l4")
    assert code == ExitCode.CONFIG
    assert not found["fits"]
    for way in found["would_fit_with"]:
        words = shlex.split(way)
        base = [] if words[0] == "--gpu" else ["--gpu", "l4"]
        code, then = planned(capsys, str(llama), *base, *words)
        assert code == ExitCode.OK, way
        assert then["fits"]
    assert [way.split()[0] for way in found["would_fit_with"]] == ["--max-model-len", "--gpu"]
    assert found["would_fit_with"][1] == "--gpu a100-40"


def test_the_text_has_every_line(llama, capsys):
    assert cli.main(["plan", str(llama), "--gpu", "h100"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{llama} (LlamaForCausalLM, bfloat16) on h100"
    assert [line.split()[0] for line in lines[1:6]] == [
        "usable", "weights", "activations", "workspace", "graphs"
    ]  # fmt: skip
    assert lines[2] == "  weights         14.96 GiB"
    assert lines[6].startswith("  KV blocks")
    assert lines[7] == "fits: 3 sequences of 131072 tokens at once"
    assert cli.main(["plan", str(llama), "--gpu-memory", "8"]) == ExitCode.CONFIG
    text = capsys.readouterr().out
    assert "does not fit: no sequence of 131072 tokens can run" in text
    assert "would fit with: --gpu " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "invalid choice: 'h1000'"),
        ([], "one of the arguments --gpu --gpu-memory is required"),
        (["--gpu", "h100", "--block-size", "0"], "--block-size must be in 1..256"),
        (["--gpu", "h100", "--max-model-len", "1"], "--max-model-len must be in 2.."),
        (["--gpu-memory", "nan"], "--gpu-memory must be in"),
    ],
)
def test_wrong_flags_are_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_TERMINATION_LOG", str(tmp_path / "log"))
    assert cli.main(["plan", str(TINY), *words]) == ExitCode.CONFIG
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OCTAVO_TERMINATION_LOG", str(tmp_path / "log"))
    assert cli.main(["plan", str(tmp_path), "--gpu", "h100"]) == ExitCode.CONFIG
    assert "config.json is missing; is this the model's folder?" in capsys.readouterr().err


shapes = st.builds(
    ModelShape,
    architecture=st.just("X"),
    num_layers=st.integers(1, 80),
    hidden_size=st.integers(64, 16384),
    intermediate_size=st.integers(64, 65536),
    num_heads=st.integers(1, 128),
    num_kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from([64, 80, 128, 256]),
    vocab_size=st.integers(100, 300_000),
    max_positions=st.integers(16, 131072),
    dtype=st.just("bfloat16"),
    tied_embeddings=st.booleans(),
    windows=st.just(()),
).flatmap(
    lambda shape: st.lists(
        st.sampled_from([None, 128, 4096]), min_size=shape.num_layers, max_size=shape.num_layers
    ).map(lambda windows: replace(shape, windows=tuple(windows)))
)
requests = st.builds(
    Request,
    total_bytes=st.integers(1, 200).map(lambda n: n * GIB),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    max_model_len=st.integers(2, 131072),
    max_num_seqs=st.integers(1, 1024),
    max_num_batched_tokens=st.integers(1, 16384),
    block_size=st.sampled_from([1, 16, 128]),
    gpu_memory_utilization=st.floats(0.1, 1),
)


@settings(max_examples=300, deadline=None)
@given(shapes, requests, st.integers(MIB, 150 * GIB))
def test_every_remedy_works(shape, request, weights):
    by_dtype = {"bfloat16": weights, "float32": 2 * weights}
    found = make_ledger(shape, by_dtype[request.dtype], request)
    spent = found.weights_bytes + found.activation_bytes + found.workspace_bytes + found.kv_bytes
    spent += found.graph_bytes
    assert found.num_blocks == 0 or spent <= found.usable_bytes
    assume(not found.fits)
    for way in ledger.remedies(shape, by_dtype, request):
        words, changes = way.split(), {}
        for flag, value in zip(words[::2], words[1::2], strict=True):
            field = flag.removeprefix("--").replace("-", "_")
            if field == "gpu":
                changes["total_bytes"] = GPU_MIB[value] * MIB
            else:
                changes[field] = type(getattr(request, field))(value)
        changed = replace(request, **changes)
        assert make_ledger(shape, by_dtype[changed.dtype], changed).fits, way


CONFIGS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 24},
    {"num_key_value_heads": None},
]


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_takes_what_the_plan_says(changes, dtype, tmp_path):
    """Weights and KV pool of the real engine on the CPU, within 3%."""
    folder = llama_checkpoints.write(tmp_path, llama_checkpoints.config(**changes))
    check_against_engine(folder, dtype)


@pytest.mark.skipif(not TINY.is_dir(), reason="the tiny model is not there")
def test_the_engine_takes_what_the_plan_says_on_the_tiny_model():
    check_against_engine(TINY, "float32")


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_every_family_is_measured(name, tmp_path):
    tiny = tiny_models.TINY[name]
    check_against_engine(tiny_models.write(tiny, tiny_models.model_of(tiny), tmp_path), "float32")


@pytest.mark.parametrize(("wrong", "says"), [(1.0, 0), (1.02, 0), (1.2, 1), (0.8, 1)])
def test_a_running_engine_says_when_the_plan_is_wrong(wrong, says, tmp_path, monkeypatch, caplog):
    folder = llama_checkpoints.write(tmp_path, llama_checkpoints.config())
    real = plan.weights_bytes
    monkeypatch.setattr(plan, "weights_bytes", lambda *a, **k: int(real(*a, **k) * wrong))
    runner = Runner(str(folder), device="cpu", num_threads=1)
    runner.allocate_kv(2)
    found = [r.message for r in caplog.records if "memory plan says" in r.message]
    assert len(found) == says


def check_against_engine(folder, dtype):
    shape = read_shape(folder)
    runner = Runner(str(folder), device="cpu", dtype=dtype, num_threads=1)
    runner.allocate_kv(65)
    weights = sum(tensor.nbytes for tensor in runner._decoder.parameters.values())
    promised = plan.weights_bytes(folder, dtype, tied=shape.tied_embeddings)
    assert weights == pytest.approx(promised, rel=0.03)
    request = Request(8 * GIB, dtype, shape.max_positions)
    found = make_ledger(shape, promised, request)
    assert found.bytes_per_block == runner.kv_bytes_per_block
    assert runner._steps._kv_cache.nbytes == pytest.approx(65 * found.bytes_per_block, rel=0.03)
    assert shape.max_positions == runner.max_model_len
    assert shape.vocab_size == runner.vocab_size


def test_windows_let_more_sequences_in(tmp_path, capsys):
    """Gemma 2's shape: every other layer keeps 4096 tokens of 131072."""
    values = {**LLAMA_8B, "num_hidden_layers": 26}
    write_headers(tmp_path, values)
    _, full = planned(capsys, str(tmp_path), "--gpu", "h100")
    shape = read_shape(tmp_path)
    assert set(shape.windows) == {None}
    request = Request(full["total_bytes"], "bfloat16", 131072)
    windowed = replace(shape, windows=(4096, None) * 13)
    found = make_ledger(windowed, full["weights_bytes"], request)
    assert (found.kv_groups, found.layers_per_block, found.padding_bytes) == (2, 13, 0)
    assert found.bytes_per_block == full["bytes_per_block"] // 2
    assert (full["full_length_sequences"], found.full_length_sequences) == (4, 8)
    assert ledger.largest_step(shape, request) == 8192
    assert ledger.largest_step(windowed, request) == 2048, "no memory for steps that never come"
    text = ledger.as_text("title", make_ledger(
        replace(shape, windows=(512,) * 29 + (None,) * 5), full["weights_bytes"], request
    ), [])  # fmt: skip
    assert "of these without a layer: 7 groups of 5 layers" in text


def test_shapes_under_other_families_names(tmp_path):
    def shape(**values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_shape(tmp_path)

    gpt2 = shape(n_layer=12, n_embd=768, n_head=12, n_positions=1024, vocab_size=50257)
    assert (gpt2.num_layers, gpt2.head_dim, gpt2.num_kv_heads) == (12, 64, 12)
    assert (gpt2.intermediate_size, gpt2.max_positions, gpt2.dtype) == (3072, 1024, "float32")
    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 9}
    assert shape(text_config=text, dtype="torch.bfloat16").hidden_size == 64
    for wrong, message in [
        ({}, "hidden_size is missing"),
        ({**text, "hidden_size": -1}, "hidden_size must be a positive integer, not -1"),
        ({**text, "vocab_size": "9"}, "vocab_size must be a positive integer"),
        ({**text, "dtype": "int3"}, "dtype is 'int3'"),
    ]:
        with pytest.raises(ModelError, match=message):
            shape(**wrong)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="not valid JSON"):
        read_shape(tmp_path)
