"""The decoder against transformers, and config.json against everything that can be wrong in it."""

import copy
import dataclasses
import json
import random
from pathlib import Path

import llama_checkpoints
import pytest
import torch

from octavo.checkpoint import read_checkpoint
from octavo.core.step import ScheduledSequence, StepPlan
from octavo.engine import tensors, weights
from octavo.engine.batch import build_batch
from octavo.errors import ModelError, OctavoError, UnsupportedModelError
from octavo.models.decoder import Decoder, empty_parameters
from octavo.models.hf_config import HfConfig, read_config, read_eos_token_ids
from octavo.models.parameters import parameter_shapes
from octavo.models.registry import family_of
from octavo.models.spec import RopeSpec
from octavo.params import SamplingParams
from octavo_kernels import ops

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": None},
    "own head_dim": {"head_dim": 20},
    "theta": {"rope_theta": 500000.0},
    "llama3, older keys": {"rope_scaling": LLAMA3, "rope_theta": 1e5},
    "llama3, newer keys": {"rope_parameters": {**LLAMA3, "rope_theta": 1e5}},
    "linear, oldest keys": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "newer dtype key": {"torch_dtype": None, "dtype": "float32"},
    "bfloat16 weights": {"torch_dtype": "bfloat16"},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = read_config(folder)
    family = family_of(config)
    spec = family.translate(config)
    entries, targets = read_checkpoint(folder), family.targets(spec)
    tensors.check_complete(entries, targets, family.ignored)
    parameters = empty_parameters(spec, dtype=dtype, device=CPU)
    weights.load(entries, targets, parameters, lambda done, total: None)
    return Decoder(spec, parameters, max_positions=spec.max_positions, device=CPU)


def logits(decoder: Decoder, prompt: list[int], chunk: int, block_size: int = 4) -> torch.Tensor:
    """Logits of every position, the prompt run in chunks over a backward block table."""
    spec = decoder.spec
    blocks = len(prompt) // block_size + 2
    shape = (spec.num_layers, 2, blocks, block_size, spec.num_kv_heads, spec.head_dim)
    dtype = decoder.parameters["norm"].dtype
    cache = torch.full(shape, float("nan"), dtype=dtype)
    rows = []
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        table = list(range(blocks))[::-1]
        sequence = ScheduledSequence(0, part, start, table, True, SamplingParams(), 0)
        batch = build_batch(StepPlan((sequence,)), block_size, CPU)
        batch = dataclasses.replace(batch, logit_rows=torch.arange(len(part)))
        rows.append(decoder.forward(batch, cache))
    return torch.cat(rows)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(changes, tmp_path) -> None:
    from transformers import LlamaForCausalLM

    values = llama_checkpoints.config(**changes)
    stored = getattr(torch, values.get("torch_dtype", "float32"))
    folder = llama_checkpoints.write(tmp_path / "model", values, dtype=stored)
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.randint(0, 96, (120,), generator=torch.Generator().manual_seed(1))
    decoder = load_decoder(folder)
    with torch.inference_mode():
        expected = oracle(prompt[None]).logits[0]
        for implementation in ops.implementations():
            for chunk in (120, 17):
                with ops.forced(implementation):
                    got = logits(decoder, prompt.tolist(), chunk)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# As on a GPU: neither few nor many rows; few in the tail alone; all few; many but for the tail.
