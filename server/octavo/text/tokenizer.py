"""The model's tokenizer, and the rule that user text never turns into control tokens."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import msgspec
from tokenizers import Tokenizer as Backend

from octavo.errors import ModelError
from octavo.text.detokenizer import (
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
)

# A sentencepiece-like detokenizer must see what stands before the first new token.
CONTEXT_TOKENS = 6
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class _TokenizerFile(msgspec.Struct):
    """The two members of tokenizer.json that the backend does not show."""

    decoder: dict[str, object] | None = None


class Tokenizer:
    """Text to ids and back; safe to call from several threads."""

    def __init__(self, backend: Backend, *, byte_level: bool) -> None:
        self._backend = backend
        self._lock = threading.Lock()  # guards the backend's encode_special_tokens switch
        special = {t.content: t for t in backend.get_added_tokens_decoder().values() if t.special}
        self._control = _control_pattern(special)
        self.control_ids = frozenset(
            i for i, t in backend.get_added_tokens_decoder().items() if t.special
        )
        self._bytes = ByteTable(backend.id_to_token, self.control_ids) if byte_level else None
        # Control tokens too: for log-probabilities, and for outputs that are to show them.
        self._all_bytes = ByteTable(backend.id_to_token, frozenset()) if byte_level else None
        self.longest_token = max((len(t) for t in backend.get_vocab()), default=1)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json; a missing or broken file is a `ModelError` that names it."""
        path = folder / "tokenizer.json"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise ModelError(
                f"tokenizer.json is missing from the model folder {folder}; "
                "save the fast tokenizer beside the weights (tokenizer.save_pretrained)"
            ) from None
        except OSError as error:
            raise ModelError(f"tokenizer.json cannot be read: {error.strerror}") from error
        try:
            backend = Backend.from_buffer(raw)
            decoder = msgspec.json.decode(raw, type=_TokenizerFile).decoder or {}
        except Exception as error:  # the backend raises bare Exception
            raise ModelError(f"tokenizer.json is not a valid tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, byte_level=decoder.get("type") == "ByteLevel")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Encode a raw prompt: spelled control tokens count, and the model's own are added."""
        with self._lock:
            return self._ids(text)

    def encode_chat(self, rendered: str, quoted: Mapping[str, str]) -> list[int]:
        """Encode a rendered chat template, where `quoted` maps marks to what users typed.

        Without marks this is one plain call. With them the text is cut at the template's own
        control tokens, as the backend itself would cut it, and each piece between is encoded with
        the user's spelling put back and control tokens switched off.
        """
        with self._lock:
            if not quoted:
                return self._ids(rendered, add_special=False)
            self._backend.encode_special_tokens = True
            try:
                return self._encode_pieces(rendered, quoted)
            finally:
                self._backend.encode_special_tokens = False

    def _encode_pieces(self, rendered: str, quoted: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(self._control.split(rendered)):
            if i % 2:  # re.split with one group: odd pieces are the control tokens
                ids.append(self._backend.token_to_id(piece.strip()) or 0)
                continue
            for mark, spelling in quoted.items():
                piece = piece.replace(mark, spelling)
            if piece:
                ids += self._ids(piece, add_special=False)
        return ids

    def _ids(self, text: str, *, add_special: bool = True) -> list[int]:
        """The backend's `encode`, which holds the interpreter's lock all the while, as a batch of
        one, which does not: a long prompt would stop every stream. It is faster too, because
        nobody asked for offsets.
        """
        (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special)
        ids: list[int] = found.ids
        return ids

    def spelled_control_tokens(self, text: str) -> list[str]:
        """The control tokens that `text` spells out, each once."""
        return sorted({m.group().strip() for m in self._control.finditer(text)})

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """The text of a whole output, by default with control tokens left out."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special))

    def detokenizer(self, prompt: list[int], *, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental detokenizer for the output that follows `prompt`."""
        table = self._bytes if skip_special else self._all_bytes
        if table is not None:
            return ByteLevelDetokenizer(table)
        decode = partial(self.decode, skip_special=skip_special)
        return WindowDetokenizer(decode, prompt[-CONTEXT_TOKENS:])

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for on its own; it need not be whole characters."""
        if self._all_bytes is not None:
            return self._all_bytes[token_id]
        piece = self._backend.id_to_token(token_id) or ""
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()  # sentencepiece's mark of a space

    def token_text(self, token_id: int) -> str:
        """One token on its own, U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def bad_word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell each word, at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        with self._lock:
            for word in words:
                for text in (word, f" {word.lstrip()}"):
                    ids = tuple(self._ids(text, add_special=False))
                    if ids:
                        found[ids] = None
        return tuple(found)


def _control_pattern(special: Mapping[str, object]) -> re.Pattern[str]:
    """Match any control token, longest first, with the white space that it swallows."""
    words = []
    for content in sorted(special, key=len, reverse=True):
        token = special[content]
        left = r"\s*" if getattr(token, "lstrip", False) else ""
        right = r"\s*" if getattr(token, "rstrip", False) else ""
        words.append(f"{left}{re.escape(content)}{right}")
    return re.compile(f"({'|'.join(words)})" if words else r"((?!))")
