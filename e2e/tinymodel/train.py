"""Train the tiny model from nothing: text, tokenizer, weights; then evaluate the saved files.

python e2e/tinymodel/train.py [--out DIR] [--steps N] [--time-limit SECONDS]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tinymodel import evaluate, text
from tinymodel.corpus import Batch, BatchShape, Corpus

SEED = 20
STEPS = 5_000
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 300
SHORT = BatchShape(rows=384, length=96)
LONG_TOKENS = 24_576


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """A Llama of 3.7 million parameters with the shapes that the kernels serve."""
    turn_end = tokenizer.token_to_id(text.TURN_END)
    return LlamaConfig(
        vocab_size=text.VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=text.CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(text.BEGIN),
        eos_token_id=turn_end,
        pad_token_id=tokenizer.token_to_id(text.END),
        use_cache=True,
    )


def learning_rate(progress: float, step: int) -> float:
    """Linear warm-up, then a cosine down to nothing at `progress` 1."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def answer_loss(model: LlamaForCausalLM, batch: Batch, device: str) -> torch.Tensor:
    """Mean cross-entropy of the assistant's tokens."""
    ids, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    # bf16 arithmetic over fp32 weights on a GPU; plain fp32 elsewhere.
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def optimise(
    model: LlamaForCausalLM, batches: DataLoader[Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run the training steps; a time limit shortens the schedule rather than cutting it off."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    on_gpu = arguments.device == "cuda"
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=on_gpu)
    started = time.monotonic()
    step = 0
    for step, (short, long) in enumerate(batches, start=1):
        elapsed = time.monotonic() - started
        progress = max(step / arguments.steps, elapsed / arguments.time_limit)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress, step)
        short_loss = answer_loss(model, short, arguments.device)
        short_loss.backward()
        long_loss = answer_loss(model, long, arguments.device)
        long_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % arguments.report_every == 0:
            losses = f"short {short_loss.item():.4f} long {long_loss.item():.4f}"
            print(f"step {step} {elapsed:.0f} s {progress:.0%} {losses}", flush=True)
        if step % arguments.save_every == 0:
            save_model(model, arguments.out)
    return {"steps": step, "seconds": round(time.monotonic() - started, 1)}


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bf16, beside plain config and generation_config files."""
    config = model.config
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    saved = LlamaForCausalLM(config).to(torch.bfloat16)
    saved.load_state_dict(weights)
    saved.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        # Either end: that of a chat turn, and that of plain text.
        eos_token_id=[config.eos_token_id, config.pad_token_id],
        pad_token_id=config.pad_token_id,
        max_length=None,
    )
    saved.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # a server that runs as another user reads them


def parse_arguments() -> argparse.Namespace:
    """The command line; its defaults are the committed model's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=evaluate.MODEL, help="model folder")
    parser.add_argument("--results", type=Path, default=evaluate.RESULTS, help="results file")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--time-limit", type=float, default=3000, help="seconds for the steps")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="below 1 to try it on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--workers", type=int, default=min(14, (os.cpu_count() or 2) - 1))
    parser.add_argument("--per-family", type=int, default=200, help="held-out tasks to evaluate")
    parser.add_argument("--report-every", type=int, default=250, help="steps")
    parser.add_argument("--save-every", type=int, default=2000, help="steps")
    parser.add_argument("--commit", default=evaluate.commit(), help="commit to record")
    return parser.parse_args()


def main() -> int:
    """Train, save, evaluate; the exit status says whether every family passes."""
    arguments = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader's workers are the parallelism
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    tokenizer = text.train_tokenizer(arguments.seed)
    text.save_tokenizer(tokenizer, arguments.out)
    model = LlamaForCausalLM(model_config(tokenizer)).to(arguments.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)

    scale = arguments.batch_scale
    short = BatchShape(max(1, int(SHORT.rows * scale)), SHORT.length)
    corpus = Corpus(tokenizer, arguments.seed, arguments.steps, short, int(LONG_TOKENS * scale))
    batches = DataLoader(
        corpus,
        batch_size=None,
        num_workers=arguments.workers,
        pin_memory=arguments.device == "cuda",
        prefetch_factor=8 if arguments.workers else None,
    )
    training = optimise(model, batches, arguments)
    save_model(model, arguments.out)
    print(f"trained: {json.dumps(training)}", flush=True)

    training |= {
        "commit": arguments.commit,
        "seed": arguments.seed,
        "parameters": parameters,
        "time_limit": arguments.time_limit,
        "safetensors_bytes": (arguments.out / "model.safetensors").stat().st_size,
        **evaluate.environment(arguments.device),
    }
    evaluate.write_results(arguments.results, "training", training)
    passed = evaluate.report(
        arguments.out,
        arguments.per_family,
        arguments.device,
        arguments.results,
        arguments.commit,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
