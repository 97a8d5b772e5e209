"""Log-probabilities as clients read them: OpenAI's two shapes, and vLLM's for prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from octavo.logprobs import TokenLogprobs
from octavo.text.tokenizer import Tokenizer

# JSON has no infinity; this is what vLLM writes.
LOWEST = -9999.0


@dataclass(frozen=True, slots=True)
class PlacedLogprobs:
    """A token, where its text begins, and what is known of it: nothing of a prompt's first."""

    token_id: int
    offset: int
    found: TokenLogprobs | None


class LogprobsWriter:
    """Spells tokens and lays log-probabilities out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, placed: Sequence[PlacedLogprobs]) -> dict[str, Any] | None:
        """`choices[].logprobs` of a chat."""
        found = [p.found for p in placed if p.found is not None]
        if not found:
            return None
        return {
            "content": [
                {
                    **self._entry(f.token_id, f.logprob),
                    "top_logprobs": [self._entry(i, v) for i, v in _top(f)],
                }
                for f in found
            ]
        }

    def completion(self, placed: Sequence[PlacedLogprobs]) -> dict[str, Any] | None:
        """`choices[].logprobs` of a completion: four parallel lists."""
        if not placed:
            return None
        return {
            "tokens": [self._text(p.token_id) for p in placed],
            "token_logprobs": [p.found and _json_safe(p.found.logprob) for p in placed],
            "top_logprobs": [p.found and self._texts(p.found) for p in placed],
            "text_offset": [p.offset for p in placed],
        }

    def prompt(self, found: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """`prompt_logprobs`: for each prompt token its own and the most probable, by id."""
        return [None, *(self._by_id(f) for f in found)]

    def _by_id(self, found: TokenLogprobs) -> dict[str, Any]:
        ranked = [(found.token_id, found.logprob, found.rank)]
        ranked += zip(found.top_ids, found.top_logprobs, count(1), strict=False)
        return {
            str(i): {"logprob": _json_safe(v), "rank": rank, "decoded_token": self._text(i)}
            for i, v, rank in reversed(ranked)  # where a token is twice, its true rank stays
        }

    def _texts(self, found: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens and the token itself, by text."""
        texts = {self._text(i): _json_safe(v) for i, v in _top(found)}
        texts[self._text(found.token_id)] = _json_safe(found.logprob)
        return texts

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": _json_safe(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _text(self, token_id: int) -> str:
        """A token on its own; where it is no whole characters, its bytes, so that it is unique."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _top(found: TokenLogprobs) -> list[tuple[int, float]]:
    return list(zip(found.top_ids, found.top_logprobs, strict=True))


def _json_safe(value: float) -> float:
    return value if math.isfinite(value) else LOWEST
