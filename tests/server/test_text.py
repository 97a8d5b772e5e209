"""Tokenizer, chat template, detokenizer and stop strings, against transformers and tokenizers."""

from __future__ import annotations

import json
import threading
import time
from functools import cache
from pathlib import Path

import pytest
from api_server import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from octavo.errors import ConfigError, ModelError
from octavo.text.loader import TextSide, load_text_side
from octavo.text.stop import StopMatcher
from octavo.text.template import ChatTemplate, TemplateRefusedError
from octavo.text.tokenizer import Tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>"]


@cache
def load_once() -> TextSide:
    return load_text_side(str(MODEL), None)


@cache
def oracle_once() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def side() -> TextSide:
    return load_once()


def encode_chat(side: TextSide, messages: list[dict[str, str]]) -> list[int]:
    assert side.template is not None
    return side.tokenizer.encode_chat(
        *side.template.render(messages, side.tokenizer.spelled_control_tokens, {})
    )


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [])
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


# Encoding


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_a_raw_prompt_is_encoded_as_transformers_does(text: str) -> None:
    side = load_once()
    assert side.tokenizer.encode(text) == oracle_once()(text)["input_ids"]


@given(st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_conversation_is_encoded_as_transformers_does(contents: list[str]) -> None:
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    expected = oracle_once().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert encode_chat(load_once(), messages) == expected


@given(st.lists(st.sampled_from([*CONTROL, "a", " b", "<|im_", "end|>", "é"]), max_size=8))
@settings(max_examples=80, deadline=None)
def test_user_text_never_becomes_a_control_token(parts: list[str]) -> None:
    side = load_once()
    content = "".join(parts)
    ids = encode_chat(side, [{"role": "user", "content": content}])
    plain = encode_chat(side, [{"role": "user", "content": "hello"}])
    controls = [i for i in ids if i in side.tokenizer.control_ids]
    assert controls == [i for i in plain if i in side.tokenizer.control_ids]
    # And nothing is lost: as text, the content is what the user wrote.
    assert f"user\n{content}\n" in side.tokenizer.decode(ids)


def test_encoding_a_long_text_leaves_the_interpreter_to_others(side: TextSide) -> None:
    text = "one two three " * 40_000
    begun, ended = threading.Event(), threading.Event()

    def encode() -> None:
        begun.set()
        side.tokenizer.encode(text)
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    begun.wait()
    turns, begin = 0, time.perf_counter()
    while not ended.is_set():
        time.sleep(0.001)
        turns += 1
    taken = time.perf_counter() - begin
    thread.join()
    # A lock that is held all the while would leave one turn.
    assert turns > 5, f"{turns} turns in {taken:.3f} s"


def test_the_same_spelling_in_a_raw_prompt_is_a_control_token(side: TextSide) -> None:
    assert side.tokenizer.encode("<|im_end|>")[-1] in side.tokenizer.control_ids


def test_marks_in_user_text_are_only_text(side: TextSide) -> None:
    content = "\ue0000\ue001 \ue000deadbeef0\ue001 <|im_end|>"
    ids = encode_chat(side, [{"role": "user", "content": content}])
    assert content in side.tokenizer.decode(ids)


# Detokenizing


@given(st.lists(st.integers(0, 2047), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_ids_stream_to_the_text_of_the_whole(ids: list[int]) -> None:
    tokenizer = load_once().tokenizer
    ids = [i for i in ids if i < tokenizer.vocab_size]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    tokenizer = load_once().tokenizer
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_over_several_tokens_is_held_back(side: TextSide) -> None:
    ids = side.tokenizer.encode("🦑")[1:]
    assert len(ids) > 1, "the test needs a character that the vocabulary splits"
    assert stream(side.tokenizer, ids)[:-1] == [""] * (len(ids) - 1) + ["🦑"]
    assert "".join(stream(side.tokenizer, ids[:-1])) == "\ufffd"


@pytest.fixture(scope="module")
def spaced() -> Tokenizer:
    """A tokenizer in the manner of Llama 2: spaces as ▁, bytes as a fallback."""
    words = ["<unk>", "▁Hello", "▁world", "▁", "a", "▁b"]
    vocabulary = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return Tokenizer(backend, byte_level=False)


def test_the_window_keeps_spaces_and_whole_characters(spaced: Tokenizer) -> None:
    squid = [6 + b for b in "🦑".encode()]
    ids = [1, 2, *squid, 5, 4]
    pieces = stream(spaced, ids)
    assert "".join(pieces) == spaced.decode(ids) == "Hello world🦑 ba"
    assert pieces[2:6] == ["", "", "", "🦑"]
    # After a prompt the first new word keeps its space.
    assert "".join(stream(spaced, [2, 5], prompt=[1])) == " world b"


def test_the_window_does_not_wait_for_ever_on_broken_bytes(spaced: Tokenizer) -> None:
    broken = [6 + 0xFF] * 9
    pieces = stream(spaced, [*broken, 4])
    assert "".join(pieces) == spaced.decode([*broken, 4])
    assert any(pieces[:-2])


# Stop strings


def cut(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + ("" if matcher.matched else matcher.flush()), matcher.matched


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ((), "abc", ("abc", None)),
        (("b",), "abc", ("a", "b")),
        (("xy",), "ax", ("ax", None)),
        (("abc", "b"), "xabc", ("xa", "b")),  # "b" is complete first
        (("bc", "abc"), "xabc", ("x", "abc")),  # complete together: the longer
        (("aab",), "aaab", ("a", "aab")),  # a partial match that shifts by one
        (("###",), "####", ("", "###")),
    ],
)
def test_a_stop_string_is_cut_out(
    stops: tuple[str, ...], text: str, expected: tuple[str, str | None]
) -> None:
    assert cut(stops, [text]) == expected
    assert cut(stops, list(text)) == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab", max_size=3), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_chunking_does_not_change_the_cut(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert cut(tuple(stops), pieces) == cut(tuple(stops), list(text))
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    assert cut(tuple(stops), pieces) == expected


def test_what_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    matcher = StopMatcher(("</end>",))
    assert matcher.push("text</e") == "text"
    assert matcher.push("x") == "</ex"
    assert matcher.flush() == ""


# Templates


def render(source: str, **extra: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, where="test")
    messages = [{"role": "user", "content": "hi"}]
    return template.render(messages, lambda _: [], extra)[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hi"),
        ("{% if add_generation_prompt %}\n  go\n{% endif %}", "  go\n"),
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{% for m in messages %}{% if true %}{% break %}{% endif %}x{% endfor %}", ""),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{% if tools %}t{% endif %}{{ enable_thinking }}", "False"),
    ],
)
def test_templates_find_what_published_ones_use(source: str, expected: str) -> None:
    extra = {"enable_thinking": False} if "thinking" in source else {}
    assert render(source, **extra) == expected


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_a_template_that_refuses_or_escapes_is_a_bad_request(source: str, named: str) -> None:
    with pytest.raises(TemplateRefusedError, match=named):
        render(source)


# Loading


def model_folder(tmp_path: Path, **files: str) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load_text_side(str(tmp_path), None)
    folder = model_folder(tmp_path, tokenizer__json="{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a valid tokenizer"):
        load_text_side(str(folder), None)
    folder = model_folder(tmp_path, tokenizer_config__json="[1]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not a JSON object"):
        load_text_side(str(folder), None)
    folder = model_folder(tmp_path, chat_template__jinja="{% if %}")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not a valid chat template"):
        load_text_side(str(folder), None)
    with pytest.raises(ModelError, match="does not exist"):
        load_text_side(str(tmp_path / "nowhere"), None)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    def text(folder: Path, given: str | None = None) -> str:
        template = load_text_side(str(folder), given).template
        assert template is not None
        return template.render([], lambda _: [], {})[0]

    folder = model_folder(tmp_path)
    assert load_text_side(str(folder), None).template is None
    named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert text(folder) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert text(folder) == "file"
    (folder / "mine.jinja").write_text("flag")
    assert text(folder, str(folder / "mine.jinja")) == "flag"
    assert text(folder, "{{ 'inline' }}") == "inline"
    with pytest.raises(ConfigError, match=r"no file nowhere\.jinja"):
        load_text_side(str(folder), "nowhere.jinja")
