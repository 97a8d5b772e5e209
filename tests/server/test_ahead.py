"""Weights that are on their way before torch is there: the same bytes, or the ordinary way."""

import itertools
import json
import os
import subprocess
import sys
import time
import weakref

import llama_checkpoints
import pytest
import tiny_models
import torch
from gpu import needs_gpu_kernels, needs_gpu_module
from safetensors.torch import load_file, save_file

from octavo.config import EngineConfig
from octavo.engine import ahead
from octavo.engine.model import check_model
from octavo.engine.runner import Runner
from octavo.engine.startup import Reporter, start
from octavo.errors import ConfigError, ModelError
from octavo_kernels.cuda_upload import upload

CUDA = torch.device("cuda", 0)
PATIENCE_S = 20.0


class Memory:
    """Stands for the GPU's: what is to be sent there is read when it is waited for."""

    def __init__(self, paths, pieces, total, readers):
        self.paths, self.pieces, self.left = paths, pieces, list(pieces)
        self.bytes = torch.full((total,), 0xFF, dtype=torch.uint8)
        self.readers = readers
        self.done = 0

    def wait(self, seconds):
        if self.left:
            number, offset, to, count = self.left.pop(0)
            with open(self.paths[number], "rb") as file:
                file.seek(offset)
                found = file.read(count)
            self.bytes[to : to + count] = torch.frombuffer(bytearray(found), dtype=torch.uint8)
            self.done += count
        return not self.left


class Broken(Memory):
    def wait(self, seconds):
        raise RuntimeError("cudaMalloc: cudaErrorMemoryAllocation")


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(ahead, "upload", Memory)
    monkeypatch.setattr(torch, "as_tensor", lambda sent, device: sent.bytes)


def config(folder, **settings):
    return EngineConfig(model=str(folder), **settings)


def ordinary(folder, dtype):
    """The parameters as `weights.load` brings them."""
    model = check_model(folder)
    device = torch.device("cpu")
    return model.load(getattr(torch, dtype), device, 64, lambda *_: None).parameters


def same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mixtral", "qwen2_moe", "gpt2", "gemma2", "gpt_neox", "gpt_oss"]
)
def test_every_parameter_is_what_loading_makes_of_it(name, tmp_path, memory) -> None:
    tiny = tiny_models.TINY[name]
    folder = tiny_models.write(tiny, tiny_models.model_of(tiny), tmp_path)
    begun = ahead.begin(config(folder, dtype="float32"))
    seen = []
    found = begun.finish(CUDA, "float32", lambda *at: seen.append(at))
    same(found, ordinary(folder, "float32"))
    total = sum(entry.num_bytes for entry in _wanted(begun).values())
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen
    for tensor in found.values():
        assert tensor.data_ptr() % 16 == found["embedding"].data_ptr() % 16


def _wanted(begun):
    targets = begun.model.family.targets(begun.model.spec)
    return {name: begun.model.entries[name] for name in targets}


def test_shards_in_the_model_s_own_type(tmp_path, memory) -> None:
    values = llama_checkpoints.config(torch_dtype="bfloat16", attention_bias=True)
    folder = llama_checkpoints.write(tmp_path, values, dtype=torch.bfloat16, shards=3)
    begun = ahead.begin(config(folder))
    assert not begun.plan.left
    assert len(begun.plan.paths) == 3
    ends = sorted((to, to + count) for _, _, to, count in begun.plan.pieces)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends)), "none overlaps another"
    same(begun.finish(CUDA, "bfloat16", lambda *_: None), ordinary(folder, "bfloat16"))


