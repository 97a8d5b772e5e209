"""What a request's parameters become on the device: lists of biases with their ends."""

import pytest

from octavo.engine.adjust import MAX_LISTED, adjusts, listed
from octavo.params import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

FOREVER = 1 << 62
FORBIDDEN = float("-inf")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, []),
        ({"min_tokens": 3}, [(1, FORBIDDEN, 3), (2, FORBIDDEN, 3)]),
        ({"min_tokens": 3, "ignore_eos": True}, []),
        ({"stop_token_ids": (2, 9)}, []),
        (
            {"min_tokens": 2, "stop_token_ids": (2, 9)},
            [(1, FORBIDDEN, 2), (2, FORBIDDEN, 2), (9, FORBIDDEN, 2)],
        ),
        (
            {"logit_bias": {4: -1.5}, "bad_words_ids": ((4,), (7,), (5, 6))},
            [(4, FORBIDDEN, FOREVER), (4, -1.5, FOREVER), (7, FORBIDDEN, FOREVER)],
        ),
    ],
)
def test_lists(params, expected) -> None:
    assert sorted(listed(SamplingParams(**params), (1, 2))) == expected


def test_the_longest_list_fits() -> None:
    params = SamplingParams(
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0),
        bad_words_ids=tuple((i,) for i in range(MAX_BAD_WORDS)),
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)),
        min_tokens=1,
    )
    assert len(listed(params, tuple(range(200, 264)))) <= MAX_LISTED


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 0.3, "top_k": 4, "logprobs": 3}, False),
        ({"repetition_penalty": 1.05}, True),
        ({"logit_bias": {3: 1.0}}, True),
        ({"min_tokens": 1}, True),
        ({"allowed_token_ids": (3,)}, True),
    ],
)
def test_what_is_adjusted(params, expected) -> None:
    assert adjusts(SamplingParams(**params)) is expected
