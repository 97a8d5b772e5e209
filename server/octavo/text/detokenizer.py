"""Token ids to text one token at a time, never emitting half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

# The longest UTF-8 sequence is four bytes, so four byte-sized tokens without a whole character
# are not a character in the making.
MAX_HELD_TOKENS = 4


class Detokenizer(Protocol):
    """Text of an output as it grows; the sum of all pieces does not depend on chunking."""

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now certain, often the empty string."""
        ...

    def flush(self) -> str:
        """The output is over: return what was held back, U+FFFD for half a character."""
        ...


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, from character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class ByteTable(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, filled as tokens are met.

    `whole` has the text of a token that begins and ends with whole characters, and None for others.
    """

    def __init__(self, piece: Callable[[int], str | None], control_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(control_ids, b""))
        self._piece = piece
        self.whole = _WholeTable(self)

    def __missing__(self, token_id: int) -> bytes:
        spelled = self[token_id] = self._spell(self._piece(token_id) or "")
        return spelled

    @staticmethod
    def _spell(piece: str) -> bytes:
        # An added token may hold characters outside the alphabet; then it stands for itself.
        if all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        return piece.encode()


class _WholeTable(dict[int, str | None]):
    def __init__(self, spelling: ByteTable) -> None:
        super().__init__()
        self._spelling = spelling

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._spelling[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class ByteLevelDetokenizer:
    """For byte-level BPE: exact and constant work for each token."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_character = False

    def push(self, token_id: int) -> str:
        """Decode the token's bytes; an unfinished character waits for its rest."""
        if not self._in_character and (text := self._table.whole[token_id]) is not None:
            return text
        text = self._utf8.decode(self._table[token_id])
        self._in_character = self._utf8.getstate()[0] != b""
        return text

    def flush(self) -> str:
        """End the byte stream."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decode a short window twice and take the difference.

    Decoders of this kind look at a token's left neighbours (spaces, byte fallback), so the window
    starts at the previous certain token; `context` is the prompt's tail.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: list[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._sure = len(context)  # ids[:sure] have been emitted

    def push(self, token_id: int) -> str:
        """Decode the window with the new token; hold back text that ends in half a character."""
        self._ids.append(token_id)
        return self._emit(final=False)

    def flush(self) -> str:
        """Emit whatever the window still holds."""
        return self._emit(final=True) if self._sure < len(self._ids) else ""

    def _emit(self, *, final: bool) -> str:
        text = self._decode(self._ids)
        held = len(self._ids) - self._sure
        if text.endswith("�") and held < MAX_HELD_TOKENS and not final:
            return ""
        before = self._decode(self._ids[: self._sure])
        del self._ids[: self._sure]
        self._sure = len(self._ids)
        return text[len(before) :]
