"""Every family against transformers' own class: logits, greedy tokens, and what is refused."""

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

from octavo.checkpoint import TensorEntry, read_checkpoint
from octavo.core.block_pool import NO_BLOCK
from octavo.core.step import ScheduledSequence, StepPlan
from octavo.engine import tensors, weights
from octavo.engine.batch import build_batch
from octavo.errors import ModelError, OctavoError, UnsupportedModelError
from octavo.kv_layout import KvGroups
from octavo.model_shape import read_shape
from octavo.models.decoder import Decoder, empty_parameters
from octavo.models.hf_config import HfConfig, read_config
from octavo.models.parameters import parameter_shapes
from octavo.models.registry import FAMILIES, family_of
from octavo.models.rope import rope_table
from octavo.params import SamplingParams
from octavo_kernels import ops

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/models.md"
CPU = torch.device("cpu")
BLOCK = 16
ZERO = torch.zeros(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_decoder(folder: Path) -> Decoder:
    config = read_config(folder)
    family = family_of(config)
    spec = family.translate(config)
    entries = tensors.with_prefix(read_checkpoint(folder), family.prefix)
    targets = family.targets(spec)
    tensors.check_complete(entries, targets, family.ignored)
    parameters = empty_parameters(spec, dtype=torch.float32, device=CPU)
    weights.load(entries, targets, parameters, lambda done, total: None)
    return Decoder(spec, parameters, max_positions=spec.max_positions, device=CPU)


class Session:
    """One sequence on blocks of its own, fed a chunk at a time.

    Before a chunk runs, each windowed group loses the blocks that lie behind its window, and what
    was in them becomes NaN.
    """

    def __init__(self, decoder, length: int) -> None:
        spec, self.decoder, self.fed = decoder.spec, decoder, 0
        layout = spec.kv_layout(spec.max_positions)
        self.kv = KvGroups(BLOCK, layout.windows)
        blocks = (length // BLOCK + 2) * self.kv.count
        shape = (layout.layers_per_group, 2, blocks, BLOCK, spec.num_kv_heads, spec.head_dim)
        self.cache = torch.full(shape, float("nan"))
        self.table = list(range(blocks))[::-1]

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Logits of all the tokens."""
        for group, window in self.kv.sliding:
            for row in range(self.kv.behind(window, self.fed)):
                entry = row * self.kv.count + group
                if self.table[entry] != NO_BLOCK:
                    self.cache[:, :, self.table[entry]] = float("nan")
                    self.table[entry] = NO_BLOCK
        sequence = ScheduledSequence(0, tokens, self.fed, self.table, True, SamplingParams(), 0)
        batch = build_batch(StepPlan((sequence,)), BLOCK, CPU, self.kv.count)
        batch = dataclasses.replace(batch, logit_rows=torch.arange(len(tokens)))
        self.fed += len(tokens)
        return self.decoder.logits(self.decoder.hidden(batch, self.cache))


def logits(decoder, tokens: list[int], chunk: int) -> torch.Tensor:
    session = Session(decoder, len(tokens))
    return torch.cat([session.feed(tokens[at : at + chunk]) for at in range(0, len(tokens), chunk)])


def greedy(decoder, prompt: list[int], count: int) -> list[int]:
    session, tokens = Session(decoder, len(prompt) + count), []
    step = prompt
    while len(tokens) < count:
        tokens.append(int(session.feed(step)[-1].argmax()))
        step = tokens[-1:]
    return tokens


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_family(name, tmp_path) -> None:
    """Logits within 1e-4, whole and in chunks, and 64 greedy tokens; by the native kernels."""
    tiny = tiny_models.TINY[name]
    oracle = tiny_models.model_of(tiny)
    decoder = load_decoder(tiny_models.write(tiny, oracle, tmp_path))
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, tiny_models.VOCAB, (90,), generator=generator)
    before = ops.calls.copy()
    with torch.inference_mode():
        expected = oracle(prompt[None]).logits[0]
        assert expected.std() > 0.1
        for chunk in (90, 13):
            got = logits(decoder, prompt.tolist(), chunk)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        with ops.forced("reference"):
            got = logits(decoder, prompt.tolist(), 50)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        start = prompt[None, :30]
        ids = oracle.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=64,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert greedy(decoder, start[0].tolist(), 64) == ids[0, 30:].tolist()
    if "cpu" in ops.implementations():
        ran = ops.calls - before
        forwards = 1 + 7 + 64
        assert ran["paged_attention", "cpu"] == forwards * decoder.spec.num_layers
        assert ran["write_kv", "cpu"] == forwards * decoder.spec.num_layers


def config_of(name: str, **changes) -> HfConfig:
    tiny = tiny_models.TINY[name]
    return HfConfig("config.json", {**tiny_models.config_values(tiny), **tiny.hub, **changes})


def test_a_checkpoint_may_leave_out_the_prefix(tmp_path) -> None:
    """GPT-2 as published: no "transformer." before the names, and masks beside the weights."""
    from safetensors.torch import load_file, save_file

    tiny = tiny_models.TINY["gpt2"]
    oracle = tiny_models.model_of(tiny)
    folder = tiny_models.write(tiny, oracle, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert short.keys().isdisjoint(tensors)
    short["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = list(range(3, 40))
    decoder = load_decoder(folder)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
        got = logits(decoder, tokens, 40)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_every_parameter_is_filled_once(name) -> None:
    """The targets tile the parameters, arranged ones by the shape they are turned into."""
    config = config_of(name)
    family = family_of(config)
    spec = family.translate(config)
    filled = {part: torch.zeros(shape) for part, shape in parameter_shapes(spec).items()}
    for target in family.targets(spec).values():
        rows = filled[target.parameter].narrow(0, target.row, target.rows)
        tensor = torch.ones(target.shape)
        rows += tensor if target.arrange is None else target.arrange(tensor)
    assert all(bool((tensor == 1).all()) for tensor in filled.values())


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_the_memory_plan_sees_the_same_shape(name, tmp_path) -> None:
    """`octavo plan` reads config.json by itself; both must agree on what the cache holds."""
    config = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config.values))
    shape, spec = read_shape(tmp_path), family_of(config).translate(config)
    for field in ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "max_positions"):
        assert getattr(shape, field) == getattr(spec, field), field
    assert shape.windows == tuple(layer.window for layer in spec.layers)


def test_the_compatibility_check_needs_no_torch() -> None:
    program = (
        "import sys, octavo.models.registry as r; print(len(r.FAMILIES), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(len(FAMILIES)), "False"]


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_absent_keys_have_the_defaults_of_transformers(name) -> None:
    """A config without the keys that hold their class's defaults means the same model."""
    import transformers

    tiny = tiny_models.TINY[name]
    values = tiny_models.config_values(tiny)
    usual = getattr(transformers, tiny.config_class)().to_dict()
    kept = {"architectures", "dtype", "model_type", "layer_types"}
    short = {k: v for k, v in values.items() if k in kept or usual.get(k, ...) != v}
    assert len(short) < len(values)
    family = FAMILIES[tiny.architecture]
    expected = family.translate(HfConfig("config.json", values))
    assert family.translate(HfConfig("config.json", short)) == expected


def test_each_family_has_a_row_in_the_document_that_names_its_tests() -> None:
    rows = re.findall(r"^\| .*`(\w+)`.* \| `([^|]+)` \|$", DOCUMENT.read_text(), re.MULTILINE)
    named = {(architecture, test) for architecture, tests in rows for test in tests.split("`, `")}
    assert named == {(tiny.architecture, name) for name, tiny in tiny_models.TINY.items()}
    assert {architecture for architecture, _ in named} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is t"),
        (
            "llama yarn",
            {"rope_parameters": {**tiny_models.YARN, "rope_theta": 1.0}},
            "rope_theta must be above 1 for yarn, not 1.0",
        ),
        ("gpt2", {"n_embd": 255}, r"n_embd \(255\) is no multiple of 4 attention heads"),
        ("gpt2", {"activation_function": "quick"}, 'activation_function is "quick"'),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is false"),
        ("opt", {"word_embed_proj_dim": 128}, "word_embed_proj_dim is 128"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma3", {"layer_types": ["chunked"] * 4}, 'layer_types is "chunked"'),
        ("gemma3", {"layer_types": []}, "layer_types must be a list of 4 names"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is true"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("mixtral", {"num_experts_per_tok": 5}, r"num_experts_per_tok must be in 1\.\.4, not 5"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers must be a list"),
        (
            "smollm3",
            {"no_rope_layers": [1, 2]},
            "no_rope_layers must be a list of 4 zeros",
        ),
        ("mistral", {"sliding_window": 0}, r"sliding_window must be in 1\.\."),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, 'is "mxfp4", which is not'),
        (
            "phi3 longrope, within",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "short_factor must be a list of 24 numbers",
        ),
    ],
)
def test_what_a_family_does_not_serve_is_named(name, changes, message) -> None:
    config = config_of(name, **changes)
    with pytest.raises(OctavoError, match=f"config.json: .*{message}"):
        family_of(config).translate(config)


