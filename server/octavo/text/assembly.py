"""One output's text as its tokens arrive: detokenized, and cut at the first stop string."""

from __future__ import annotations

import math

from octavo.params import SamplingParams
from octavo.text.stop import StopMatcher
from octavo.text.tokenizer import Tokenizer


class TextAssembly:
    """Feeds tokens through a detokenizer and a stop matcher; what it returns is final.

    `num_chars` counts the characters of all tokens so far, held back or cut off ones included.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt, skip_special=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        # Before min_tokens a stop string is ordinary text.
        self._watches_from = params.min_tokens if params.stop else math.inf
        self._keeps_stop = params.include_stop_str_in_output
        self.num_tokens = 0
        self.num_chars = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop.matched

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain. Look at `matched` afterwards."""
        self.num_tokens += 1
        text = self._detokenizer.push(token_id)
        self.num_chars += len(text)
        return text if self.num_tokens < self._watches_from else self._stop.push(text)

    def flush(self, stop_token_id: int | None = None) -> str:
        """The output is over: return what was held back, unless it completes a stop string.

        The token that ended it is text only where stops are to be kept.
        """
        text = ""
        if stop_token_id is not None and self._keeps_stop:
            text = self.push(stop_token_id)
        last = self._detokenizer.flush()
        self.num_chars += len(last)
        text += last if self.num_tokens < self._watches_from else self._stop.push(last)
        return text if self.matched is not None else text + self._stop.flush()
