"""Parameters out of range are refused by name, with the allowed range."""

import re
from pathlib import Path

import msgspec
import pytest

from octavo import params as limits
from octavo.params import ParameterError, SamplingParams

VOCAB = 100

WRONG = [
    *(("temperature", v, "[0, 2]") for v in (-0.1, 2.1, float("nan"), float("inf"), "hot", None)),
    *(("top_p", v, "(0, 1]") for v in (0, -1, 1.5, float("nan"), True)),
    *(("min_p", v, "[0, 1]") for v in (-0.1, 1.1, float("nan"))),
    *(("typical_p", v, "(0, 1]") for v in (0, 1.1, float("inf"))),
    *(("presence_penalty", v, "[-2, 2]") for v in (-2.1, 2.1, float("nan"))),
    *(("frequency_penalty", v, "[-2, 2]") for v in (-2.1, 2.1, float("-inf"))),
    *(("repetition_penalty", v, "(0, 2]") for v in (0, -1, 2.1, float("nan"))),
    *(("top_k", v, "-1 (off) or at least 1") for v in (-2, 0, 1.5, True)),
    *(("max_tokens", v, "at least 1") for v in (0, -1, 1.5, True)),
    *(("min_tokens", v, "at least 0") for v in (-1, 0.5)),
    *((f, v, "in 0..20") for f in ("logprobs", "prompt_logprobs") for v in (-1, 21, 10**18, 1.5)),
    *(("seed", v, "64 bits") for v in (2**63, -(2**63) - 1, 1.5, "7")),
    ("stop", [""], "1..256 characters"),
    ("stop", "a" * 257, "1..256 characters"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", [5], "1..256 characters"),
    ("bad_words", [""], "1..256 characters"),
    ("bad_words", ["a"] * 129, "at most 128"),
    ("bad_words_ids", ((1, VOCAB),), "0..99"),
    ("stop_token_ids", [VOCAB], "0..99"),
    ("stop_token_ids", [-1], "0..99"),
    ("stop_token_ids", [1] * 129, "at most 128"),
    ("allowed_token_ids", [], "empty"),
    ("allowed_token_ids", [1] * 1025, "at most 1024"),
    ("allowed_token_ids", [VOCAB], "0..99"),
    ("allowed_token_ids", [1.0], "0..99"),
    ("logit_bias", {VOCAB: 1.0}, "0..99"),
    ("logit_bias", {-1: 1.0}, "0..99"),
    ("logit_bias", {1: 100.5}, "[-100, 100]"),
    ("logit_bias", {1: float("nan")}, "[-100, 100]"),
    ("logit_bias", dict.fromkeys(range(2000), 1.0), "at most 1024"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG, ids=lambda v: str(v)[:20])
def test_out_of_range_is_refused_by_name_with_the_range(field, value, allowed):
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value}).validate(VOCAB)
    assert caught.value.param == ("bad_words" if field == "bad_words_ids" else field)
    assert allowed in str(caught.value)
    assert len(str(caught.value)) < 200


def test_min_tokens_above_max_tokens():
    with pytest.raises(ParameterError, match=r"min_tokens \(5\) is above max_tokens \(4\)"):
        SamplingParams(max_tokens=4, min_tokens=5).validate(VOCAB)


def test_the_limits_themselves_are_allowed():
    SamplingParams(
        max_tokens=10**9, min_tokens=10**9, temperature=2, top_p=1e-9, top_k=10**9, min_p=1,
        typical_p=1e-9, presence_penalty=-2, frequency_penalty=2, repetition_penalty=2,
        logit_bias={0: -100, 99: 100}, allowed_token_ids=[0, 99], bad_words=["a" * 256] * 128,
        seed=-(2**63), stop=["a" * 256] * 16, stop_token_ids=[5] * 128, logprobs=20,
        prompt_logprobs=0,
    ).validate(VOCAB)  # fmt: skip


def test_lists_and_lone_texts_become_tuples_and_survive_the_wire():
    given = SamplingParams(stop="x", bad_words=["y"], stop_token_ids=[1], allowed_token_ids=[2])
    assert (given.stop, given.bad_words) == (("x",), ("y",))
    assert (given.stop_token_ids, given.allowed_token_ids) == ((1,), (2,))
    full = SamplingParams(logit_bias={5: -1.5}, bad_words_ids=((1, 2), (3,)), stop=None)
    for params in (given, full):
        packed = msgspec.msgpack.encode(params)
        assert msgspec.msgpack.decode(packed, type=SamplingParams) == params


def test_every_parameter_is_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "sampling.md").read_text()
    internal = {"bad_words_ids", "use_beam_search", "length_penalty", "early_stopping"}
    names = set(SamplingParams.__struct_fields__) - internal
    assert {name for name in names if f"`{name}`" not in text} == set()
    for limit in ("MAX_LOGIT_BIAS", "MAX_ALLOWED_TOKEN_IDS", "MAX_BAD_WORDS", "MAX_LOGPROBS"):
        assert re.search(rf"\b{getattr(limits, limit)}\b", text), limit