STRANGE = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**64, 10**400, 1.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), "", "silu", "yarn", "longrope", "x" * 10_000, [], [None], [1, 0],
    ["full_attention"], {}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "longrope"},
    {"full_attention": {"rope_type": "llama3"}}, {"full_attention": 3}, {"quant_method": None},
    [[]],
]  # fmt: skip


def mutate(rng: random.Random, values: dict, keys: list[str]) -> dict:
    changed = copy.deepcopy(values)
    for key in rng.sample(keys, rng.randint(1, 3)):
        section = changed.get(key)
        if isinstance(section, dict) and section and rng.random() < 0.7:
            section[rng.choice([*section, "factor", "rope_type"])] = rng.choice(STRANGE)
        elif rng.random() < 0.15:
            changed.pop(key, None)
        else:
            changed[key] = copy.deepcopy(rng.choice(STRANGE))
    return changed


def read_all(values: dict, entries: dict[str, TensorEntry]) -> None:
    """All that is done with a config and the headers of the weights, short of reading them."""
    config = HfConfig("config.json", values)
    family = family_of(config)
    spec = family.translate(config)
    assert spec.num_heads % spec.num_kv_heads == 0
    assert 0 <= spec.rotary_dim <= spec.head_dim
    assert all(layer.window is None or layer.window > 0 for layer in spec.layers)
    for rope in {layer.rope for layer in spec.layers if layer.rope is not None}:
        assert rope_table(rope, spec.rotary_dim, 8).shape == (8, spec.rotary_dim)
    if spec.num_layers <= 4 and (spec.moe is None or spec.moe.num_experts <= 64):
        targets = family.targets(spec)
        tensors.check_complete(entries, targets, family.ignored)
        Decoder(spec, dict.fromkeys(parameter_shapes(spec), ZERO), max_positions=8, device=CPU)


