"""The tiny model's tokenizer and chat template: byte-level BPE, digits one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tinymodel import tasks

VOCABULARY_SIZE = 768
CONTEXT_LENGTH = 2048
BEGIN, END, TURN, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BEGIN, END, TURN, TURN_END)

# A digit is a token of its own, because only then can a small model learn to add and to count; the
# separator between two numbers is one token, so that a long count costs fewer.
SPLIT = r"\p{N}|, (?=\p{N})| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def render(messages: list[tasks.Message]) -> str:
    """What the chat template makes of a finished conversation, without the cost of Jinja."""
    turns = (f"{TURN}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)
    return BEGIN + "".join(turns)


def train_tokenizer(seed: int, samples: int = 40_000) -> Tokenizer:
    """Learn the merges from text of the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(seed, samples), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


def _sentences(seed: int, samples: int) -> Iterator[str]:
    rng = random.Random(f"tokenizer {seed}")
    families = [family for family in tasks.FAMILIES if not family.startswith("count_")]
    for _ in range(samples):
        for message in tasks.sample(rng, rng.choice(families), "train").conversation():
            yield f"{message['role']}\n{message['content']}"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `tokenizers` and transformers' AutoTokenizer load."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": TURN_END,
        "pad_token": END,
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
