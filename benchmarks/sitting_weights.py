"""A checkpoint of random bfloat16 weights in a shape's folder, as a server would find it.

    python sitting_weights.py SHAPE FOLDER

Sharded safetensors under the names that transformers gives a Llama or Qwen3 model. Values are drawn
on the GPU if there is one and written by several threads; they stay in the page cache, which is
where a second replica on a node finds a model.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from octavo.bench.workloads import SHAPES, write_shape, write_tokenizer
from octavo.checkpoint import INDEX_NAME

THREADS = 12
SHARD_BYTES = 1 << 30
STANDARD_DEVIATION = 0.02
_BYTES = 2  # of a number in bfloat16

Tensors = dict[str, tuple[int, ...]]


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's or a Qwen3's weights, in the order of the layers."""
    hidden, inner, dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    heads = config["num_attention_heads"] * dim
    kv = config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", (heads, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads)
        if config["model_type"] == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", (dim,)
            yield f"{at}.self_attn.k_norm.weight", (dim,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def shards(config: Mapping[str, Any], most: int) -> list[Tensors]:
    """The tensors in files of about `most` bytes."""
    found: list[Tensors] = [{}]
    filled = 0
    for name, shape in tensors(config):
        size = _BYTES * math.prod(shape)
        if found[-1] and filled + size > most:
            found.append({})
            filled = 0
        found[-1][name] = shape
        filled += size
    return found


def write_shard(path: Path, held: Tensors, device: str, seed: int) -> int:
    """One safetensors file; returns its bytes of weights."""
    header, at = {}, 0
    for name, shape in held.items():
        end = at + _BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in held.items():
            values = torch.empty(shape, dtype=torch.bfloat16, device=device)
            if name.endswith("norm.weight"):
                values.fill_(1.0)
            else:
                values.normal_(0.0, STANDARD_DEVIATION, generator=generator)
            file.write(memoryview(values.cpu().view(torch.uint8).numpy()).cast("B"))
    return at


def write_weights(
    config: Mapping[str, Any], folder: Path, device: str, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write all shards and their index; returns the bytes of weights."""
    files = shards(config, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    with ThreadPoolExecutor(THREADS) as threads:
        paths = [folder / name for name in names]
        devices = [device] * len(files)
        total = sum(threads.map(write_shard, paths, files, devices, range(len(files))))
    where = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return total


def main(shape: str, folder: Path) -> None:
    begin = time.perf_counter()
    config = SHAPES[shape]
    write_shape(shape, folder)
    write_tokenizer(config["vocab_size"], folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = write_weights(config, folder, device)
    seconds = time.perf_counter() - begin
    free = os.statvfs(folder)
    row = {
        "metric": "weights_s", "value": round(seconds, 2), "bytes": total, "folder": str(folder),
        "free_GB": round(free.f_bavail * free.f_frsize / 1e9, 1),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