def fuzz(name: str, count: int) -> None:
    rng = random.Random(name)
    tiny = tiny_models.TINY[name]
    base = {**tiny_models.config_values(tiny), **tiny.hub}
    keys = [*base, "rope_scaling", "rope_theta", "partial_rotary_factor", "quantization_config",
            "layer_types", "hidden_act", "num_experts", "rotary_pct"]  # fmt: skip
    family = family_of(HfConfig("config.json", base))
    entries = {
        name: TensorEntry(Path("config.json: model.safetensors"), "F32", target.shape, 0, 0)
        for name, target in family.targets(family.translate(HfConfig("", base))).items()
    }
    outcomes, texts = set(), []
    for _ in range(count):
        values = mutate(rng, base, keys)
        try:
            read_all(values, entries)
        except OctavoError as error:
            outcomes.add(type(error))
            texts.append(str(error))
        else:
            outcomes.add(None)
    assert [text for text in texts if "config.json" not in text or len(text) > 1500] == []
    assert outcomes >= {None, ModelError}
    assert outcomes <= {None, ModelError, UnsupportedModelError}


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_a_mutated_config_is_read_or_refused_and_never_crashes(name) -> None:
    fuzz(name, 280)  # 36 models: 10,000 in all


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.TINY)
def test_many_mutated_configs(name) -> None:
    fuzz(name, 2800)
