"""Checkpoints: read completely and exactly, or refused with the file's name; never a crash."""

import contextlib
import itertools
import json
import random
import struct

import llama_checkpoints
import pytest
import torch
from gpu import needs_gpu
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from octavo.checkpoint import read_checkpoint, read_header
from octavo.engine import tensors, weights
from octavo.engine.model import check_model
from octavo.errors import ModelError, UnsupportedModelError
from octavo.model_shape import read_shape
from octavo.models.decoder import empty_parameters
from octavo.models.hf_config import read_config
from octavo.models.registry import family_of

CPU = torch.device("cpu")


def load(folder, dtype=torch.float32, progress=lambda done, total: None):
    config = read_config(folder)
    family = family_of(config)
    spec = family.translate(config)
    entries, targets = read_checkpoint(folder), family.targets(spec)
    tensors.check_complete(entries, targets, family.ignored)
    parameters = empty_parameters(spec, dtype=dtype, device=CPU)
    for tensor in parameters.values():
        tensor.fill_(float("nan"))
    weights.load(entries, targets, parameters, progress)
    return parameters


def test_fused_parameters_hold_their_parts_in_order(tmp_path) -> None:
    values = llama_checkpoints.config(attention_bias=True)
    parameters = load(llama_checkpoints.write(tmp_path, values))
    stored = load_file(tmp_path / "model.safetensors")
    at = "model.layers.1."
    qkv = [stored[f"{at}self_attn.{n}_proj.weight"] for n in "qkv"]
    assert torch.equal(parameters["layers.1.qkv"], torch.cat(qkv))
    biases = [stored[f"{at}self_attn.{n}_proj.bias"] for n in "qkv"]
    assert torch.equal(parameters["layers.1.qkv.bias"], torch.cat(biases))
    gate_up = [stored[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up")]
    assert torch.equal(parameters["layers.1.gate_up"], torch.cat(gate_up))
    assert torch.equal(parameters["lm_head"], stored["lm_head.weight"])
    assert not any(tensor.isnan().any() for tensor in parameters.values())


def test_shards_give_the_same_as_one_file(tmp_path) -> None:
    whole = load(llama_checkpoints.write(tmp_path / "one"))
    sharded = load(llama_checkpoints.write(tmp_path / "three", shards=3))
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_cast_while_loading(stored, wanted, tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path, dtype=stored)
    parameters = load(folder, wanted)
    expected = load_file(folder / "model.safetensors")["model.norm.weight"].to(wanted)
    assert torch.equal(parameters["norm"], expected)


def test_tensors_larger_than_a_chunk_and_progress_in_bytes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1001)
    folder = llama_checkpoints.write(tmp_path, dtype=torch.bfloat16)
    seen = []
    parameters = load(folder, progress=lambda done, total: seen.append((done, total)))
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(parameters["embedding"], stored["model.embed_tokens.weight"].float())
    total = sum(t.nbytes for t in stored.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(seen)]
    assert min(steps) > 0
    assert max(steps) <= 1001


def rewrite(folder, change) -> None:
    """Apply a change to the dict of tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_listed_ten_at_most(tmp_path) -> None:
    llama_checkpoints.write(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensor \(model\.norm\.weight\) that config"):
        load(tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if ".layers." in n])
    with pytest.raises(ModelError, match=r"lacks 19 tensors \(.* and 9 more\)"):
        load(tmp_path)


def test_surplus_tensors_are_refused_but_for_those_known_to_be_idle(tmp_path) -> None:
    values = llama_checkpoints.config(tie_word_embeddings=True)
    llama_checkpoints.write(tmp_path, values)
    idle = {
        "lm_head.weight": torch.zeros(96, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    rewrite(tmp_path, lambda t: t.update(idle))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.2.norm": torch.zeros(1)}))
    with pytest.raises(ModelError, match=r"holds 1 tensor \(model\.layers\.2\.norm\) that"):
        load(tmp_path)


def test_wrong_shape_and_type_are_named(tmp_path) -> None:
    llama_checkpoints.write(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[31\], .* \[32\]"):
        load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(32).char()}))
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight has dtype I8"):
        load(tmp_path)


def test_nothing_to_load_and_pickles_are_named(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .* safetensors files"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which Octavo never"):
        read_checkpoint(tmp_path)


def test_a_truncated_file_is_named(tmp_path) -> None:
    path = llama_checkpoints.write(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors.*truncated"):
            read_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_the_check_is_named(tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path)
    config = read_config(folder)
    family = family_of(config)
    spec = family.translate(config)
    entries = read_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    parameters = empty_parameters(spec, dtype=torch.float32, device=CPU)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        weights.load(entries, family.targets(spec), parameters, lambda done, total: None)
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: No such file"):
        weights.load(entries, family.targets(spec), parameters, lambda done, total: None)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "weight_map must be an object"),
        ([], "weight_map must be an object"),
        ({"a": "../model.safetensors"}, "not a plain file name inside the folder"),
        ({"a": "/etc/model.safetensors"}, "not a plain file name inside the folder"),
        ({"a": "sub/model.safetensors"}, "not a plain file name inside the folder"),
        ({"a": ".."}, "not a plain file name inside the folder"),
        ({"a": 3}, "not a plain file name inside the folder"),
        ({"a": "model.bin"}, "'model.bin' is not a .safetensors file"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors is missing in .*, but model\.safet"),
    ],
)
def test_an_index_that_leads_astray_is_refused(weight_map, message, tmp_path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    first = sorted(set(document["weight_map"].values()))[0]
    document["weight_map"] = dict.fromkeys(document["weight_map"], first)
    index.write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"00001-of-00002\.safetensors lacks tensor"):
        read_checkpoint(folder)


def file_of(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple = (1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "claims a header of 9223372036854775808 bytes"),
        (file_of(b"[]", b""), "not a JSON object"),
        (file_of(b"{", b""), "broken safetensors header"),
        (file_of(b"\xff{}", b""), "broken safetensors header"),
        (file_of(b'{"a":1,"a":2}', b""), "a name appears twice"),
        (file_of({"a": 1}, b""), "tensor 'a' is not described by an object"),
        (file_of({"a": entry(0, 4, "F31")}, b"1234"), "unknown dtype 'F31'"),
        (file_of({"a": entry(0, 4, shape=(-1,))}, b"1234"), "no valid shape"),
        (file_of({"a": entry(0, 4, shape=(True,))}, b"1234"), "no valid shape"),
        (file_of({"a": entry(4, 0)}, b"1234"), "no valid data_offsets"),
        (file_of({"a": entry(0, 8)}, b"12345678"), r"of type F32 and shape \[1\] does not take 8"),
        (file_of({"a": entry(0, 4)}, b"12"), "ends at byte .*truncated"),
        (file_of({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "'b' overlaps the one before"),
        (file_of({"a": entry(4, 8)}, b"12345678"), "'a' leaves a hole before it"),
        (file_of({"a": entry(0, 4)}, b"123456"), "holds 2 bytes after its last tensor"),
        (file_of({"a": entry(0, 0, shape=(2**62, 2**62, 0))}, b"x"), "holds 1 bytes after"),
    ],
)
def test_a_broken_header_is_named(content, message, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert "model.safetensors" in str(caught.value)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert or repeat some bytes, mostly where the header is."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:  # what was cut to nothing stays so
            break
        at = rng.randrange(min(len(changed), 420)) if rng.random() < 0.9 else len(changed) - 1
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] = rng.choice(b'0123456789-,:[]{}" eE.')
        elif kind == 2:
            del changed[at : at + rng.randint(1, 8)]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randint(1, 8)]
        else:
            changed = changed[: max(9, at)]
    return bytes(changed)


@pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_what_is_accepted_reads_as_the_format_s_own_library_reads_it(count, tmp_path) -> None:
    """Mutations: refused with the file's name, or accepted by the other reader too."""
    rng = random.Random(11)
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.arange(6).float().view(2, 3),
        "b": torch.zeros(0, 4, dtype=torch.bfloat16),
        "c.weight": torch.arange(7, dtype=torch.float16),
        "d": torch.ones(5, dtype=torch.int8),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    original = path.read_bytes()
    accepted, refusals = 0, []
    for _ in range(count):
        path.write_bytes(mutate(rng, original))
        try:
            entries = read_header(path)
        except ModelError as error:
            refusals.append(str(error))
            continue
        accepted += 1
        try:
            with safe_open(path, framework="pt") as theirs:
                assert set(theirs.keys()) == set(entries)
                for name, mine in entries.items():
                    assert tuple(theirs.get_slice(name).get_shape()) == mine.shape
                    assert theirs.get_slice(name).get_dtype() == mine.dtype
        except SafetensorError as error:
            pytest.fail(f"accepted what safetensors refuses ({error}): {path.read_bytes()!r}")
    assert accepted > count / 100
    assert len(refusals) > count / 2
    assert all(str(path) in text for text in refusals)


@pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_a_mutated_config_is_refused_by_name_or_means_a_model(count, tmp_path) -> None:
    """No mutation of config.json crashes the loader or the plan: an error names the file."""
    rng = random.Random(12)
    path = tmp_path / "config.json"
    original = json.dumps(llama_checkpoints.config()).encode()
    accepted, refusals = 0, []
    for _ in range(count):
        path.write_bytes(mutate(rng, original))
        try:
            config = read_config(tmp_path)
            family = family_of(config)
            family.translate(config)
            accepted += 1
        except ModelError as error:
            refusals.append(str(error))
        with contextlib.suppress(ModelError):
            read_shape(tmp_path)
    assert accepted > count / 100
    assert len(refusals) > count / 2
    assert all("config.json" in text for text in refusals)


def test_readers_meet_no_one_else_s_bytes(tmp_path, monkeypatch) -> None:
    """Many small pieces and more readers than cores, again and again the same."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 64)
    monkeypatch.setattr(weights, "READERS", 16)
    folder = llama_checkpoints.write(tmp_path, shards=3)
    first = load(folder)
    for _ in range(3):
        again = load(folder)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_random_weights_need_a_config_alone_and_come_from_the_seed(tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path / "model")
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text((folder / "config.json").read_text())

    def parameters(seed):
        model = check_model(config, random_seed=seed).load(torch.bfloat16, CPU, 64, lambda *_: None)
        return model.parameters

    first, again, other = parameters(1), parameters(1), parameters(2)
    assert first.keys() == load(folder).keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("norm"):
            assert tensor.eq(1).all()
        else:
            assert not torch.equal(tensor, other[name])
            assert 0.01 < tensor.float().std() < 0.03
    # No two parameters are the same noise.
    assert not torch.equal(first["embedding"], first["lm_head"])


def test_norms_that_add_one_get_zeros() -> None:
    parameters = {"norm": torch.empty(4), "layers.0.k_norm": torch.empty(4)}
    weights.randomize(parameters, 0, norm_offset=1.0)
    assert all(tensor.eq(0).all() for tensor in parameters.values())


@needs_gpu
def test_a_gpu_gets_the_same_bytes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "GPU_CHUNK_BYTES", 1000)  # many pieces for each buffer
    folder = llama_checkpoints.write(tmp_path, shards=3)
    config = read_config(folder)
    family = family_of(config)
    spec = family.translate(config)
    for dtype in (torch.float32, torch.bfloat16):
        parameters = empty_parameters(spec, dtype=dtype, device=torch.device("cuda"))
        entries, targets = read_checkpoint(folder), family.targets(spec)
        weights.load(entries, targets, parameters, lambda *_: None)
        expected = load(folder, dtype)
        assert all(torch.equal(parameters[name].cpu(), expected[name]) for name in expected)
