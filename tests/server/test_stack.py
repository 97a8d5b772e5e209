"""Which decoders go through all their layers in one kernel."""

from dataclasses import replace

import pytest
import torch
from gpu import needs_gpu_kernels

from octavo.models.decoder import Batch, Decoder, empty_parameters
from octavo.models.spec import DecoderSpec, LayerSpec, RopeSpec
from octavo.models.stack import is_uniform
from octavo_kernels import ops

UNIFORM = DecoderSpec(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    layers=(LayerSpec(),) * 3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
    rotary_dim=16,
)


def test_turned_heads_with_or_without_norms_are_uniform() -> None:
    assert is_uniform(UNIFORM)
    assert is_uniform(replace(UNIFORM, qk_norm="head"))


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (LayerSpec(), LayerSpec(window=8), LayerSpec())},
        {"layers": (LayerSpec(), LayerSpec(rope=None), LayerSpec())},
        {"layers": (LayerSpec(rope=None),) * 3},
        {"layers": (LayerSpec(), LayerSpec(rope=RopeSpec(theta=1e6)))},
        {"qk_norm": "whole"},
        {"rotary_dim": 8},
        {"rope_interleaved": True},
        {"learned_positions": 64},
        {"sinks": True},
        {"attention_softcap": 30.0},
        {"qkv_bias": True},
        {"output_bias": True},
        {"mlp_bias": True},
    ],
    ids=str,
)
def test_anything_else_goes_layer_by_layer(change) -> None:
    assert not is_uniform(replace(UNIFORM, **change))


@needs_gpu_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_decodes_give_what_the_layers_give_one_by_one(dtype) -> None:
    spec = replace(
        UNIFORM, hidden_size=256, intermediate_size=512, head_dim=64, rotary_dim=64, qk_norm="head",
        max_positions=256,
    )  # fmt: skip
    device = torch.device("cuda")
    parameters = empty_parameters(spec, dtype=dtype, device=device)
    for name, weight in parameters.items():
        scale = 1.0 if "norm" in name else weight.shape[-1] ** -0.5
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=scale / 4)
    decoder = Decoder(spec, parameters, max_positions=256, device=device)
    lengths, width = [1, 40, 129], 16
    tables = torch.randperm(3 * width, device=device).int().view(3, width)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    positions = seq_lens.long() - 1
    at = positions.unsqueeze(1) // 16
    slots = tables.gather(1, at).squeeze(1).long() * 16 + positions % 16
    starts = torch.arange(4, dtype=torch.int32, device=device)
    tokens = torch.tensor([3, 1, 2], device=device)
    batch = Batch(tokens, positions, (slots,), starts, seq_lens, (tables,), None, 3, 1)
    cache = torch.randn(3, 2, 3 * width, 16, 2, 64, device=device).to(dtype)
    copy = cache.clone()
    ops.calls.clear()
    got = decoder.hidden(batch, cache)
    assert ops.calls["decode_layers", "cuda"] == 1
    wanted = decoder.tail(decoder.body(batch, copy), None)
    limit = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert (got - wanted).norm() <= limit * wanted.norm()
    torch.testing.assert_close(cache, copy, rtol=0.1, atol=8 * limit)
    logits = torch.empty(3, spec.vocab_size, dtype=dtype, device=device)
    decoder.decode(batch, cache, logits)
    assert ops.calls["decode_logits", "cuda"] == 1
    assert not decoder.plans_attention(3, cache)
    wanted = decoder.raw_logits(got).float()
    assert (logits.float() - wanted).norm() <= limit * wanted.norm()
