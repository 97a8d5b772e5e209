"""The tiny model: its files, the tasks' answers, the split, the template, some live answers."""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "e2e" / "tinymodel" / "model"
sys.path.insert(0, str(ROOT / "e2e"))

from tinymodel import tasks  # noqa: E402 (the e2e source root is put on the path just above)

SAMPLES = 300


def test_weights_are_at_most_8_mb() -> None:
    files = list(MODEL.glob("*.safetensors"))
    assert [file.name for file in files] == ["model.safetensors"]
    assert files[0].stat().st_size <= 8_000_000


def test_config_is_the_architecture_that_the_kernels_serve() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "max_position_embeddings": 2048,
    }
    assert {key: config[key] for key in expected} == expected
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert config["eos_token_id"] in generation["eos_token_id"]


def test_committed_figures_meet_the_requirement() -> None:
    results = json.loads((MODEL.parent / "evaluation.json").read_text())
    families = results["evaluation"]["families"]
    assert set(families) == set(tasks.FAMILIES)
    for family, figures in families.items():
        assert figures["asked"] >= 200, family
        assert figures["right"] >= 0.95 * figures["asked"], family
    assert results["training"]["safetensors_bytes"] == (MODEL / "model.safetensors").stat().st_size


def content_of(task: tasks.Task) -> str:
    """The key that decides the split, recovered from the text of the question alone."""
    prompt = task.messages[-1]["content"]
    if task.family in ("sum", "count", "count_long"):
        first, second = map(int, re.findall(r"\d+", prompt))
        if task.family == "sum":
            return f"sum {min(first, second)} {max(first, second)}"
        return f"count {first} {second}"
    if task.family == "spell":
        return f"spell {task.expected.replace('-', '')}"
    letters = "".join(c for c in task.expected if c.isalnum() or c == " ")
    return f"repeat {letters}"