@pytest.mark.parametrize(("few", "many"), [(0, 99), (2, 99), (20, 99), (2, 20)])
def test_the_last_layer_ends_with_the_rows_that_are_wanted(
    few, many, tmp_path, monkeypatch
) -> None:
    decoder = load_decoder(llama_checkpoints.write(tmp_path / "model"))
    plain = logits(decoder, list(range(20)), 20)
    decoder._few_rows, decoder._many_rows = few, many
    torch.testing.assert_close(logits(decoder, list(range(20)), 20), plain, rtol=1e-5, atol=1e-5)
    prompt = torch.randint(0, 96, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = logits(decoder, prompt, 20)
    spec = decoder.spec
    cache = torch.full((spec.num_layers, 2, 7, 4, spec.num_kv_heads, spec.head_dim), float("nan"))
    sequence = ScheduledSequence(0, prompt, 0, [6, 2, 5, 1, 3], True, SamplingParams(), 0)
    batch = build_batch(StepPlan((sequence,)), 4, CPU)
    multiplied = []
    real = ops.gated_linear

    def noted(x, *more, **named):
        multiplied.append(len(x))
        return real(x, *more, **named)

    monkeypatch.setattr(ops, "gated_linear", noted)
    for rows in ([19], [3, 19], [5, 0, 19]):
        wanted = dataclasses.replace(batch, logit_rows=torch.tensor(rows))
        torch.testing.assert_close(
            decoder.forward(wanted, cache), expected[rows], rtol=1e-5, atol=1e-5
        )
        if not few:
            assert multiplied == [20] * (spec.num_layers - 1) + [len(rows)]
        multiplied.clear()


def test_a_batch_is_checked_however_often_the_decoder_ran(tmp_path) -> None:
    decoder = load_decoder(llama_checkpoints.write(tmp_path / "model"))
    prompt = [5, 9, 2]
    for _ in range(2):
        first = logits(decoder, prompt, 3)
    spec = decoder.spec
    cache = torch.zeros((spec.num_layers, 2, 4, 4, spec.num_kv_heads, spec.head_dim))
    sequence = ScheduledSequence(0, prompt, 0, [1], True, SamplingParams(), 0)
    batch = build_batch(StepPlan((sequence,)), 4, CPU)
    wrong = dataclasses.replace(batch, seq_lens=batch.seq_lens.long())
    with pytest.raises(TypeError, match=r"paged_attention: seq_lens must be torch\.int32"):
        decoder.forward(wrong, cache)
    assert torch.equal(logits(decoder, prompt, 3), first)


@pytest.mark.parametrize("implementation", ops.implementations())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_narrow_types_stay_close_to_float32(dtype, limit, implementation, tmp_path) -> None:
    folder = llama_checkpoints.write(tmp_path / "model")
    prompt = torch.randint(0, 96, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with ops.forced(implementation), torch.inference_mode():
        wide = logits(load_decoder(folder), prompt, 60)
        narrow = logits(load_decoder(folder, dtype), prompt, 13)
    assert not torch.equal(wide, narrow)
    assert float((wide - narrow).std() / wide.std()) < limit


def test_every_parameter_is_a_target_once(tmp_path) -> None:
    """The targets tile the parameters: nothing is left unfilled, nothing written twice."""
    values = llama_checkpoints.config(attention_bias=True, mlp_bias=True)
    config = HfConfig("config.json", values)
    family = family_of(config)
    spec = family.translate(config)
    filled = {name: torch.zeros(shape) for name, shape in parameter_shapes(spec).items()}
    for target in family.targets(spec).values():
        filled[target.parameter].narrow(0, target.row, target.rows).add_(1)
    assert all(bool((tensor == 1).all()) for tensor in filled.values())
    assert {n: t.shape for n, t in family.targets(spec).items()} == llama_checkpoints.shapes(values)


def translate(**changes):
    config = HfConfig("config.json", llama_checkpoints.config(**changes))
    return family_of(config).translate(config)


def test_newer_and_older_rope_keys_mean_the_same() -> None:
    older = translate(rope_theta=5e5, rope_scaling=LLAMA3)
    assert older.layers == translate(rope_parameters={**LLAMA3, "rope_theta": 5e5}).layers
    assert older.layers[1].rope == RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 32)
    assert translate(rope_parameters={"rope_type": "default"}).layers[0].rope == RopeSpec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MistralLMHeadModel"]},
            r'architectures is \["MistralLMHeadModel"\], which is not supported; supported: .*'
            r"LlamaForCausalLM.* \(nearest: \w+\)",
        ),
        ({"hidden_act": "gelu_10"}, 'hidden_act is "gelu_10", which is not supported; .*: silu'),
        ({"quantization_config": {"quant_method": "awq"}}, 'quantization_config is "awq", which'),
        ({"quantization_config": {"quant_method": "mxfp4"}}, 'quantization_config is "mxfp4"'),
        ({"rope_scaling": {"rope_type": "3d", "factor": 2}}, 'rope_scaling: rope_type is "3d"'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "supported: default, linear, llama3"),
        ({"vision_config": {}}, r"multimodal .* \(it has vision_config\); .*nearest: LlamaForCaus"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            r"multimodal or encoder-decoder model .*\(nearest: Gemma3ForCausalLM\)",
        ),
        ({"torch_dtype": "float8_e4m3fn"}, 'torch_dtype is "float8_e4m3fn"'),
    ],
)
def test_what_is_not_served_is_named(changes, message) -> None:
    with pytest.raises(UnsupportedModelError, match=f"config.json: .*{message}|{message}"):
        translate(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "architectures must be a list like .*, not null"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, 'hidden_size must be an integer, not "32"'),
        ({"hidden_size": True}, "hidden_size must be an integer, not true"),
        ({"hidden_size": 33}, r"hidden_size \(33\) is no multiple of 4 attention heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor must be at mos"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, r"\(0.1\) of a head of 8 must be an"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers must be in 1\.\.1024"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a finite number above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number"),
        ({"attention_bias": "no"}, 'attention_bias must be true or false, not "no"'),
        ({"rope_scaling": []}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "must be above low_freq_factor"),
    ],
)
def test_what_no_model_has_is_named(changes, message) -> None:
    with pytest.raises(ModelError, match=message):
        translate(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing in .*; is this the model's folder"),
        (b"{", "config.json is not valid JSON"),
        (b"[1]", "config.json must hold a JSON object, not list"),
        (b"\xff\xfe{}", "config.json is not valid JSON"),
        (b"[" * 200_000, "config.json is not valid JSON"),
        (b" " * (9 << 20), "larger than 8 MiB"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(content, message, tmp_path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def test_a_path_that_is_no_folder_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        read_config(tmp_path / "nowhere")


def test_eos_ids_come_from_the_generation_config_first(tmp_path) -> None:
    config = HfConfig("config.json", {"eos_token_id": 2})
    assert read_eos_token_ids(tmp_path, config, 10) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3, 7]}')
    assert read_eos_token_ids(tmp_path, config, 10) == (7, 3)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_eos_token_ids(tmp_path, config, 10) == (2,)
    assert read_eos_token_ids(tmp_path, HfConfig("config.json", {}), 10) == ()
    for wrong in (10, -1, "2", [2, None], True):
        bad = HfConfig("config.json", {"eos_token_id": wrong})
        with pytest.raises(ModelError, match=r"eos_token_id must be an id in 0\.\.9"):
            read_eos_token_ids(tmp_path, bad, 10)


STRANGE = [
    None, True, -1, 0, 1, 3, 2**31, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), "", "silu",
    "linear", "x" * 10_000, [], [None], ["LlamaForCausalLM"], {}, {"rope_type": "llama3"},
    {"type": 3}, {"factor": None}, [[]],
]  # fmt: skip


def test_a_mutated_config_is_read_or_refused_and_never_crashes() -> None:
    rng = random.Random(7)
    base = llama_checkpoints.config(rope_scaling=LLAMA3, attention_bias=True, head_dim=8)
    keys = [*base, "rope_parameters", "dtype", "hidden_act", "rope_theta", "quantization_config"]
    outcomes, texts = set(), []
    for _ in range(1500):
        values = json.loads(json.dumps(base))
        for key in rng.sample(keys, rng.randint(1, 3)):
            values[key] = copy.deepcopy(rng.choice(STRANGE))
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"][rng.choice(list(LLAMA3))] = copy.deepcopy(rng.choice(STRANGE))
        config = HfConfig("config.json", values)
        try:
            spec = family_of(config).translate(config)
        except OctavoError as error:
            outcomes.add(type(error))
            texts.append(str(error))
        else:
            outcomes.add(None)
            assert spec.num_heads % spec.num_kv_heads == 0
    assert outcomes == {None, ModelError, UnsupportedModelError}
    assert all(text.startswith("config.json: ") and len(text) < 400 for text in texts)
