"""Fixed-seed requests and model shapes. No downloads: lengths are drawn, weights are random.

The same name, vocabulary and seed give the same requests everywhere, so that figures of different
engines and days are of one workload (`digest` says so). Which tokens stand in a prompt changes
nothing that is measured; their number does. Means of "sharegpt" are those that the PagedAttention
paper (Kwon et al., 2023) states for its ShareGPT trace.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import ConfigError

SEED = 7
# Ids below are control tokens in many vocabularies, and so are the last of them.
_FIRST_PLAIN_ID = 10
_LAST_CONTROL_IDS = 1000

# config.json of well-known models, with nothing but what decides their size.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 128000,
        "eos_token_id": 128001, "attention_bias": False, "mlp_bias": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 151643,
        "eos_token_id": 151645, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 28,
    },
}  # fmt: skip


class Request(NamedTuple):
    """A prompt's token ids, and how many tokens it draws whatever they are."""

    prompt: list[int]
    output: int


def write_shape(shape: str, folder: Path) -> Path:
    """Make `folder` hold the config.json of a shape; returns the folder."""
    if shape not in SHAPES:
        raise ConfigError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1), encoding="utf-8")
    return folder


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A tokenizer for a shape: word number i is token i, so that a server has text to stream."""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _lognormal(rng: random.Random, mean: float, sigma: float) -> int:
    """A whole number of that mean and spread, within 4..1024."""
    mu = math.log(mean) - sigma * sigma / 2
    return max(4, min(1024, int(rng.lognormvariate(mu, sigma))))


def _sharegpt(rng: random.Random) -> tuple[int, int]:
    return _lognormal(rng, 161, 1.0), _lognormal(rng, 338, 0.8)


def _alpaca(rng: random.Random) -> tuple[int, int]:
    return _lognormal(rng, 19, 0.6), _lognormal(rng, 58, 0.8)


def _uniform(rng: random.Random) -> tuple[int, int]:
    return rng.randint(100, 1024), rng.randint(100, 1024)


# Of each workload: how many requests, and the lengths of one.
_WORKLOADS: Mapping[str, tuple[int, Callable[[random.Random], tuple[int, int]]]] = {
    "sharegpt": (1000, _sharegpt),
    "alpaca": (1000, _alpaca),
    "uniform": (256, _uniform),
    "prefill": (64, lambda _: (2048, 1)),
    "single": (1, lambda _: (512, 256)),
}
WORKLOADS = tuple(_WORKLOADS)


def draw(name: str, vocab_size: int, count: int | None = None, seed: int = SEED) -> list[Request]:
    """The first `count` requests of a workload (None: as many as it has)."""
    if name not in _WORKLOADS:
        raise ConfigError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
    usual, lengths = _WORKLOADS[name]
    rng = random.Random(seed)  # noqa: S311 (lengths, no secrets)
    last = vocab_size - _LAST_CONTROL_IDS
    if last <= _FIRST_PLAIN_ID:  # a tiny vocabulary has no such reserve
        last = vocab_size
    requests = []
    for _ in range(usual if count is None else count):
        prompt, output = lengths(rng)
        ids = [rng.randrange(_FIRST_PLAIN_ID, last) for _ in range(prompt)]
        requests.append(Request(ids, output))
    return requests


def digest(requests: list[Request]) -> str:
    """What two runs must have in common to be compared."""
    text = json.dumps(requests, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