def test_tensors_of_another_type_are_cast_as_ever(tmp_path, memory) -> None:
    values = llama_checkpoints.config(torch_dtype="bfloat16")
    folder = llama_checkpoints.write(tmp_path, values, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    norms = {name: part.float() for name, part in tensors.items() if name.endswith("norm.weight")}
    save_file(tensors | norms, folder / "model.safetensors")
    begun = ahead.begin(config(folder))
    assert sorted(begun.plan.left) == sorted(norms)
    same(begun.finish(CUDA, "bfloat16", lambda *_: None), ordinary(folder, "bfloat16"))


def test_where_there_is_nothing_to_gain_nothing_begins(tmp_path, memory, monkeypatch) -> None:
    folder = llama_checkpoints.write(tmp_path)
    assert ahead.begin(config(folder, device="cpu")) is None
    assert ahead.begin(config(folder, load_format="dummy")) is None
    assert ahead.begin(config(folder, dtype="float16")) is None, "all is to be cast"
    monkeypatch.setattr(ahead, "upload", lambda *_: None)
    assert ahead.begin(config(folder)) is None, "the GPU module is not built"
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Foreign"]}))
    assert ahead.begin(config(folder)) is None, "transformers' business"


def test_a_broken_checkpoint_is_named_before_torch_is_there(tmp_path, memory) -> None:
    folder = llama_checkpoints.write(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        ahead.begin(config(folder))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:0", "bfloat16")])
def test_weights_that_went_elsewhere_are_not_taken(device, dtype, tmp_path, memory) -> None:
    begun = ahead.begin(config(llama_checkpoints.write(tmp_path)))
    assert begun.finish(torch.device(device), dtype, lambda *_: None) is None


@pytest.mark.parametrize(("gpu", "begins"), [(0, True), (1, False)])
def test_a_program_that_chose_another_gpu_keeps_the_first_free(
    gpu, begins, tmp_path, memory, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu)
    begun = ahead.begin(config(llama_checkpoints.write(tmp_path)))
    assert (begun is not None) == begins


def test_a_gpu_that_torch_cannot_use_is_named_by_who_needs_it(
    tmp_path, memory, monkeypatch
) -> None:
    def forked() -> int:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", forked)
    assert ahead.begin(config(llama_checkpoints.write(tmp_path))) is None


def test_a_start_that_fails_gives_the_memory_back_at_once(tmp_path, monkeypatch) -> None:
    """Also while somebody keeps the error, and with it all that its frames hold."""
    made = []

    def upload(*args):
        sent = Memory(*args)
        made.append(weakref.ref(sent))
        return sent

    monkeypatch.setattr(ahead, "upload", upload)
    with pytest.raises(ConfigError, match="max-model-len") as kept:
        start(config(llama_checkpoints.write(tmp_path), max_model_len=10**6), Reporter(lambda _: 0))
    assert kept.tb is not None
    assert [sent() for sent in made] == [None]


def test_what_goes_wrong_is_left_to_the_ordinary_way(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(ahead, "upload", Broken)
    begun = ahead.begin(config(llama_checkpoints.write(tmp_path)))
    assert begun.finish(CUDA, "float32", lambda *_: None) is None
    assert "cudaErrorMemoryAllocation" in caplog.text
    assert begun._upload is None, "the memory is given back before it is taken again"


@pytest.mark.parametrize(("cpus", "readers"), [(1, 2), (4, 3), (64, 12)])
def test_a_core_is_left_for_the_import(cpus, readers, tmp_path, memory, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "cpu_limit", lambda: cpus)
    begun = ahead.begin(config(llama_checkpoints.write(tmp_path)))
    assert begun._upload.readers == readers


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_start_without_a_gpu_is_as_ever(tmp_path) -> None:
    """With the real module, whose threads find no driver."""
    folder = llama_checkpoints.write(tmp_path)
    _, ready = start(config(folder, device="auto", num_kv_blocks=8), Reporter(lambda _: None))
    assert ready.num_kv_blocks == 8


def test_nothing_here_brings_torch() -> None:
    code = "import sys, octavo.engine.ahead; print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.stdout.split() == ["False", "False"]


# The compiled module.


def outcome(sent):
    end = time.monotonic() + PATIENCE_S
    while not sent.wait(0.05):
        assert time.monotonic() < end
    return sent


@needs_gpu_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_error_is_told_when_it_is_waited_for(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    sent = upload([str(tmp_path / "file")], [(0, 0, 0, 3)], 512, 2)
    with pytest.raises(RuntimeError, match="cuda"):
        outcome(sent)
    assert sent.done == 0


@needs_gpu_module
@pytest.mark.parametrize("piece", [(1, 0, 0, 3), (-1, 0, 0, 3), (0, -1, 0, 3), (0, 0, 510, 3)])
def test_pieces_outside_of_files_and_memory_are_refused(piece, tmp_path) -> None:
    with pytest.raises(ValueError, match="outside"):
        upload([str(tmp_path / "file")], [piece], 512, 2)


@needs_gpu_kernels
@pytest.mark.parametrize("readers", [1, 12])
def test_a_gpu_gets_the_bytes_and_a_tensor_is_those(readers, tmp_path) -> None:
    generator = torch.Generator().manual_seed(3)
    content = torch.randint(256, (23_000_001,), dtype=torch.uint8, generator=generator)
    (tmp_path / "a").write_bytes(content[:20_000_001].numpy().tobytes())
    (tmp_path / "b").write_bytes(content[20_000_001:].numpy().tobytes())
    pieces = [(0, 1, 512, 20_000_000), (1, 0, 20_001_024, 3_000_000), (1, 5, 23_001_088, 0)]
    paths = [str(tmp_path / name) for name in "ab"]
    sent = outcome(upload(paths, pieces, 23_001_600, readers))
    assert sent.done == 23_000_000
    memory = torch.as_tensor(sent, device=CUDA)
    assert memory.data_ptr() == sent.__cuda_array_interface__["data"][0], "no copy"
    del sent  # the tensor keeps it
    assert torch.equal(memory[512:20_000_512].cpu(), content[1:20_000_001])
    assert torch.equal(memory[20_001_024:23_001_024].cpu(), content[20_000_001:])


@needs_gpu_kernels
def test_a_gpu_s_memory_comes_back(tmp_path) -> None:
    """Two at a time would not fit; every second one fails: its file ends early."""
    (tmp_path / "file").write_bytes(bytes(3))
    size = int(torch.cuda.mem_get_info()[0] * 0.6)
    for offset in (0, 2, 0, 2, 0):
        sent = upload([str(tmp_path / "file")], [(0, offset, 0, 3)], size, 2)
        assert end_of(sent) == ("read: the file ends early" if offset else None)
        del sent


def end_of(sent):
    """The text of what went wrong; the error itself would keep what it is about."""
    try:
        outcome(sent)
    except RuntimeError as error:
        return str(error)
    return None


@needs_gpu_kernels
def test_a_gpu_s_model_is_the_same_by_both_ways(tmp_path) -> None:
    values = llama_checkpoints.config(torch_dtype="bfloat16", hidden_size=256, head_dim=64)
    folder = llama_checkpoints.write(tmp_path, values, dtype=torch.bfloat16, shards=2)
    phases = []
    runner = Runner(
        str(folder), progress=lambda *at: phases.append(at), ahead=ahead.begin(config(folder))
    )
    assert runner.device.type == "cuda"
    same(runner._decoder.parameters, ordinary(folder, "bfloat16"))
    storages = {p.untyped_storage().data_ptr() for p in runner._decoder.parameters.values()}
    assert len(storages) == 1, "one piece of memory: they came ahead"
    assert ("weights", 1.0) in phases
