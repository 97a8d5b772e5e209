"""Sampling that the model's makers recommend: read, checked, used where a request says nothing."""

import json
from pathlib import Path

import pytest

from octavo.api.requests import decode_chat, decode_completion
from octavo.config import parse_serve_args
from octavo.errors import ConfigError, ModelError
from octavo.text.generation_config import FILE, read_sampling_defaults


def written(folder: Path, value: object) -> Path:
    (folder / FILE).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_what_is_recommended_is_read_and_the_rest_is_left(tmp_path):
    found = read_sampling_defaults(
        written(
            tmp_path,
            {
                "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05,
                "min_p": 0.1, "eos_token_id": [1, 2], "do_sample": True, "max_length": 20,
                "transformers_version": "5",
            },
        )
    )  # fmt: skip
    assert found == {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.1,
    }  # fmt: skip


def test_no_file_and_no_values_are_no_defaults(tmp_path):
    assert read_sampling_defaults(tmp_path) == {}
    assert read_sampling_defaults(written(tmp_path, {"temperature": None})) == {}
    assert read_sampling_defaults(written(tmp_path, {"top_k": 0})) == {"top_k": -1}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"temperature": 3}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -5}, "top_k"),
        ({"temperature": "warm"}, "temperature"), ({"repetition_penalty": -1}, "repetition"),
        ("{", FILE), ("[]", FILE), ('{"temperature": 1e999}', FILE), ("[" * 5000, FILE),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_name_and_the_way_out(tmp_path, value, named):
    with pytest.raises(ModelError, match=named) as caught:
        read_sampling_defaults(written(tmp_path, value))
    assert FILE in str(caught.value)
    assert "--generation-config vllm" in str(caught.value)


def test_a_request_goes_before_the_recommendation():
    defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    plain = decode_completion(b'{"prompt": "a"}').sampling_params(5, 100, defaults)
    assert (plain.temperature, plain.top_k, plain.repetition_penalty) == (0.6, 20, 1.1)
    chat = decode_chat(b'{"messages": [], "temperature": 0, "top_k": 0, "top_p": 0.5}')
    asked = chat.sampling_params(5, 100, defaults)
    assert (asked.temperature, asked.top_k, asked.top_p) == (0, -1, 0.5)
    assert asked.repetition_penalty == 1.1


def test_top_k_is_bounded_by_the_vocabulary():
    params = decode_completion(b'{"prompt": "a", "top_k": 1000}').sampling_params(5, 100, {})
    assert params.top_k == 100


def test_the_flag():
    assert parse_serve_args(["m"]).generation_config == "auto"
    assert parse_serve_args(["m", "--generation-config", "vllm"]).generation_config == "vllm"
    with pytest.raises(ConfigError, match="generation-config"):
        parse_serve_args(["m", "--generation-config", "/path"])
