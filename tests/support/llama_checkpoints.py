"""Random Llama checkpoints on disk, made without the code under test."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def config(**changes) -> dict:
    """The small config with changes; a value of None removes the key."""
    merged = {**CONFIG, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def shapes(values: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama checkpoint has, written out from the published layout."""
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    heads = values["num_attention_heads"]
    dim = values.get("head_dim") or hidden // heads
    kv = values.get("num_key_value_heads", heads) * dim
    found = {"model.embed_tokens.weight": (values["vocab_size"], hidden)}
    for layer in range(values["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (heads * dim, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * dim),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
        if values.get("attention_bias"):
            found |= {f"{at}.self_attn.{n}_proj.bias": (kv,) for n in "kv"}
            found |= {f"{at}.self_attn.q_proj.bias": (heads * dim,)}
            found |= {f"{at}.self_attn.o_proj.bias": (hidden,)}
        if values.get("mlp_bias"):
            found |= {f"{at}.mlp.{n}_proj.bias": (inner,) for n in ("gate", "up")}
            found |= {f"{at}.mlp.down_proj.bias": (hidden,)}
    found["model.norm.weight"] = (hidden,)
    if not values.get("tie_word_embeddings"):
        found["lm_head.weight"] = (values["vocab_size"], hidden)
    return found


def tensors(values: dict, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, large enough that logits differ clearly; norms near one."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(shape, generator=random) * (0.1 if "norm" in name else 0.25)
            + ("norm" in name)
        ).to(dtype)
        for name, shape in shapes(values).items()
    }


def write(folder: Path, values: dict | None = None, *, shards: int = 1, **kwargs) -> Path:
    """A model folder: config.json and one safetensors file, or an index with `shards` of them."""
    values = config() if values is None else values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    weights = tensors(values, **kwargs)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    file_of = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / name)
        file_of |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
