"""The transformers back end: the same proofs as a native family, and honest refusals."""

import json
import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from test_families import greedy, logits
from tiny_models import Tiny

from octavo.core.step import ScheduledSequence, StepPlan
from octavo.engine.model import CheckedModel, check_model
from octavo.engine.runner import Runner
from octavo.errors import ModelError, UnsupportedModelError
from octavo.params import SamplingParams
from octavo_kernels import ops

CPU = torch.device("cpu")
SERVED = {
    "apertus": Tiny("ApertusForCausalLM", "ApertusConfig"),
    "nemotron": Tiny("NemotronForCausalLM", "NemotronConfig"),
    "olmo3": Tiny("Olmo3ForCausalLM", "Olmo3Config", {"sliding_window": 20}),
    "phi": Tiny("PhiForCausalLM", "PhiConfig"),
    "exaone4": Tiny("Exaone4ForCausalLM", "Exaone4Config", {"sliding_window": 20}),
    "granite moe": Tiny("GraniteMoeForCausalLM", "GraniteMoeConfig", {"attention_multiplier": 0.1}),
    # native ones: sinks, softcaps, scaled logits go through it too
    "gpt_oss": tiny_models.TINY["gpt_oss"],
    "gemma2": tiny_models.TINY["gemma2"],
    "cohere2": tiny_models.TINY["cohere2"],
}
REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OursConfig(LlamaConfig):
    model_type = "ours"
class OursForCausalLM(LlamaForCausalLM):
    config_class = OursConfig
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_transformers(folder: Path, monkeypatch) -> CheckedModel:
    """The model as if no family were native."""
    monkeypatch.setattr("octavo.models.registry.FAMILIES", {})
    model = check_model(folder)
    assert model.family is None
    return model


@pytest.mark.parametrize("name", SERVED)
def test_served_like_a_native_family(name, tmp_path, monkeypatch, caplog) -> None:
    """Logits within 1e-4, whole and in chunks, and 64 greedy tokens; by the native kernels."""
    oracle = tiny_models.model_of(SERVED[name])
    folder = tiny_models.write(SERVED[name], oracle, tmp_path)
    with caplog.at_level(logging.WARNING, "octavo"):
        decoder = by_transformers(folder, monkeypatch).load(
            torch.float32, CPU, 256, lambda *_: None
        )
    assert "runs on the transformers back end, slower" in caplog.text
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, tiny_models.VOCAB, (90,), generator=generator)
    before = ops.calls["paged_attention", "cpu"]
    with torch.inference_mode():
        expected = oracle(prompt[None]).logits[0]
        for chunk in (90, 13):
            got = logits(decoder, prompt.tolist(), chunk)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        start = prompt[None, :30]
        ids = oracle.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=64,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert greedy(decoder, start[0].tolist(), 64) == ids[0, 30:].tolist()
    if "cpu" in ops.implementations():
        ran = ops.calls["paged_attention", "cpu"] - before
        assert ran == (1 + 7 + 64) * decoder.spec.num_layers


def test_the_runner_takes_it_where_there_is_no_family(tmp_path) -> None:
    oracle = tiny_models.model_of(SERVED["apertus"])
    folder = tiny_models.write(SERVED["apertus"], oracle, tmp_path)
    runner = Runner(str(folder), device="cpu")
    runner.allocate_kv(4)
    prompt = [5, 6, 7, 8]
    sequence = ScheduledSequence(0, prompt, 0, [2], True, SamplingParams(temperature=0), 0)
    result = runner.execute(StepPlan((sequence,)))
    expected = int(oracle(torch.tensor([prompt])).logits[0, -1].argmax())
    assert result.tokens == [expected]


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        (Tiny("BloomForCausalLM", "BloomConfig"), "does not let another attention take the place"),
        (Tiny("MambaForCausalLM", "MambaConfig"), "does not let another attention take the place"),
        (
            Tiny("Llama4ForCausalLM", "Llama4TextConfig"),
            "its layers are chunked_attention",
        ),
        (Tiny("BertModel", "BertConfig"), "transformers has no decoder of that name"),
    ],
    ids=lambda value: value.architecture if isinstance(value, Tiny) else "",
)
def test_what_it_cannot_serve_is_refused_before_any_weight_is_read(tiny, message, tmp_path) -> None:
    values = tiny_models.config_values(tiny)
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(UnsupportedModelError, match=f"supported: Cohere.*nor can .*{message}"):
        check_model(tmp_path)


def test_a_module_that_does_more_with_its_sequences_is_refused(tmp_path, monkeypatch) -> None:
    """A bidirectional model would answer, but not as itself."""
    tiny = Tiny("BertLMHeadModel", "BertConfig", {"is_decoder": False})
    folder = tiny_models.write(tiny, tiny_models.model_of(tiny), tmp_path)
    model = by_transformers(folder, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="Bert"):
        model.load(torch.float32, CPU, 256, lambda *_: None)


def test_the_self_test_sees_a_difference(tmp_path, monkeypatch) -> None:
    tiny = tiny_models.TINY["llama"]
    folder = tiny_models.write(tiny, tiny_models.model_of(tiny), tmp_path)
    model = by_transformers(folder, monkeypatch)
    right = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", lambda *args: right(*args).flip(0))
    with pytest.raises(UnsupportedModelError, match="standard deviations from transformers' own"):
        model.load(torch.float32, CPU, 256, lambda *_: None)


def test_missing_weights_are_named(tmp_path, monkeypatch) -> None:
    from safetensors.torch import load_file, save_file

    tiny = tiny_models.TINY["llama"]
    folder = tiny_models.write(tiny, tiny_models.model_of(tiny), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = by_transformers(folder, monkeypatch)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        model.load(torch.float32, CPU, 256, lambda *_: None)


def test_a_model_s_own_code_runs_only_when_it_is_trusted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    tiny = tiny_models.TINY["llama"]
    oracle = tiny_models.model_of(tiny)
    folder = tiny_models.write(tiny, oracle, tmp_path / "model")
    (folder / "modeling_ours.py").write_text(REMOTE)
    values = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "OursConfig", "AutoModelForCausalLM": "OursForCausalLM"}
    values |= {
        "architectures": ["OursForCausalLM"],
        "model_type": "ours",
        "auto_map": {key: f"modeling_ours.{name}" for key, name in code.items()},
    }
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match="has no decoder of that name"):
        check_model(folder)
    model = check_model(folder, trust_remote_code=True)
    decoder = model.load(torch.float32, CPU, 256, lambda *_: None)
    prompt = list(range(3, 40))
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits(decoder, prompt, 9), expected, rtol=1e-4, atol=1e-4)