@pytest.mark.parametrize("family", [f for f in tasks.FAMILIES if f != "facts"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_content_is_in_both_splits(family: str, split: tasks.Split) -> None:
    rng = random.Random(5)
    for _ in range(SAMPLES):
        task = tasks.sample(rng, family, split)
        numbers = [int(n) for n in re.findall(r"\d+", task.messages[-1]["content"])]
        if family == "sum" and max(numbers) < 10:
            assert split == "train", "sums of two digits are the alphabet; all of them are trained"
            continue
        assert tasks.held_out(content_of(task)) == (split == "held_out"), task


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_fact_is_in_both_splits(split: tasks.Split) -> None:
    rng = random.Random(5)
    for _ in range(SAMPLES):
        task = tasks.sample(rng, "facts", split)
        told = task.messages[1]["content"].removeprefix("Noted: ").removesuffix(".")
        for statement in told.split(" and "):
            kind, value = next(
                (kind, statement.removeprefix(start))
                for kind, fact in tasks.FACTS.items()
                if statement.startswith(start := fact.stated.removesuffix("{value}"))
            )
            assert tasks.held_out(f"{kind} {value}") == (split == "held_out"), task


def test_training_conversations_never_hold_a_held_out_sum() -> None:
    corpus = pytest.importorskip("tinymodel.corpus")
    rng = random.Random(6)
    asked = []
    for _ in range(SAMPLES):
        for message in corpus.mixed_conversation(rng) + corpus.short_conversation(rng):
            if pair := re.search(r"(\d+) ?(?:\+|plus|and) ?(\d+)", message["content"]):
                asked.append(tuple(map(int, pair.groups())))
    assert len(asked) > SAMPLES / 3
    leaked = [p for p in asked if max(p) > 9 and tasks.held_out(tasks.sum_key(*p))]
    assert leaked == []


def brute_force(task: tasks.Task) -> str:
    """The right answer, worked out from the words of the question and by other means."""
    prompt = task.messages[-1]["content"]
    if task.family == "sum":
        return str(sum(map(int, re.findall(r"\d+", prompt))))
    if task.family.startswith("count"):
        number, last = map(int, re.findall(r"\d+", prompt))
        text = str(number)
        while number != last:
            number += 1
            text += f", {number}"
        return text
    if task.family == "spell":
        word = re.sub(r"[.?\"]|letter by letter", "", prompt).split()[-1]
        return re.sub(r"(?<=.)(?=.)", "-", word)
    if task.family == "repeat":
        return prompt.split('"')[1] if '"' in prompt else prompt.split(": ", 1)[1]
    for clue, pattern, answer in (
        (r"name|called", r"(?:name is|I am called) (\w+)\.", "Your name is {}."),
        (r"live|city", r"(?:live in|home is in|city of) ([A-Z]\w*)\.", "You live in {}."),
        (r"colour", r"(?:colour is|like best is) (\w+)\.", "Your favourite colour is {}."),
        (r"pet|animal", r"(?:pet is a|a pet|I keep a) (\w+)\.", "Your pet is a {}."),
    ):
        if re.search(clue, prompt):
            return answer.format(re.findall(pattern, task.messages[0]["content"])[0])
    raise AssertionError(prompt)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_expected_answers_are_right(family: str) -> None:
    rng = random.Random(7)
    for _ in range(SAMPLES):
        task = tasks.sample(rng, family)
        assert task.expected == brute_force(task), task
        assert tasks.check(task, f" {task.expected}\n")
        assert not tasks.check(task, task.expected + "1")


def test_sampling_is_reproducible_and_wordings_vary() -> None:
    def draw(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [tasks.sample(rng, "sum").messages[0]["content"] for _ in range(60)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len({re.sub(r"\d+", "", prompt) for prompt in draw(1)}) == len(tasks.SUM_PROMPTS)


def test_count_refuses_what_the_model_was_not_taught() -> None:
    for a, b in ((5, 5), (9, 3), (-1, 4), (1, tasks.MAX_NUMBER + 1)):
        with pytest.raises(ValueError, match=f"count from {a} to {b}"):
            tasks.count_prompt(a, b)


@pytest.fixture(scope="module")
def text() -> ModuleType:
    return pytest.importorskip("tinymodel.text")


def conversations() -> Iterator[list[tasks.Message]]:
    rng = random.Random(8)
    system = {"role": "system", "content": "Answer briefly."}
    for family in tasks.FAMILIES:
        task = tasks.sample(rng, family)
        yield task.messages
        yield [system, *task.conversation()]


def test_template_is_the_same_in_jinja_transformers_and_training(text: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    source = (MODEL / "chat_template.jinja").read_text()
    assert source == text.CHAT_TEMPLATE
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    for messages in conversations():
        for prompted in (False, True):
            rendered = template.render(
                messages=messages, add_generation_prompt=prompted, bos_token=tokenizer.bos_token
            )
            assert rendered == tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompted, tokenize=False
            )
            assert rendered == text.render(messages) + (
                "<|im_start|>assistant\n" if prompted else ""
            )


def test_both_tokenizers_agree_and_lose_nothing(text: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    fast = text.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(MODEL)
    samples = [text.render(m) for m in conversations()]
    samples += ["naïve ☃ 你好\n\ttab  two  spaces", "", "1,2, 3 ,4", "<|im_end|>x"]
    for sample in samples:
        ids = fast.encode(sample, add_special_tokens=False).ids
        assert ids == auto.encode(sample, add_special_tokens=False)
        assert fast.decode(ids, skip_special_tokens=False) == sample
    assert fast.encode("12").tokens == [text.BEGIN, "1", "2"]
    for token in text.SPECIAL_TOKENS:
        assert fast.encode(token, add_special_tokens=False).ids == [fast.token_to_id(token)]


def test_saved_model_answers_through_transformers() -> None:
    pytest.importorskip("transformers")
    from tinymodel import evaluate

    asked = [
        tasks.sum_task(17, 25),
        tasks.sum_task(348, 795, wording=1),
        tasks.count_task(1, 24),
        tasks.count_task(95, 112),
        tasks.spell_task("kubernetes"),
        tasks.repeat_task("The quick robot sleeps near a brown bridge."),
        tasks.fact_task({"name": "Ada"}, "name"),
        tasks.fact_task({"pet": "goldfish", "city": "Oslo"}, "city", between=tasks.sum_task(8, 9)),
        tasks.unknown_fact_task("colour"),
        tasks.small_talk_task("Hello"),
    ]
    threads = evaluate.torch.get_num_threads()
    evaluate.torch.set_num_threads(1)  # so small a model is quickest on one
    try:
        answers = evaluate.Answerer(MODEL).answers(asked)
    finally:
        evaluate.torch.set_num_threads(threads)
    assert answers == [task.expected for task in asked]
