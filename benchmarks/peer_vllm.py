"""vLLM on a workload, with the knobs that `octavo bench offline` has in a sitting.

python peer_vllm.py SHAPE LOAD[,LOAD] MAX_NUM_SEQS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

from octavo.bench.workloads import SHAPES, Request, digest, draw, write_shape

REPEAT = 2


def main(shape: str, loads: list[str], max_num_seqs: int) -> None:
    begin = time.perf_counter()
    import vllm

    llm = vllm.LLM(
        model=str(write_shape(shape, Path(mkdtemp()))), load_format="dummy",
        skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096,
        gpu_memory_utilization=0.9, enable_prefix_caching=False, max_num_seqs=max_num_seqs, seed=0,
    )  # fmt: skip
    start = round(time.perf_counter() - begin, 3)
    print(json.dumps({"metric": "start", "s": start, "version": vllm.__version__}), flush=True)

    def generate(requests: list[Request]) -> float:
        params = [
            vllm.SamplingParams(
                temperature=1.0, ignore_eos=True, max_tokens=r.output, detokenize=False
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": r.prompt} for r in requests]
        begin = time.perf_counter()
        results = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        drawn = sum(len(result.outputs[0].token_ids) for result in results)
        assert drawn == sum(r.output for r in requests), drawn
        return seconds

    vocab_size = SHAPES[shape]["vocab_size"]
    generate(draw("uniform", vocab_size, 16, seed=1))
    for load in loads:
        requests = draw(load, vocab_size)
        for rep in range(REPEAT):
            seconds = generate(requests)
            row = {
                "metric": "offline", "load": load, "rep": rep, "digest": digest(requests),
                "requests": len(requests), "s": round(seconds, 4),
                "out_tok_s": round(sum(r.output for r in requests) / seconds, 1),
                "in_tok_s": round(sum(len(r.prompt) for r in requests) / seconds, 1),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]))
