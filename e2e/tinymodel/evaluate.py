"""Ask the saved model held-out questions, greedily and in fp32, and print how many are right.

python e2e/tinymodel/evaluate.py [--model DIR] [--per-family N] [--write FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers
import torch
import transformers

from tinymodel import tasks

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
RESULTS = HERE / "evaluation.json"
SEED = 1
REQUIRED = 0.95


def held_out_tasks(family: str, count: int, seed: int = SEED) -> list[tasks.Task]:
    """`count` held-out tasks of `family`, no two with the same conversation."""
    rng = random.Random(f"evaluation {seed} {family}")
    distinct: dict[str, tasks.Task] = {}
    while len(distinct) < count:
        task = tasks.sample(rng, family, "held_out")
        distinct.setdefault(json.dumps(task.messages), task)
    return list(distinct.values())


class Answerer:
    """The saved files, loaded back in fp32 through transformers."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).to(device)
        self.model.eval()

    @torch.inference_mode()
    def answers(self, batch: Sequence[tasks.Task]) -> list[str | None]:
        """The greedy answer to each task; None where the model did not come to an end."""
        prompts = self.tokenizer.apply_chat_template(
            [task.messages for task in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        expected = self.tokenizer([t.expected for t in batch], add_special_tokens=False).input_ids
        room = max(map(len, expected)) + 8
        output = self.model.generate(**prompts, max_new_tokens=room, do_sample=False)
        ends = self.model.generation_config.eos_token_id
        generated = output[:, prompts["input_ids"].shape[1] :].tolist()
        return [self._decode(tokens, ends) for tokens in generated]

    def _decode(self, tokens: list[int], ends: list[int]) -> str | None:
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        return None if end is None else self.tokenizer.decode(tokens[:end])


def evaluate(answerer: Answerer, per_family: int, batch_size: int = 200) -> dict[str, Any]:
    """Accuracy of each family on held-out tasks, printed as it goes."""
    families: dict[str, Any] = {}
    for family in tasks.FAMILIES:
        started = time.monotonic()
        # Sorted by length, so that a batch ends when its longest answer does, not the family's.
        asked = sorted(held_out_tasks(family, per_family), key=lambda task: len(task.expected))
        wrong = []
        for at in range(0, len(asked), batch_size):
            batch = asked[at : at + batch_size]
            for task, answer in zip(batch, answerer.answers(batch), strict=True):
                if answer is None or not tasks.check(task, answer):
                    wrong.append((task, answer))
        accuracy = 1 - len(wrong) / len(asked)
        families[family] = {
            "asked": len(asked),
            "right": len(asked) - len(wrong),
            "accuracy": round(accuracy, 4),
            "longest_answer_characters": len(asked[-1].expected),
        }
        seconds = time.monotonic() - started
        print(f"{family:12} {accuracy:7.1%} of {len(asked)} held-out ({seconds:.1f} s)", flush=True)
        for task, answer in wrong[:3]:
            print(f"  asked {task.messages[-1]['content']!r}")
            print(f"  wanted {task.expected[-80:]!r}\n  got    {(answer or 'no end')[-80:]!r}")
    return families


def environment(device: str) -> dict[str, str]:
    """What an evaluation or a training ran on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": f"{device} ({name})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def commit() -> str:
    """The commit of the scripts, or 'unknown' outside a checkout."""
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def write_results(path: Path, section: str, values: dict[str, Any]) -> None:
    """Replace one section of the results file and keep the other."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[section] = values
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def report(folder: Path, per_family: int, device: str, path: Path, commit_id: str) -> bool:
    """Evaluate `folder`, write the evaluation section, and say whether every family passes."""
    started = time.monotonic()
    families = evaluate(Answerer(folder, device), per_family)
    values = {
        "commit": commit_id,
        "seed": SEED,
        "decoding": "greedy, fp32, the saved files loaded back",
        "families": families,
        "seconds": round(time.monotonic() - started, 1),
        **environment(device),
    }
    write_results(path, "evaluation", values)
    passed = all(family["accuracy"] >= REQUIRED for family in families.values())
    print(f"{'every' if passed else 'NOT every'} family reaches {REQUIRED:.0%}", flush=True)
    return passed


def main() -> int:
    """Evaluate the committed model; the exit status says whether every family passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--per-family", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--write", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--commit", default=commit(), help="commit to record")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    passed = report(
        arguments.model,
        arguments.per_family,
        arguments.device,
        arguments.write,
        arguments.commit,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
