"""vLLM on a workload, with the knobs that `octavo bench offline` has in a sitting.

    python peer_vllm.py FOLDER LOAD[,LOAD] MAX_MODEL_LEN [REQUESTS]

Weights are random, whatever the folder holds. "cost" among the loads measures what its steps cost.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cost_model import measure_points, rows
from sitting import MAX_NUM_SEQS, MEMORY, PASSES, PASSES_S

from octavo.bench.passes import passes
from octavo.bench.workloads import Request, draw


def main(folder: Path, loads: list[str], max_model_len: int, count: int | None) -> None:
    begin = time.perf_counter()
    import vllm

    llm = vllm.LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=max_model_len, gpu_memory_utilization=MEMORY, enable_prefix_caching=False,
        max_num_seqs=MAX_NUM_SEQS, seed=0,
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

    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    for load in loads:
        if load == "cost":
            points = [*measure_points(generate, vocab_size, max_model_len)]
            for found in rows(folder.name, "vllm", "generate", points):
                print(json.dumps(found), flush=True)
            continue
        for row in passes(generate, load, draw(load, vocab_size, count), PASSES, PASSES_S):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    most = int(sys.argv[4]) if len(sys.argv) > 4 else None
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), most)
