"""transformers' `generate` on a workload, in static batches of one size after another.

    python peer_transformers.py SHAPE LOAD[,LOAD] MAX_NUM_SEQS [REQUESTS]

A batch is padded to its longest prompt and runs to its longest output; only tokens that were asked
for count. It is slow, so that the first requests of a workload must do.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers

from octavo.bench.workloads import SHAPES, Request, digest, draw, write_shape

BATCHES = (16, 32, 64, 128, 256)


def generate(model: Any, requests: list[Request]) -> None:
    width = max(len(r.prompt) for r in requests)
    steps = max(r.output for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long, device="cuda")
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=steps, max_new_tokens=steps,
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip


def main(shape: str, loads: list[str], count: int) -> None:
    begin = time.perf_counter()
    config = transformers.AutoConfig.from_pretrained(write_shape(shape, Path(mkdtemp())))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.eval()
    start = round(time.perf_counter() - begin, 3)
    row = {"metric": "start", "s": start, "version": transformers.__version__}
    print(json.dumps(row), flush=True)
    vocab_size = SHAPES[shape]["vocab_size"]
    generate(model, [Request(r.prompt[:32], 8) for r in draw("uniform", vocab_size, 4)])
    for load in loads:
        requests = draw(load, vocab_size, count)
        for batch in (size for size in BATCHES if size <= max(count, BATCHES[0])):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for first in range(0, len(requests), batch):
                generate(model, requests[first : first + batch])
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            row = {
                "metric": "static", "load": load, "batch": batch, "digest": digest(requests),
                "requests": len(requests), "s": round(seconds, 3),
                "out_tok_s": round(sum(r.output for r in requests) / seconds, 1),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[4]) if len(sys.argv) > 4 else 256)
