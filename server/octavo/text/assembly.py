"""One output's text as its tokens arrive: detokenized, and cut at the first stop string."""

from __future__ import annotations

from octavo.params import SamplingParams
from octavo.text.stop import StopMatcher
from octavo.text.tokenizer import Tokenizer


class TextAssembly:
    """Feeds tokens through a detokenizer and a stop matcher; what it returns is final."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._stop = StopMatcher(tuple(params.stop))
        self._min_tokens = params.min_tokens
        self._keep_stop = params.include_stop_str_in_output
        self.num_tokens = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop.matched

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain. Look at `matched` afterwards."""
        self.num_tokens += 1
        return self._push(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """The output is over: return what was held back, unless it completes a stop string."""
        text = self._push(self._detokenizer.flush())
        return text if self.matched is not None else text + self._stop.flush()

    def _push(self, text: str) -> str:
        # Before min_tokens a stop string is ordinary text.
        if self.num_tokens < self._min_tokens:
            return text
        text = self._stop.push(text)
        return text + (self.matched or "") if self._keep_stop else text
