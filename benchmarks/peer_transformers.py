"""transformers' `generate` on a workload, in static batches of one size after another.

    python peer_transformers.py FOLDER LOAD MAX_MODEL_LEN [REQUESTS]

A static batch is padded to its longest prompt and runs to its longest output; only tokens that were
asked for count. A whole batch of an 8B model takes minutes, so that each size is measured in a time
box: the prompts and the first steps of the first batch as they are, and some steps behind a cache
of the length with which the batch would end. In between a step's time is taken to grow in
proportion to the length, as it does where attention reads more and the rest stays. A batch that
ends within its box was measured whole. What does not fit into memory at its end cannot run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from octavo.bench.workloads import Request, digest, draw

# Those that are likely to be best come first, in case that the time ends.
BATCHES = (64, 128, 256, 32, 16)
# Of one batch size: the prompts, and steps behind them.
BOX_S = 8.0
LATE_STEPS = 6
FIRST_ID = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """When each token came; ends a batch after `limit_s` seconds or `most` tokens.

    Some steps there are always, whatever the prompts took.
    """

    limit_s: float
    most: int
    begin: float = field(default_factory=time.perf_counter)
    ends: list[float] = field(default_factory=list)

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() - self.begin)
        late = self.ends[-1] > self.limit_s and len(self.ends) >= LATE_STEPS
        over = late or len(self.ends) >= self.most
        return torch.full((len(ids),), over, dtype=torch.bool, device=ids.device)


def generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, limit_s: float, most: int, cache: Any = None
) -> list[float]:
    """Run one batch of ids [sequences, width] for at most `most` tokens; when each of them came.

    A cache holds the keys and values of all but the last columns of `ids`.
    """
    clock = Clock(limit_s, most)
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=most, max_new_tokens=most,
            do_sample=True, temperature=1.0, top_k=0, pad_token_id=0, eos_token_id=None,
            past_key_values=cache,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )  # fmt: skip
    return clock.ends


def padded(requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [requests, longest prompt], padded on the left, and which of them count."""
    width = max(len(r.prompt) for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    return ids, mask


def late_step(model: Any, batch: int, length: int, limit_s: float) -> float:
    """Seconds of a step behind a cache of `length` tokens a sequence; what is in it is the same."""
    config = model.config
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    cache = transformers.DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        part = torch.full(shape, 0.1, dtype=model.dtype, device=DEVICE)
        cache.update(part, part, layer)
    ids = torch.full((batch, length + 1), FIRST_ID, dtype=torch.long, device=DEVICE)
    ends = generate(model, ids, torch.ones_like(ids), limit_s, LATE_STEPS, cache)
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1)


def whole_batch_s(first: list[float], late_step_s: float, steps: int) -> float:
    """Seconds of all `steps` of a batch from when its first tokens came and what the last take.

    `first[0]` has the prompts' time in it; the steps that were not run are a straight line from
    the last ones that were to `late_step_s`.
    """
    done = len(first)
    if done >= steps:
        return first[steps - 1]
    recent = [b - a for a, b in zip(first[done // 2 :], first[done // 2 + 1 :], strict=False)]
    step = statistics.median(recent) if recent else late_step_s
    return first[-1] + (steps - done) * (step + late_step_s) / 2


def measure(model: Any, requests: list[Request], box_s: float) -> dict[str, Any]:
    """Tokens that were asked for over the seconds of one static batch of all `requests`."""
    begin = time.perf_counter()
    ids, mask = padded(requests)
    steps = max(r.output for r in requests)
    late_step_s = late_step(model, len(requests), ids.shape[1] + steps - LATE_STEPS, box_s)
    first = generate(model, ids, mask, box_s, steps)
    seconds = whole_batch_s(first, late_step_s, steps)
    return {
        "batch": len(requests), "digest": digest(requests),
        "steps": steps, "steps_run": len(first), "estimated": len(first) < steps,
        "prompts_s": round(first[0], 3), "late_step_s": round(late_step_s, 4),
        "s": round(seconds, 3), "measured_s": round(time.perf_counter() - begin, 2),
        "out_tok_s": round(sum(r.output for r in requests) / seconds, 1),
    }  # fmt: skip


def sweep(model: Any, requests: list[Request], box_s: float) -> Iterator[dict[str, Any]]:
    """Each batch size on the first requests that fill it."""
    for batch in (size for size in BATCHES if size <= len(requests)):
        try:
            yield measure(model, requests[:batch], box_s)
        except torch.OutOfMemoryError as error:
            yield {"batch": batch, "why": f"out of memory: {str(error)[:200]}"}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def main(folder: Path, load: str, max_model_len: int, count: int) -> None:
    begin = time.perf_counter()
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.eval()
    start = round(time.perf_counter() - begin, 3)
    row = {"metric": "start", "s": start, "version": transformers.__version__}
    print(json.dumps(row), flush=True)
    generate(model, *padded([Request([FIRST_ID] * 32, 8)] * 4), BOX_S, 8)
    requests = draw(load, config.vocab_size, count)
    assert all(len(r.prompt) + r.output <= max_model_len for r in requests)
    for found in sweep(model, requests, BOX_S):
        print(json.dumps({"metric": "static", "load": load} | found), flush=True)


if __name__ == "__main__":
    most = int(sys.argv[4]) if len(sys.argv) > 4 else max(BATCHES)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), most)
